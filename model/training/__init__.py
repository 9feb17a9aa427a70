"""Training with the Hugging Face Trainer: optimizer, schedule, resume, curves."""
