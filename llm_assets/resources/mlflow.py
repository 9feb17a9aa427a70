"""One MLflow run per materialization; it ends with the status of the Dagster step.

The package dagster-mlflow is not used: it ends runs in an `atexit` handler and in a hook, and on MLflow 3 it
unregisters a different function than MLflow registered, so that a failed run is shown as FINISHED and a canceled one as
FAILED. Its conventions are kept: the tag `dagster_run_id`, and parameters logged in batches. Here every call goes
through an MlflowClient with an explicit run id: no active run, no exit handler, no autologging, and one place that ends
a run.

A killed process cannot end its MLflow run. The next run of the same asset and experiment closes a run that was left
RUNNING, and a resumed training continues its run.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import dagster as dg
from pydantic import Field

from llm_assets.artifacts.manifest import Manifest
from llm_assets.page_links import DAGSTER, MLFLOW, remember
from llm_assets.paths import var_dir
from llm_assets.registry import model_name
from llm_assets.resources.provenance import POINT_TAG, dagster_address, inputs, source_tags
from llm_assets.resources.tracked_run import TrackedRun, send_unsent
from llm_assets.resources.tracking_store import EXPERIMENT, open_store
from llm_assets.versions.promotion import CompareWithChampion, Contest, warned
from llm_assets.versions.register import add_measurements, is_registered
from model.progress import Log, silent

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NAME_CHARACTERS = 250
TRAINING_VIEW = "workflowType=machine_learning"
"""Without it, MLflow's UI opens its view for agents, which shows no training curves."""


class MlflowTracking(dg.ConfigurableResource):
    """The tracking store: SQLite and a folder below var/ by default, or a tracking server."""

    tracking_uri: str = Field(
        default="", description="MLflow tracking URI. Empty: MLFLOW_TRACKING_URI, else sqlite in var/mlflow.db."
    )
    experiment: str = Field(default=EXPERIMENT, description="MLflow experiment that all runs belong to.")
    ui_url: str = Field(
        default="",
        description="Address of the MLflow UI, for links. Empty: MLFLOW_UI_URL, else the server, else "
        "http://127.0.0.1:5000.",
    )
    champion_latency_ratio: float = Field(
        default=0.0,
        ge=0.0,
        description="Largest time per token with which a version may become champion, as a multiple of the champion's. "
        "0: no limit.",
    )

    @contextmanager
    def run(
        self,
        context: dg.AssetExecutionContext,
        *,
        parent_run_id: str | None = None,
        resume_run_id: str | None = None,
        overrides: Sequence[str] = (),
        description: str = "",
        upstream: Mapping[str, Manifest] | None = None,
    ) -> Iterator[TrackedRun]:
        """Open a run for this step, nested under `parent_run_id`, or continue `resume_run_id` if it still exists.

        description: of the experiment, for the run's page. upstream: artifacts that the run reads, its datasets.
        Ends it FINISHED, FAILED (any exception, `failed` set, or a generator that is closed before it ends) or KILLED
        (Dagster's termination, Ctrl-C).
        """
        client, experiment_id = self.client(context.log.info)
        unsent = var_dir() / "mlflow-unsent"
        send_unsent(client, unsent, context.log.info)
        asset, partition = context.asset_key.to_user_string(), context.partition_key
        tags = {
            "dagster_run_id": context.run.run_id,
            "dagster.root_run_id": context.run.root_run_id or context.run.run_id,
            "dagster.job": context.run.job_name,
            "dagster.asset": asset,
            "dagster.partition": partition,
            **source_tags(asset, partition, context.run.run_id, description),
        }
        point = [f"{context.run.tags[POINT_TAG]}:"] if POINT_TAG in context.run.tags else []
        name = " ".join([*point, *map(_without_group, overrides), partition, asset])[:_NAME_CHARACTERS]
        if overrides:
            tags["hydra.overrides"] = " ".join(overrides)
        if parent_run_id:
            tags["mlflow.parentRunId"] = parent_run_id
        run_id = _resumable(client, resume_run_id)
        if run_id:
            client.update_run(run_id, status="RUNNING")
            for key, value in tags.items():
                client.set_tag(run_id, key, value)
        else:
            run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        self._close_abandoned(context, client, experiment_id, run_id)
        url = f"{self._ui_address()}/#/experiments/{experiment_id}/runs/{run_id}?{TRAINING_VIEW}"
        tracked = TrackedRun(client, run_id, url, context.log.warning, unsent=unsent, log=context.log.info)
        context.log.info(f"MLflow run: {url}")
        remember(MLFLOW, self._ui_address())
        remember(DAGSTER, dagster_address())
        if upstream:
            tracked.log_inputs(inputs(upstream))
        try:
            yield tracked
        except BaseException as error:
            tracked.end_after(error)
            raise
        tracked.end_after(None)

    def register_again(
        self,
        context: dg.AssetExecutionContext,
        manifest: Manifest,
        path: Path,
        compare: CompareWithChampion | None = None,
    ) -> None:
        """Register a published model that the registry lost or never got; does nothing if it is registered.

        compare: with the champion, if there is a text.
        """
        name, tags = model_name(manifest.experiment), dict(manifest.registration or {})
        client, _ = self.client(context.log.info)
        if not is_registered(client, name, manifest.asset, manifest.content_hash):
            with self.run(context) as tracked:
                tracked.register(
                    name,
                    path,
                    asset=manifest.asset,
                    content_hash=manifest.content_hash,
                    contest=self.contest(compare),
                    objections=warned(manifest.warned_checks),
                    **tags,
                )

    def contest(self, compare: CompareWithChampion | None) -> Contest:
        """How a version is measured against the champion, within this resource's bound on latency."""
        return Contest(compare, self.champion_latency_ratio)

    def measure_again(
        self,
        context: dg.AssetExecutionContext,
        model: Manifest,
        found: Mapping[str, str],
        compare: CompareWithChampion | None = None,
    ) -> None:
        """Record measurements of a registered model that the registry lost: see `add_measurements`."""
        client, _ = self.client(context.log.info)
        add_measurements(
            client,
            model_name(model.experiment),
            model.asset,
            model.content_hash,
            found,
            contest=self.contest(compare),
            log=context.log.info,
        )

    def client(self, log: Log = silent) -> tuple["MlflowClient", str]:
        """A client whose store is ready, and the experiment's id. An experiment deleted in MLflow's page is restored.

        See `open_store`.
        """
        return open_store(self._uri(), self.experiment, log)

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
        """Mark the RUNNING runs of dead processes KILLED: earlier attempts of this step, and steps of ended runs."""
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


def _without_group(override: str) -> str:
    """`seed=1` of `training.seed=1`: the table of runs shows the first 16 characters of a name."""
    option, equals, value = override.partition("=")
    return option.rpartition(".")[2] + equals + value


def _resumable(client: "MlflowClient", run_id: str | None) -> str | None:
    """The run to continue, or None if it was deleted or belongs to another tracking store."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    return run_id if run.info.lifecycle_stage == "active" else None
