"""Measurements of the artifacts and comparisons with peers; LOG.md records the experiments, failed ones included."""

import model  # noqa: F401 - sets OpenMP and garbage collection before torch is loaded
