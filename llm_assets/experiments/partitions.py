"""One partition per experiment: a file of `configs/experiment/`.

A partition rather than run configuration: the UI asks for it, history and plots are kept for each experiment, a sweep
is a backfill, and upstream and downstream of one run always belong together.

The set is dynamic. An experiment enters it with its first run (`resources/hydra.py`), by "Add a partition" in the UI,
or when its file is written while Dagster's daemon looks (`automation.py`). So the graph counts the experiments in use:
with one static partition per file, a graph of which everything is made read "12% filled". Each file is a valid
partition before that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import dagster as dg

from llm_assets.experiments.compose import CONFIG_DIR, experiment_names

NAME = "experiments"


class ExperimentPartitions(dg.DynamicPartitionsDefinition):
    """The experiments of a configuration folder; another key is refused in one line.

    `dagster job execute --tags` starts a run with any partition key. Dagster notices inside the step, when it resolves
    the key of an input or an output, with a message about ranges.
    """

    config_dir: Path

    def __new__(cls, config_dir: Path = CONFIG_DIR) -> Self:
        """config_dir: the folder of which `experiment/` names the valid keys."""
        made = super().__new__(cls, name=NAME)
        made.config_dir = config_dir
        return made

    def has_partition_key(self, partition_key: str, *_: Any, **__: Any) -> bool:
        """Whether there is such an experiment, in the set or not yet."""
        return partition_key in experiment_names(self.config_dir)

    def get_partition_keys_in_range(self, partition_key_range: dg.PartitionKeyRange) -> Sequence[str]:
        """Keys from the range's start to its end."""
        for name in (partition_key_range.start, partition_key_range.end):
            if not self.has_partition_key(name):
                raise dg.Failure(
                    description=f"no experiment {name!r} in {self.config_dir / 'experiment'}: expected one of "
                    f"{experiment_names(self.config_dir)}",
                    allow_retries=False,
                )
        return super().get_partition_keys_in_range(partition_key_range)


experiments = ExperimentPartitions()


def in_use(instance: dg.DagsterInstance) -> list[str]:
    """The partitions that the UI shows, oldest first."""
    return list(instance.get_dynamic_partitions(NAME))


def enter(instance: dg.DagsterInstance, experiment: str) -> None:
    """Show an experiment as a partition from now on."""
    if instance.has_dynamic_partition(NAME, experiment):
        return
    try:
        instance.add_dynamic_partitions(NAME, [experiment])
    except Exception:
        if not instance.has_dynamic_partition(NAME, experiment):  # unless another run was faster
            raise
