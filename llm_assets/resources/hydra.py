"""Composes the run's experiment: the partition names it, this resource adds where the files lie and what to change.

Both fields have defaults, so that the UI starts a run without a configuration to type. Composed in the step, from files
only: every step of a run, and a later run of one asset, resolve the same settings.
"""

import logging
from pathlib import Path

import dagster as dg
from pydantic import Field, PrivateAttr

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.experiments.compose import CONFIG_DIR, compose
from llm_assets.experiments.explain import as_markdown
from llm_assets.experiments.observed import observations
from llm_assets.experiments.references import resolve
from model.errors import PipelineError
from model.settings import ExperimentSettings

logger = logging.getLogger(__name__)


class HydraConfig(dg.ConfigurableResource):
    """The experiment's settings from `configs/`, with overrides."""

    config_dir: str = Field(
        default=str(CONFIG_DIR), description="Folder with config.yaml and experiment/. Default: LLM_ASSETS_CONFIG_DIR."
    )
    overrides: list[str] = Field(
        default=[],
        description="Hydra overrides for all stages, such as training.max_steps=100 or model=rex_30m. "
        "A stage refuses an upstream that was made with other values. An experiment changes some of these defaults:\n"
        f"{as_markdown()}",
    )
    force: bool = Field(
        default=False,
        description="Compute every selected stage again, unchanged ones too. As the run tag rex/force=true.",
    )

    _composed: dict[str, ExperimentSettings] = PrivateAttr(default_factory=dict)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Report the settings that a run works with, before Dagster notes what its steps are made from.

        A step that begins later reads what is reported now, not what the files say while another run has overrides.
        """
        self._composed.clear()
        experiment = context.run.tags.get("dagster/partition") if context.run else None
        if not experiment or context.instance is None:
            return
        try:
            settings = self.settings(experiment)
        except PipelineError:
            return  # the step raises it again, where it becomes that step's failure
        try:
            for observation in observations(context.instance, experiment, settings):
                context.instance.report_runless_asset_event(observation)
        except Exception as error:  # noqa: BLE001 - a locked or full event log costs a run no work
            logger.warning("the settings are not shown as observed: %s", str(error).partition("\n")[0])

    def settings(self, experiment: str) -> ExperimentSettings:
        """Compose `experiment`, once in a step, with the newest checkpoints of the experiments that it names.

        PipelineError, one line, where that is not possible.
        """
        store = DirectoryIOManager().store()
        if experiment not in self._composed:
            self._composed[experiment] = compose(experiment, self.overrides, Path(self.config_dir))
        return resolve(self._composed[experiment], lambda name: store.load("trained_checkpoint", name))
