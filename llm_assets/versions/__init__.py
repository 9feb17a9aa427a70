"""Versions of registered models: their registration, the choice of the champion, and how MLflow loads them."""
