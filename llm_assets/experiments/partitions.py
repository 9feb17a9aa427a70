"""One partition per experiment: a file of `configs/experiment/`.

A partition rather than run configuration: the UI asks for it, history and plots are kept for each experiment, a sweep
is a backfill, and upstream and downstream of one run always belong together. A new file appears when the code location
is reloaded.
"""

import dagster as dg

from llm_assets.experiments.compose import CONFIG_DIR, experiment_names


class ExperimentPartitions(dg.StaticPartitionsDefinition):
    """The experiments; another key is refused in one line.

    `dagster job execute --tags` starts a run with any partition key. Dagster notices inside the step, when it resolves
    the key of an input or an output, with a message about ranges.
    """

    def get_partition_keys_in_range(self, partition_key_range: dg.PartitionKeyRange) -> list[str]:
        """Keys from the range's start to its end."""
        names = list(self.get_partition_keys())
        for name in (partition_key_range.start, partition_key_range.end):
            if name not in names:
                raise dg.Failure(
                    description=f"no experiment {name!r} in {CONFIG_DIR / 'experiment'}: expected one of {names}",
                    allow_retries=False,
                )
        return list(super().get_partition_keys_in_range(partition_key_range))


experiments = ExperimentPartitions(experiment_names(CONFIG_DIR))
