"""The Dagster code location: declarations only. The work is in `model` and `bench`."""
