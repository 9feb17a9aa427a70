"""Measurements on the artifacts themselves and against peers; what was tried and did not help is in LOG.md."""

import model  # noqa: F401 - before torch is loaded: it says how long OpenMP's threads spin
