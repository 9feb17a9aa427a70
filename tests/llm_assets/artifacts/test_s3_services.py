"""Bentos and MLflow's files on a real S3 server, which is killed and paused in between."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_assets.artifacts.manifest import seal
from llm_assets.artifacts.store import ArtifactStore
from llm_assets.resources.bento_files import fetch, publish, published_tag
from llm_assets.resources.bentos import BentoBuilder
from llm_assets.resources.tracked_run import TrackedRun, send_unsent
from model.errors import PipelineError, TransientError
from tests.llm_assets.resources.test_bentos import SERVICE
from tests.support.s3 import answers, free_ports, wait_until_it_stores, with_s3

pytestmark = with_s3

READING = 'return prompt + __import__("pathlib").Path(self.model.path, "weights").read_text()'
WEIGHTS = "of the model" * 100_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[BentoBuilder, list[dict[str, Any]]]:
    """Two Bentos of one machine, each with a model."""
    place = tmp_path_factory.mktemp("builder")
    (place / "source" / "bento").mkdir(parents=True)
    (place / "source" / "bento" / "__init__.py").touch()
    service = SERVICE.replace("return prompt", READING)
    (place / "source" / "bento" / "service.py").write_text(service)
    builder = BentoBuilder(home=str(place / "home"), service="bento.service:Tiny", source_dir=str(place / "source"))
    bentos = []
    for version in ("first", "second"):
        (place / version).mkdir()
        (place / version / "weights").write_text(f"{version} {WEIGHTS}")
        builder.import_model(f"rex-smoke:{version}", place / version, {})
        bentos.append(builder.build_once("rex-smoke", labels={}, arguments={"model": f"rex-smoke:{version}"}))
    return builder, bentos


def fetched_by_command(store: ArtifactStore, tag: str, tmp_path: Path) -> str:
    """The version that `llm_assets.latest --bento` fetches for `make serve`, where BentoML's store is empty."""
    record = tmp_path / "record"
    record.mkdir()
    (record / "bento.json").write_text(json.dumps({"bento": tag}))
    options: dict[str, Any] = {"config": {}, "code_version": "1", "upstream": {}, "mlflow_run_id": None}
    seal(record, asset="packaged_bento", experiment="smoke", dagster_run_id="", **options)
    store.publish(record)
    environment = {**os.environ, "HOME": str(tmp_path / "third"), "LLM_ASSETS_VAR": str(tmp_path / "third" / "var")}
    environment |= {"LLM_ASSETS_ARTIFACTS": str(store.root), "BENTOML_HOME": str(tmp_path / "third" / "bentoml")}
    command = [sys.executable, "-m", "llm_assets.latest", "smoke", "--bento"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "third") and Path(done.stdout.strip()).is_dir()
    return Path(done.stdout.strip()).name


def is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
    except OSError:
        return False
    return True


