"""Measurements of the artifacts and comparisons with peers; LOG.md records the experiments, failed ones included."""

import model  # noqa: F401 - sets how long OpenMP's threads spin, before torch is loaded
