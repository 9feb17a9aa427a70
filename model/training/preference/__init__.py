"""Preference tuning: pairs of answers, and the training on them."""
