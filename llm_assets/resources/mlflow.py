"""One MLflow run per materialization, with the terminal status that the Dagster step had.

The package dagster-mlflow is not used: it ends runs in an `atexit` handler and in a hook, and on MLflow 3 it unregisters
another function than the one that MLflow registered, so that a failed run reads FINISHED and a canceled one FAILED. Its
conventions are kept: the tag `dagster_run_id`, and parameters logged in batches. Here every call goes through an
MlflowClient with an explicit run id: no active run, no exit handler, no autologging, and one place that ends a run.

A killed process cannot say so. The next run of the same asset and experiment closes what it left RUNNING, and a resumed
training continues its MLflow run.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import dagster as dg
from pydantic import Field

from llm_assets.paths import var_dir
from model.progress import Log

if TYPE_CHECKING:
    from mlflow import MlflowClient

_BATCH = 100  # MLflow's limit of parameters in one call
_VALUE_CHARACTERS = 6000  # and of a parameter's length


class TrackedRun:
    """An open MLflow run. Once it is open, a failure to log is a warning: tracking must not end a training."""

    def __init__(self, client: "MlflowClient", run_id: str, url: str, warn: Log) -> None:
        self._client, self._warn = client, warn
        self.run_id, self.url, self.failed = run_id, url, False
        self._ended = False

    def end_after(self, error: BaseException | None) -> None:
        """End the run, the first time this is called: KILLED after a termination, FAILED after another error."""
        if self._ended:
            return
        self._ended = True
        status = "FAILED" if error or self.failed else "FINISHED"
        if isinstance(error, dg.DagsterExecutionInterruptedError | KeyboardInterrupt):
            status = "KILLED"
        with self.tolerated(f"status {status}"):
            self._client.set_terminated(self.run_id, status)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at `step`."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        entities = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        with self.tolerated("metrics"):
            self._client.log_batch(self.run_id, metrics=entities)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters; long values are cut to MLflow's limit."""
        from mlflow.entities import Param

        entities = [Param(name, str(value)[:_VALUE_CHARACTERS]) for name, value in params.items()]
        with self.tolerated("parameters"):
            for start in range(0, len(entities), _BATCH):
                self._client.log_batch(self.run_id, params=entities[start : start + _BATCH])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or a folder's content."""
        with self.tolerated(path.name):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def register(
        self, name: str, model_dir: Path, *, asset: str, bits_per_byte: float, evaluation_text: str, candidate: bool
    ) -> None:
        """Register a model directory as a version of `name`; the best candidate gets the alias `champion`.

        candidate: whether this is the kind of model that is served, full precision or quantized: a quantized model never
        beats the one it was made from. evaluation_text identifies the text that the bits per byte were measured on: of the
        candidates with the same text the best is champion; where the champion has another, the new version takes over.
        The version holds its own copy of the directory: the artifact store keeps only the newest versions, and a
        tracking server refuses local paths.
        """
        from mlflow.exceptions import MlflowException

        client = self._client
        with self.tolerated("model version"):
            client.log_artifacts(self.run_id, str(model_dir), "model")
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            tags = {"asset": asset, "bits_per_byte": repr(bits_per_byte), "evaluation_text": evaluation_text}
            source = f"{client.get_run(self.run_id).info.artifact_uri}/model"
            client.create_model_version(name, source, self.run_id, tags=tags, await_creation_for=0)
            if candidate:
                rivals = [
                    version
                    for version in client.search_model_versions(f"name = '{name}'")
                    if version.tags.get("asset") == asset and _evaluation_text(version.tags) == evaluation_text
                ]
                best = min(rivals, key=lambda version: (float(version.tags["bits_per_byte"]), -int(version.version)))
                client.set_registered_model_alias(name, "champion", best.version)

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Turn an error of the tracking store into a warning."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a tracking store raises
            self._warn(f"MLflow did not take the {what}: {str(error).splitlines()[0] if str(error) else error!r}")


