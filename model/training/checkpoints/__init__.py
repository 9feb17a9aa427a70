"""Checkpoints of a running training: on this machine, and copied to a URL."""
