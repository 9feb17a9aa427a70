"""Builds the code locations beside the pipeline's: stages that need what the pipeline must run without.

Each is a module of its own name (`images.py`, `evaluation.py`), and the UI shows its assets in the same graph.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.assets import load_asset
from llm_assets.experiments.partitions import experiments
from llm_assets.jobs.jobs import EVERY_STEP, build_executor, stage_jobs
from llm_assets.registry import StageSpec
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.terminal.file_logger import file_logger


def build_side_location(stages: Sequence[StageSpec], resources: Mapping[str, Any]) -> dg.Definitions:
    """A fresh code location of `stages`; `resources` adds to the usual ones, or replaces them, by key."""
    assets = [load_asset(stage) for stage in stages]
    # The pipeline makes these; here they are read.
    upstream = [
        dg.AssetSpec(name, partitions_def=experiments).with_io_manager_key("artifacts") for name in stages[0].upstream
    ]
    usual = {"artifacts": DirectoryIOManager(), "hydra": HydraConfig(), "mlflow": MlflowTracking()}
    return dg.Definitions(
        assets=[*assets, *upstream],
        jobs=stage_jobs(assets),
        resources={**usual, **resources},
        executor=build_executor(EVERY_STEP),
        loggers={"console": dg.colored_console_logger, "file": file_logger},
    )
