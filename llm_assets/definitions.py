"""The code location: the assets of the registry, their jobs and resources.

    dagster dev                                                               in the repository (workspace.yaml)
    dagster job execute -m llm_assets.definitions -j llm_pipeline             the default experiment
    dagster job execute -m llm_assets.definitions -j llm_pipeline --tags '{"dagster/partition": "smoke"}'

Each Dagster step is a process that imports this module again: nothing here imports torch, transformers, mlflow or
bentoml.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.assets import load_asset
from llm_assets.experiments.observed import external_specs
from llm_assets.jobs.automation import failure_webhook, observed_settings, retraining
from llm_assets.jobs.jobs import build_jobs, executor
from llm_assets.registry import PIPELINE
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.terminal.file_logger import file_logger

ASSETS = [load_asset(stage) for stage in PIPELINE]


def build_defs(resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """A new code location; `resource_overrides` replaces resources by key (artifacts, bentos, hydra, mlflow)."""
    resources = {
        "artifacts": DirectoryIOManager(),
        "bentos": BentoBuilder(),
        "hydra": HydraConfig(),
        "mlflow": MlflowTracking(),
    }
    return dg.Definitions(
        assets=[*external_specs(), *ASSETS],
        jobs=build_jobs(ASSETS),
        schedules=[retraining],
        sensors=[failure_webhook, observed_settings],
        resources={**resources, **(resource_overrides or {})},
        executor=executor,
        loggers={"console": dg.colored_console_logger, "file": file_logger},
    )


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions that Dagster's tools load."""
    return build_defs()
