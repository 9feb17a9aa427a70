"""The six assets, one module each: settings -> one call into `model` or `bench` -> metadata."""

from typing import Any

from llm_assets.artifacts.io_manager import ArtifactDirectory
from llm_assets.experiments.partitions import experiments

# What all assets have in common.
COMMON: dict[str, Any] = {
    "partitions_def": experiments,
    "owners": ["team:llm"],
    "io_manager_key": "artifacts",
    "dagster_type": ArtifactDirectory,
}
