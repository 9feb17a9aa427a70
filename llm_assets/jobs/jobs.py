"""Jobs: the whole pipeline, and one per stage.

Selections are objects, not strings. The executor's limit is explicit: Dagster's default counts the machine's cores, not
the container's share of them. The partition tag lets `dagster job execute -j llm_pipeline` run without naming a
partition; `--tags '{"dagster/partition": "NAME"}'` picks another experiment.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.experiments.compose import DEFAULT_EXPERIMENT, experiment_names
from llm_assets.registry import PIPELINE, UP_TO_CHECKPOINT, StageSpec
from llm_assets.stage import stopped

MAX_CONCURRENT_STEPS = 2
EVERY_STEP = ("llm_assets.definitions", "mlflow")
"""Modules that each step imports."""
NOT_FORKED = (
    "the process that steps are forked from ended before it could start one: it imports torch and what the stages "
    "need, which takes up to 2 GB; raise the limit of memory (`ulimit -v`, a container's) or end other programs, then "
    "run again"
)
"""Reason of a run none of whose steps could start."""
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's, AMD's and WSL's drivers."""


def stage_modules(stages: Iterable[StageSpec], gpu_drivers: Sequence[str] = GPU_DRIVERS) -> list[str]:
    """The modules that the fork server of a run of these stages imports once, so that its steps need not.

    A new interpreter takes 4 s to import Dagster and MLflow and 4 s more for torch and transformers. These imports
    start no threads that a step needs, but a GPU that was initialized before a fork cannot be used after it: on a
    machine with a GPU, each step imports torch and transformers itself.
    """
    if any(Path(driver).exists() for driver in gpu_drivers):
        return []
    return [module for stage in stages for module in stage.preload]


class WatchedExecutor(dg.Executor):
    """Dagster's executor of steps in processes, which says so where they cannot start, or one of them is stopped.

    `stage/stopped.py` says how.
    """

    def __init__(self, build: Callable[[Sequence[str]], dg.Executor]) -> None:
        """build: makes Dagster's executor for steps with these keys."""
        self._build, self._any = build, build([])

    @property
    def retries(self) -> Any:
        """As Dagster's."""
        return self._any.retries

    @property
    def step_dependency_config(self) -> Any:
        """As Dagster's."""
        return self._any.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        """As Dagster's."""
        names: dict[int, str] = {}
        inner = self._build(execution_plan.step_keys_to_execute)
        with stopped.watch(plan_context.log.warning, names):
            try:
                for event in inner.execute(plan_context, execution_plan):
                    if event.event_type_value == "STEP_WORKER_STARTED" and event.step_key:
                        names[int(str(event.engine_event_data.metadata["pid"].value))] = event.step_key
                    yield event
            except (EOFError, ConnectionError):
                plan_context.log.error(NOT_FORKED)
                raise


def build_executor(modules: Sequence[str], stages: Sequence[StageSpec] = ()) -> dg.ExecutorDefinition:
    """Steps in separate processes, forked from one that has imported these modules, and those of the run's stages."""
    dagsters: Any = dg.multiprocess_executor

    def build(context: dg.InitExecutorContext, keys: Sequence[str]) -> Any:
        of_stages = stage_modules(stage for stage in stages if stage.name in keys)
        preloaded = {"preload_modules": ["llm_assets.stage.fork_server", *modules, *of_stages]}
        config = {**context.executor_config, "start_method": {"forkserver": preloaded}}
        return dagsters.executor_creation_fn(context._replace(executor_config=config))

    watched = dg.ExecutorDefinition(
        name=dagsters.name,
        config_schema=dagsters.config_schema,
        requirements=dagsters.get_requirements,
        executor_creation_fn=lambda context: WatchedExecutor(partial(build, context)),
        description=dagsters.description,
    )
    return watched.configured({"max_concurrent": MAX_CONCURRENT_STEPS, "start_method": {"forkserver": {}}})


executor = build_executor(EVERY_STEP, PIPELINE)
"""The pipeline's executor."""


def build_jobs(assets: Sequence[dg.AssetsDefinition]) -> list[Any]:
    """`llm_pipeline` with every asset, `training_pipeline` up to the checkpoint, and `<asset>_job` for each."""
    whole = _job(
        "llm_pipeline",
        assets,
        "From text to a packaged service: every asset of one experiment. Experiments: "
        f"{', '.join(f'`{name}`' for name in experiment_names())}. One that has never run is in the list of "
        'partitions if its file is new; for another choose "Add a partition" and type its name.',
    )
    upstream = [asset for asset in assets if asset.key.path[-1] in UP_TO_CHECKPOINT]
    training = _job(
        "training_pipeline",
        upstream,
        "From text to a trained checkpoint, for sweeps over what is trained: "
        f"{', '.join(f'`{name}`' for name in UP_TO_CHECKPOINT)}.",
    )
    return [whole, training, *stage_jobs(assets)]


def stage_jobs(assets: Sequence[dg.AssetsDefinition]) -> list[Any]:
    """`<asset>_job` for each: that stage alone, from the latest upstream."""
    names = [asset.key.path[-1] for asset in assets]
    return [
        _job(f"{name}_job", [asset], f"Only {name}, from the latest upstream artifacts.")
        for name, asset in zip(names, assets, strict=True)
    ]


def _job(name: str, assets: Sequence[dg.AssetsDefinition], description: str) -> Any:
    return dg.define_asset_job(
        name,
        selection=dg.AssetSelection.assets(*assets),
        description=description,
        run_tags={"dagster/partition": DEFAULT_EXPERIMENT},
    )
