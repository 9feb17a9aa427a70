"""Composes the run's experiment: the partition names it; this resource adds the configuration folder and overrides.

A run that automation starts has no configuration. It takes the overrides of the run that made the experiment's newest
checkpoint, which it follows.

Every field has a default, so that the UI starts a run without any run configuration. Each step composes from the files,
so that every step of a run, and a later run of one asset, resolve the same settings.
"""

import logging
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.experiments.compose import CONFIG_DIR, compose
from llm_assets.experiments.explain import as_markdown
from llm_assets.experiments.observed import changes
from llm_assets.experiments.partitions import enter, experiments
from llm_assets.experiments.references import resolve
from model.errors import PipelineError
from model.settings import ExperimentSettings

AUTOMATION_TAG = "dagster/from_automation_condition"
"""Dagster's tag of a run that an automation condition started."""
logger = logging.getLogger(__name__)


class HydraConfig(dg.ConfigurableResource):
    """The experiment's settings from `configs/`, with overrides."""

    config_dir: str = Field(
        default=str(CONFIG_DIR), description="Folder with config.yaml and experiment/. Default: LLM_ASSETS_CONFIG_DIR."
    )
    overrides: list[str] = Field(
        default=[],
        description="Hydra overrides for all stages, such as training.max_steps=100 or model=rex_30m. "
        "A stage refuses an upstream made with different values. An experiment changes some of these defaults:\n"
        f"{as_markdown()}",
    )
    force: bool = Field(
        default=False,
        description="Recompute every selected stage, even if unchanged. Same as the run tag rex/force=true.",
    )

    _inherited: list[str] = PrivateAttr(default_factory=list)
    _composed: dict[str, ExperimentSettings] = PrivateAttr(default_factory=dict)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Add the experiment to the partitions and report the run's settings, before Dagster records data versions.

        Every step reports again: the sensor or a run with other overrides may have observed different values since.
        """
        self._composed.clear()
        tags = context.run.tags if context.run else {}
        experiment = tags.get("dagster/partition")
        if not experiment or context.instance is None:
            return
        if AUTOMATION_TAG in tags:
            self._inherited = _overrides_of_checkpoint(context.instance, experiment)
        if experiments.has_partition_key(experiment):
            enter(context.instance, experiment)
        try:
            settings = self.settings(experiment)
        except PipelineError:
            return  # the step composes again and fails with this error
        try:
            for event in changes(context.instance, experiment, settings):
                context.instance.report_runless_asset_event(event)
        except Exception as error:  # noqa: BLE001 - a locked or full event log must not fail the run
            logger.warning("the settings are not shown as observed: %s", str(error).partition("\n")[0])

    def settings(self, experiment: str) -> ExperimentSettings:
        """Compose `experiment`, once per step, with `latest:NAME` resolved to the newest checkpoint of NAME.

        Raises PipelineError, one line, if that is not possible.
        """
        store = DirectoryIOManager().store()
        if experiment not in self._composed:
            self._composed[experiment] = compose(experiment, self.all_overrides, Path(self.config_dir))
        return resolve(self._composed[experiment], lambda name: store.load("trained_checkpoint", name))

    @property
    def all_overrides(self) -> list[str]:
        """The run's overrides, after those that an automatic run takes over."""
        return [*self._inherited, *self.overrides]


def _overrides_of_checkpoint(instance: dg.DagsterInstance, experiment: str) -> list[str]:
    """The overrides of the run that made the newest checkpoint of an experiment."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey("trained_checkpoint"), asset_partitions=[experiment])
    records = instance.fetch_materializations(wanted, limit=1).records
    run = instance.get_run_by_id(records[0].run_id) if records else None
    config: Any = run.run_config if run else {}
    for key in ("resources", "hydra", "config", "overrides"):
        config = config.get(key) or {}
    return list(config)
