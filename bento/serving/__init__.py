"""Connects requests with the engine: loaded models, admission, answers, the champion."""
