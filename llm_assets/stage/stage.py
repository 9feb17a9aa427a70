"""The context manager around every stage's one call: settings, upstream, workspace, tracking and manifest.

    with stage(context, hydra, mlflow, {"corpus": corpus}) as work:
        summary = build_tokenized_dataset(work.settings.tokenizer, corpus, work.output, log=work.log)
        yield work.result(work.numbers(summary))

An asset yields inside the block, so that the MLflow run ends FINISHED only once the artifact is published. A resumable
stage finds `work.scratch` again after a kill: its key is the configuration, the upstream content and the code version,
not the run.
"""

import dataclasses
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.artifacts.io_manager import Staged, scratch_dir
from llm_assets.artifacts.locks import acquire
from llm_assets.artifacts.manifest import (
    VERSION_DIGITS,
    Manifest,
    assert_compatible,
    config_hash,
    flatten,
    seal,
    stage_config,
)
from llm_assets.experiments.compose import to_yaml
from llm_assets.failures import no_retry_after_termination, permanent_failures
from llm_assets.registry import model_name
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.resources.tracked_run import TrackedRun
from llm_assets.stage import metadata as ui_metadata
from llm_assets.stage.code import code_digest, code_version
from llm_assets.stage.evidence import champion_comparison, measured_model
from llm_assets.stage.interrupts import end_with_run, noticed_interrupts
from llm_assets.versions.measurements import measurements
from llm_assets.versions.promotion import Contest, warned
from model.errors import PipelineError, limits_as_error
from model.progress import Log
from model.settings import ExperimentSettings
from model.system.memory import peak_resident_bytes

# Dagster keeps observations forever: one per step of a long training would fill the run storage.
OBSERVATION_EVERY_S = 60.0
WORKSPACE_WAIT_S = 30.0
"""How long a retry waits for the previous attempt of a killed run to save its work and end."""


@dataclass(frozen=True)
class Registration:
    """Properties of a registered model version: see `register_version`."""

    bits_per_byte: float
    evaluation_text: str
    candidate: bool


