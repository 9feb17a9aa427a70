"""The code location of scores on tasks of lm-eval, separate from the pipeline's, which needs none of it.

    dagster job execute -m llm_assets.evaluation -j evaluation_report_job

It scores the latest checkpoint or quantized model on `evaluation.tasks`. The UI shows it downstream of them, in the
same graph.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.assets import load_asset
from llm_assets.experiments.partitions import experiments
from llm_assets.jobs import EVERY_STEP, build_executor, stage_jobs
from llm_assets.registry import EVALUATION
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.terminal.records import file_logger

ASSETS = [load_asset(stage) for stage in EVALUATION]
# The pipeline makes these; here they are read.
UPSTREAM = [
    dg.AssetSpec(name, partitions_def=experiments).with_io_manager_key("artifacts") for name in EVALUATION[0].upstream
]


def build_defs(resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """A fresh code location; `resource_overrides` replaces resources by key."""
    resources = {"artifacts": DirectoryIOManager(), "hydra": HydraConfig(), "mlflow": MlflowTracking()}
    return dg.Definitions(
        assets=[*ASSETS, *UPSTREAM],
        jobs=stage_jobs(ASSETS),
        resources={**resources, **(resource_overrides or {})},
        executor=build_executor(EVERY_STEP),
        loggers={"console": dg.colored_console_logger, "file": file_logger},
    )


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions that Dagster's tools load."""
    return build_defs()
