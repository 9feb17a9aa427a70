"""A pipeline of two tiny assets on the real resources: SQLite tracking, folders, Hydra files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from filelock import FileLock

from llm_assets.artifacts.io_manager import ArtifactDirectory, DirectoryIOManager
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.stage.once import reuses_unchanged
from llm_assets.stage.stage import Registration, Stage, stage
from model.settings import ExperimentSettings

COMMON: dict[str, Any] = {
    "partitions_def": dg.StaticPartitionsDefinition(["smoke", "stdlib"]),
    "dagster_type": ArtifactDirectory,
    "io_manager_key": "artifacts",
    "code_version": "1",
}


class Pipeline:
    """`corpus` and `tokenized_dataset` with bodies that a test replaces."""

    def __init__(self, mlflow: MlflowTracking) -> None:
        self.mlflow, self.hydra, self.artifacts = mlflow, HydraConfig(), DirectoryIOManager()
        self.instance = dg.DagsterInstance.ephemeral()
        self.bodies: dict[str, Callable[[Stage], Any]] = {}
        self.resumable = self.exclusive = False
        self.reuses = False
        self.retries = 0
        self.tags: dict[str, str] = {}
        self.code_version = "1"
        self.experiment, self.source, self.outdated = "smoke", "", ""
        self.registration: Registration | None = None

    def run(self, *names: str) -> dg.ExecuteInProcessResult:
        """Materialize the named assets, or both; an error in one is a failed result."""
        names = names or ("corpus", "tokenized_dataset")
        assets = {"corpus": self._corpus(), "tokenized_dataset": self._tokenized_dataset()}
        return dg.materialize(
            list(assets.values()),
            selection=dg.AssetSelection.assets(*[assets[name] for name in names]),
            partition_key=self.experiment,
            tags=self.tags,
            instance=self.instance,
            resources={"artifacts": self.artifacts, "hydra": self.hydra, "mlflow": self.mlflow},
            raise_on_error=False,
        )

    def tracked(self, asset: str) -> list[Any]:
        """The MLflow runs of an asset, newest first."""
        client, experiment_id = self.mlflow.client()
        return list(client.search_runs([experiment_id], f"tags.`dagster.asset` = '{asset}'"))

    def _write(self, work: Stage, default: str) -> tuple[list[dg.AssetCheckResult], dict[str, Any]]:
        body = self.bodies.get(work.asset)
        returned = body(work) if body else None
        if not any(work.output.iterdir()):
            (work.output / "data.txt").write_text(default)
        return (returned if isinstance(returned, list) else []), {"characters": 3}

    def fingerprint(self, settings: ExperimentSettings) -> str:
        return self.source

    def _once(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        fingerprint = self.fingerprint if compute.__name__ == "corpus" else None
        return reuses_unchanged(fingerprint, lambda path, arguments: self.outdated)(compute) if self.reuses else compute

    def _corpus(self) -> dg.AssetsDefinition:
        @dg.asset(
            **COMMON | {"code_version": self.code_version},
            check_specs=[dg.AssetCheckSpec("is_good", asset="corpus", blocking=True)],
            retry_policy=dg.RetryPolicy(max_retries=self.retries),
        )
        @self._once
        def corpus(
            context: dg.AssetExecutionContext, hydra: HydraConfig, mlflow: MlflowTracking
        ) -> Iterator[dg.MaterializeResult]:
            with stage(
                context, hydra, mlflow, fingerprint=self.fingerprint, resumable=self.resumable, exclusive=self.exclusive
            ) as work:
                checks, metadata = self._write(work, "one")
                checks = checks or [dg.AssetCheckResult(check_name="is_good", passed=True)]
                yield work.result(metadata, checks, registration=self.registration)

        return corpus

    def _tokenized_dataset(self) -> dg.AssetsDefinition:
        @dg.asset(**COMMON)
        @self._once
        def tokenized_dataset(
            context: dg.AssetExecutionContext, hydra: HydraConfig, mlflow: MlflowTracking, corpus: Path
        ) -> Iterator[dg.MaterializeResult]:
            with stage(context, hydra, mlflow, {"corpus": corpus}) as work:
                _, metadata = self._write(work, "tokens of " + (corpus / "data.txt").read_text())
                yield work.result(metadata)

        return tokenized_dataset


@pytest.fixture(scope="session")
def opened_at_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[int]]:
    """One database for all tests of a worker, as making its tables takes seconds: its URI, and how the two processes
    ended that opened it when it was not there. The first worker makes it, the others copy it.
    """
    folder = tmp_path_factory.mktemp("mlflow")
    made = (folder.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "fresh-mlflow"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            unfinished = folder / "unfinished"
            unfinished.mkdir()
            uri = f"sqlite:///{unfinished / 'mlflow.db'}"
            program = f"from llm_assets.resources.mlflow import MlflowTracking; MlflowTracking(tracking_uri={uri!r})"
            processes = [subprocess.Popen([sys.executable, "-c", f"{program}.client()"]) for _ in range(2)]
            (unfinished / "statuses.json").write_text(json.dumps([process.wait() for process in processes]))
            unfinished.rename(made)
    copy = shutil.copytree(made, folder / "copy")
    return f"sqlite:///{copy / 'mlflow.db'}", json.loads((copy / "statuses.json").read_text())


@pytest.fixture(scope="session")
def tracking_uri(opened_at_once: tuple[str, list[int]]) -> str:
    return opened_at_once[0]


@pytest.fixture
def mlflow(tracking_uri: str, request: pytest.FixtureRequest) -> MlflowTracking:
    return MlflowTracking(tracking_uri=tracking_uri, experiment=request.node.name)


@pytest.fixture
def var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_ASSETS_VAR", str(tmp_path / "var"))
    monkeypatch.delenv("LLM_ASSETS_ARTIFACTS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "var"


@pytest.fixture
def pipeline(mlflow: MlflowTracking, var: Path) -> Pipeline:
    return Pipeline(mlflow)
