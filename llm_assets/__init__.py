"""The Dagster code location: declarations only. The work is in `model` and `bench`."""

import model  # noqa: F401 - sets garbage collection before Dagster is loaded
