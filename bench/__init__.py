"""Measurements on the artifacts themselves and against peers; what was tried and did not help is in LOG.md."""