@dataclass
class Stage:
    """A materialization in progress.

    output: empty directory for the artifact. scratch: folder that a resumed run finds again. upstream: manifests by
    asset. folders: the upstream's directories by asset.
    """

    context: dg.AssetExecutionContext
    experiment: str
    settings: ExperimentSettings
    config: dict[str, Any]
    output: Path
    scratch: Path
    upstream: dict[str, Manifest]
    tracked: TrackedRun
    check_interrupt: Callable[[], None]
    folders: Mapping[str, Path] = field(default_factory=dict)
    source: str = ""
    """Fingerprint of the stage's inputs other than its upstream."""
    most_latency_ratio: float = 0.0
    """Bound for a champion: see `Contest`."""
    after_publishing: Callable[[], None] = lambda: None
    """Called once the artifact is published."""
    last_observation_s: float = field(default_factory=time.monotonic)

    @property
    def asset(self) -> str:
        """The asset's name."""
        return self.context.asset_key.path[-1]

    @property
    def log(self) -> Log:
        """Writes progress to the run's log, and re-raises a termination that Python dropped."""

        def log(message: str) -> None:
            self.check_interrupt()
            self.context.log.info(message)

        return log

    def live(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics to MLflow, and every OBSERVATION_EVERY_S to the Dagster event log."""
        self.check_interrupt()
        self.tracked.log_metrics(metrics, step)
        now = time.monotonic()
        if now - self.last_observation_s >= OBSERVATION_EVERY_S:
            self.last_observation_s = now
            seen = ui_metadata.numbers({"step": step, **metrics})
            self.context.log_event(
                dg.AssetObservation(self.context.asset_key, partition=self.experiment, metadata=seen)
            )

    def result(
        self,
        metadata: Mapping[str, Any],
        checks: Sequence[dg.AssetCheckResult] = (),
        *,
        registration: Registration | None = None,
        certificates: Sequence[Mapping[str, Any]] = (),
        dataset: Path | None = None,
    ) -> dg.MaterializeResult[Staged]:
        """Seal the output and describe it; a version that fails a blocking check is published but not as the latest.

        registration: makes the artifact a version of the experiment's registered model, unless a blocking check failed;
        it and the champion are scored on the validation split of `dataset`. certificates: for the manifest.
        """
        missed = {
            severity: [check.check_name or "" for check in checks if not check.passed and check.severity == severity]
            for severity in dg.AssetCheckSeverity
        }
        failed = missed[dg.AssetCheckSeverity.ERROR]
        manifest = seal(
            self.output,
            asset=self.asset,
            experiment=self.experiment,
            config=self.config,
            code_version=code_version(self.context),
            upstream={name: upstream.content_hash for name, upstream in self.upstream.items()},
            mlflow_run_id=self.tracked.run_id,
            dagster_run_id=self.context.run.run_id,
            failed_checks=failed,
            warned_checks=missed[dg.AssetCheckSeverity.WARN],
            code=code_digest(self.asset),
            source=self.source,
            registration=dataclasses.asdict(registration) if registration else None,
            certificates=certificates,
        )
        self.tracked.failed = bool(failed)
        metadata = {**metadata, "step_peak_memory_mb": peak_memory_mb()}
        if registration and not failed:
            decision = self.tracked.register(
                model_name(self.experiment),
                self.output,
                asset=self.asset,
                content_hash=manifest.content_hash,
                contest=self._contest(self.output, dataset),
                objections=warned(manifest.warned_checks),
                **dataclasses.asdict(registration),
            )
            metadata |= ui_metadata.decision(decision)
        metadata |= self._add_measurements()
        self.tracked.release_files()
        self.tracked.log_final_metrics(
            {name: value for name, value in metadata.items() if isinstance(value, int | float)}
        )
        return dg.MaterializeResult(
            value=Staged(self.output, self.tracked.end_after, self.after_publishing),
            data_version=dg.DataVersion(manifest.content_hash),
            metadata={
                **metadata,
                "artifact_bytes": manifest.size,
                "config_hash": manifest.config_hash[:VERSION_DIGITS],
                "config": dg.MetadataValue.md(ui_metadata.fenced(to_yaml(self.settings), "yaml")),
                "mlflow_run": dg.MetadataValue.md(f"[{self.tracked.run_id[:8]} in MLflow]({self.tracked.url})"),
            },
            check_results=list(checks),
        )

    def _contest(self, model: Path, dataset: Path | None) -> Contest:
        compare = champion_comparison(model, dataset, self.settings) if dataset else None
        return Contest(compare, self.most_latency_ratio)

    def _add_measurements(self) -> dict[str, Any]:
        """Add what this artifact measures of a registered model to its evidence; returns the decision's metadata.

        The model's page gets the decision, too, as an observation.
        """
        measured = measured_model(self.asset, self.settings)
        if measured is None:
            return {}
        model, dataset = self.upstream[measured], self.folders.get("tokenized_dataset")
        decision = self.tracked.add_measurements(
            model_name(self.experiment),
            measured,
            model.content_hash,
            measurements(self.output, self.settings.evaluation.num_fewshot),
            self._contest(self.folders[measured], dataset),
        )
        shown = ui_metadata.decision(decision)
        if shown:
            tags = {"dagster/data_version": model.content_hash}
            self.context.log_event(
                dg.AssetObservation(dg.AssetKey(measured), partition=self.experiment, metadata=shown, tags=tags)
            )
        return shown


def peak_memory_mb() -> float:
    """Peak memory of this process plus the largest peak among its ended children, in megabytes.

    A step is a separate process; with one child at a time, this is an upper bound of its memory.
    """
    return round((peak_resident_bytes() + peak_resident_bytes(resource.RUSAGE_CHILDREN)) / 1e6, 1)


@contextmanager
def stage(
    context: dg.AssetExecutionContext,
    hydra: HydraConfig,
    mlflow: MlflowTracking,
    upstream: Mapping[str, Path] | None = None,
    *,
    resumable: bool = False,
    in_tasks: bool = False,
    exclusive: bool = False,
    fingerprint: Callable[[ExperimentSettings], str] | None = None,
) -> Iterator[Stage]:
    """Prepare one materialization; bad input becomes a permanent failure, an MLflow run ends with the right status.

    in_tasks: the stage starts tasks if `compute.engine` is ray; it is then resumable, as it finds their results again.
    exclusive: wait until no other exclusive stage runs on this machine (in this var/ folder).
    fingerprint: of the stage's inputs other than its upstream.
    """
    end_with_run()
    with (
        no_retry_after_termination(context),
        permanent_failures(),
        limits_as_error(scratch_dir()),
        noticed_interrupts() as check_interrupt,
    ):
        experiment, asset = context.partition_key, context.asset_key.path[-1]
        settings = hydra.settings(experiment)
        config = stage_config(settings, asset)
        manifests = {name: Manifest.read(path) for name, path in (upstream or {}).items()}
        assert_compatible(list(manifests.values()), settings, experiment, hydra.all_overrides)
        key = context.run.run_id
        resumable = resumable or (in_tasks and settings.compute.engine == "ray")
        if resumable:
            inputs = {name: manifest.content_hash for name, manifest in manifests.items()}
            key = config_hash({"config": config, "upstream": inputs, "code": code_version(context)})[:24]
        workspace = scratch_dir() / asset / experiment / key
        with (
            workspace_lock(workspace, experiment, asset) if resumable else nullcontext(),
            device_lock(context, exclusive),
        ):
            try:
                workspace.mkdir(parents=True, exist_ok=True)
                with mlflow.run(
                    context,
                    parent_run_id=_parent(manifests),
                    resume_run_id=_read(workspace / "mlflow_run_id"),
                    overrides=hydra.all_overrides,
                    description=settings.description,
                    upstream=manifests,
                ) as tracked:
                    (workspace / "mlflow_run_id").write_text(tracked.run_id)
                    tracked.log_params(flatten(config))
                    work = Stage(
                        context=context,
                        experiment=experiment,
                        settings=settings,
                        config=config,
                        output=_emptied(workspace / "artifact"),
                        scratch=workspace / "work",
                        upstream=manifests,
                        tracked=tracked,
                        check_interrupt=check_interrupt,
                        folders=upstream or {},
                        source=fingerprint(settings) if fingerprint else "",
                        most_latency_ratio=mlflow.champion_latency_ratio,
                    )
                    work.scratch.mkdir(exist_ok=True)
                    yield work
            finally:
                if not resumable:
                    shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def workspace_lock(workspace: Path, experiment: str, asset: str) -> Iterator[None]:
    """Lock a workspace that several runs may share; the lock ends with the process."""
    from filelock import FileLock, Timeout

    workspace.parent.mkdir(parents=True, exist_ok=True)
    # Beside the workspace and never deleted: a process waiting on a deleted file would not exclude one that re-creates
    # it.
    lock = FileLock(workspace.with_name(f".{workspace.name}.lock"))
    try:
        acquire(lock, WORKSPACE_WAIT_S)
    except Timeout:
        raise PipelineError(
            f"another run is making {asset} of {experiment!r} in {workspace}: wait for it or terminate it"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def device_lock(context: dg.AssetExecutionContext, exclusive: bool) -> Iterator[None]:
    """Hold the lock of the machine's cores and GPU.

    Waits as long as the holder works, and raises TransientError if it is stopped.
    A file lock instead of a Dagster pool's limit: a killed run keeps its pool slot forever unless a daemon frees it,
    and every later run would wait for that slot.
    """
    if not exclusive:
        yield
        return
    from filelock import FileLock, Timeout

    scratch_dir().mkdir(parents=True, exist_ok=True)
    lock = FileLock(scratch_dir() / ".device.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        context.log.info("waiting for another training, benchmark or export on this machine to end")
        acquire(lock, math.inf)
    try:
        yield
    finally:
        lock.release()


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _parent(manifests: Mapping[str, Manifest]) -> str | None:
    """The training run of a checkpoint, under which the runs of its derived artifacts are nested."""
    trained = manifests.get("trained_checkpoint")
    return trained.mlflow_run_id if trained else None