class MlflowTracking(dg.ConfigurableResource):
    """Where runs are tracked: SQLite and a folder below var/ by default, or a tracking server."""

    tracking_uri: str = Field(
        default="", description="MLflow tracking URI. Empty: MLFLOW_TRACKING_URI, else sqlite in var/mlflow.db."
    )
    experiment: str = Field(default="rex", description="MLflow experiment that all runs belong to.")
    ui_url: str = Field(
        default="",
        description="Address of the MLflow UI, for links. Empty: MLFLOW_UI_URL, else the server, else "
        "http://127.0.0.1:5000.",
    )

    @contextmanager
    def run(
        self,
        context: dg.AssetExecutionContext,
        *,
        parent_run_id: str | None = None,
        resume_run_id: str | None = None,
    ) -> Iterator[TrackedRun]:
        """Open a run for this step, nested under `parent_run_id`, or continue `resume_run_id` where it still exists.

        Ends it FINISHED, FAILED (any exception, `failed` set, or a generator that is closed before it ends) or KILLED
        (Dagster's termination, Ctrl-C).
        """
        client, experiment_id = self.client()
        asset, partition = context.asset_key.to_user_string(), context.partition_key
        tags = {
            "dagster_run_id": context.run.run_id,
            "dagster.root_run_id": context.run.root_run_id or context.run.run_id,
            "dagster.job": context.run.job_name,
            "dagster.asset": asset,
            "dagster.partition": partition,
        }
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        run_id = _resumable(client, resume_run_id)
        if run_id:
            client.update_run(run_id, status="RUNNING")
            for key, value in tags.items():
                client.set_tag(run_id, key, value)
        else:
            run_id = client.create_run(experiment_id, tags=tags, run_name=f"{partition} {asset}").info.run_id
        self._close_abandoned(context, client, experiment_id, run_id)
        url = f"{self._ui_address()}/#/experiments/{experiment_id}/runs/{run_id}"
        tracked = TrackedRun(client, run_id, url, context.log.warning)
        context.log.info(f"MLflow run: {url}")
        try:
            yield tracked
        except BaseException as error:
            tracked.end_after(error)
            raise
        tracked.end_after(None)

    def client(self) -> tuple["MlflowClient", str]:
        """A client whose store is ready, and the experiment's id.

        Two processes that open a fresh SQLite file at once race in its migrations and one dies, hence the lock.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from filelock import FileLock
        from mlflow import MlflowClient

        uri = self._uri()
        lock = var_dir() / "mlflow.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        artifacts = None
        if uri.startswith("sqlite:///"):
            lock = Path(uri.removeprefix("sqlite:///") + ".lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            artifacts = (lock.parent / "mlartifacts").as_uri()
        with FileLock(lock):
            client = MlflowClient(uri, uri)
            found = client.get_experiment_by_name(self.experiment)
            experiment_id = (
                found.experiment_id if found else client.create_experiment(self.experiment, artifact_location=artifacts)
            )
        return client, experiment_id

    def _uri(self) -> str:
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{var_dir() / 'mlflow.db'}"

    def _ui_address(self) -> str:
        address = self.ui_url or os.environ.get("MLFLOW_UI_URL")
        if not address and urlparse(self._uri()).scheme in ("http", "https"):
            address = self._uri()
        return (address or "http://127.0.0.1:5000").rstrip("/")

    def _close_abandoned(
        self, context: dg.AssetExecutionContext, client: "MlflowClient", experiment_id: str, run_id: str
    ) -> None:
        """Mark KILLED what dead processes left RUNNING: earlier tries of this step, and steps of ended Dagster runs."""
        asset, partition = context.asset_key.to_user_string(), context.partition_key
        left = client.search_runs(
            [experiment_id],
            f"attributes.status = 'RUNNING' and tags.`dagster.asset` = '{asset}' "
            f"and tags.`dagster.partition` = '{partition}'",
        )
        for run in left:
            if run.info.run_id == run_id:
                continue
            dagster_run = context.instance.get_run_by_id(run.data.tags.get("dagster_run_id", ""))
            here = dagster_run is not None and dagster_run.run_id == context.run.run_id
            if here or (dagster_run is not None and dagster_run.is_finished):
                client.set_terminated(run.info.run_id, "KILLED")


def _resumable(client: "MlflowClient", run_id: str | None) -> str | None:
    """The run to continue, or None where it was deleted or belongs to another tracking store."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def _evaluation_text(tags: Mapping[str, str]) -> str | None:
    """The tag `evaluation_text` of a model version, or its name in older versions, `yardstick`."""
    return tags.get("evaluation_text", tags.get("yardstick"))