def test_a_bento_of_one_machine_is_served_on_another(root, built, tmp_path, monkeypatch):
    builder, (first, second) = built
    store = ArtifactStore(root, tmp_path / "cache")
    publish(store, builder, first, "smoke", tmp_path / "files of first")
    publish(store, builder, first, "smoke", tmp_path / "not written: it is published")
    assert not (tmp_path / "not written: it is published").exists()
    publish(store, builder, second, "smoke", tmp_path / "files of second")
    elsewhere = ArtifactStore(root, tmp_path / "elsewhere" / "cache")
    with pytest.raises(
        PipelineError, match=rf"bento_files/smoke has {second['tag']}, expected {first['tag']}; package"
    ):
        fetch(elsewhere, first["tag"], "smoke")
    folder = fetch(elsewhere, second["tag"], "smoke")
    assert fetched_by_command(store, second["tag"], tmp_path) == folder.name
    (port,) = free_ports(1)
    environment = {
        **os.environ,
        "BENTOML_HOME": str(tmp_path / "elsewhere" / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    environment |= {"HOME": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-m", "bentoml", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        service = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not is_ready(port):  # the limit is the test's own
            assert "failed. Exiting" not in (tmp_path / "log").read_text()
            assert service.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/ask", json.dumps({"prompt": "? "}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert answer.read().decode() == f"? second {WEIGHTS}"
    finally:
        os.killpg(service.pid, signal.SIGTERM)
        service.wait(60)
    assert fetch(elsewhere, second["tag"], "smoke") == folder  # serving has changed none of its files


def test_a_server_that_dies_or_is_slow_publishes_no_half_of_a_bento(server, root, built, tmp_path, monkeypatch):
    builder, (first, second) = built
    store = ArtifactStore(root, tmp_path / "cache")
    publish(store, builder, first, "smoke", tmp_path / "files of first")
    put = store._write_text

    def die(*arguments: Any) -> None:
        server.kill()  # the Bento's files are there, its manifest is not
        put(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(store, "_write_text", die)
        with pytest.raises(TransientError, match="does not answer"):
            publish(store, builder, second, "smoke", tmp_path / "files of second")
    server.start()
    wait_until_it_stores()
    assert published_tag(store, "smoke") == first["tag"]
    assert fetch(ArtifactStore(root, tmp_path / "second"), first["tag"], "smoke").is_dir()
    slow = threading.Thread(target=server.pause, args=(8.0,))
    slow.start()
    publish(store, builder, second, "smoke", tmp_path / "files once more")
    slow.join()
    fetched = fetch(ArtifactStore(root, tmp_path / "third"), second["tag"], "smoke")
    assert (next(fetched.rglob("weights"))).read_text() == f"second {WEIGHTS}"


@pytest.fixture
def tracking(root: str, tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow server`, which keeps its files in S3."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        "--artifacts-destination",
        f"{root}/mlflow",
    ]
    environment = {**os.environ, "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    while not answers(f"{url}/health"):  # the limit is the test's own
        assert server.poll() is None, (tmp_path / "mlflow.log").read_text()[-3000:]
        time.sleep(0.2)
    yield url
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(60)


def test_mlflows_files_are_in_s3_and_wait_while_it_is_away(server, root, tracking, tmp_path, monkeypatch):
    import s3fs
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setattr("llm_assets.resources.tracked_run.FINAL_WAIT_S", 2.0)
    client, warnings, unsent = MlflowClient(tracking, tracking), [], tmp_path / "unsent"
    experiment = client.create_experiment("s3")

    def logged(name: str, text: str) -> str:
        """Log a file with a run of its own, as a stage does; returns the run."""
        run = client.create_run(experiment).info.run_id
        tracked = TrackedRun(client, run, "", warnings.append, unsent=unsent)
        (tmp_path / name).write_text(text)
        tracked.log_artifact(tmp_path / name)
        tracked.release_files()
        (tmp_path / name).unlink()  # published, and so moved
        tracked.end_after(None)
        return run

    there = logged("there.txt", "there")
    assert not warnings
    (stored,) = [name for name in s3fs.S3FileSystem().find(f"{root}/mlflow") if name.endswith("there.txt")]
    assert there in stored
    server.kill()
    away = logged("away.txt", "while it was away")
    assert any("kept" in line for line in warnings)
    server.start()
    wait_until_it_stores()
    send_unsent(client, unsent, warnings.append)
    assert not list(unsent.glob("*.jsonl"))
    slow = threading.Thread(target=server.pause, args=(5.0,))
    slow.start()
    late = logged("late.txt", "slow")
    slow.join()
    send_unsent(client, unsent, warnings.append)
    for run, name, text in (
        (there, "there.txt", "there"),
        (away, "away.txt", "while it was away"),
        (late, "late.txt", "slow"),
    ):
        assert Path(client.download_artifacts(run, name, str(tmp_path))).read_text() == text
        assert client.get_run(run).info.status == "FINISHED"
