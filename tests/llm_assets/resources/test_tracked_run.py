"""Logging to a real tracking server that stops answering, dies and comes back."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llm_assets.resources import tracked_run, tracking_store
from llm_assets.resources.tracked_run import TrackedRun, send_unsent
from model.errors import PipelineError

pytestmark = [pytest.mark.processes, pytest.mark.slow]


class Server:
    """`mlflow server` with one worker, in a separate process group."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--workers",
            "1",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "files")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, start_new_session=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            assert self.process.poll() is None
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
                return
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracked_run, "RETRY_EVERY_S", 0.2)
    return MlflowClient(server.uri, server.uri)


def losses(client: Any, run_id: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, "loss")]


def test_a_training_does_not_wait_for_a_server_that_hangs(server: Server, client: Any) -> None:
    warnings: list[str] = []
    run = TrackedRun(client, client.create_run("0").info.run_id, "", warnings.append)
    run.log_metrics({"loss": 9.0}, 0)
    server.signal(signal.SIGSTOP)
    try:
        for step in range(1, 200):
            run.log_metrics({"loss": 1.0}, step)  # each would wait for 2 s
        while not run._messages:
            time.sleep(0.05)
    finally:
        server.signal(signal.SIGCONT)
    run.end_after(None)
    assert losses(client, run.run_id) == list(range(200))
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "it is kept and sent once the store answers" in warnings[0]
    assert warnings[-1] == "MLflow answers again: the kept entries are being sent"


def test_a_stage_waits_for_a_server_that_starts_again_and_not_forever(
    server: Server, client: Any, var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_store, "ASK_EVERY_S", 0.1)
    lines: list[str] = []

    def start_again(line: str) -> None:
        lines.append(line)
        server.start()

    server.kill()
    _, experiment = tracking_store.open_store(server.uri, "Default", start_again)
    assert experiment == "0"
    assert lines == [f"the tracking store {server.uri} does not answer: waiting 120 s for it"]
    server.kill()
    monkeypatch.setattr(tracking_store, "ANSWER_WAIT_S", 0.5)
    with pytest.raises(PipelineError, match=rf"^the tracking store {server.uri} cannot be used: .* repair it"):
        tracking_store.open_store(server.uri, "Default")
    server.start()


def test_what_a_dead_server_did_not_get_is_sent_by_the_next_run(
    server: Server, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracked_run, "FINAL_WAIT_S", 0.5)
    warnings: list[str] = []
    run = TrackedRun(client, client.create_run("0").info.run_id, "", warnings.append, unsent=tmp_path / "unsent")
    server.kill()
    (tmp_path / "report.md").write_text("the report")
    run.log_metrics({"loss": 1.0}, 7)
    run.log_params({"training.seed": 3})
    run.log_artifact(tmp_path / "report.md")
    run.end_after(None)
    (tmp_path / "report.md").unlink()
    assert "entries are kept in" in warnings[-1]
    lines: list[str] = []
    send_unsent(client, tmp_path / "unsent", lines.append)
    assert "did not accept the entries" in lines[0] and list((tmp_path / "unsent").glob("*.jsonl"))
    server.start()
    send_unsent(client, tmp_path / "unsent", lines.append)
    sent = client.get_run(run.run_id)
    assert losses(client, run.run_id) == [7]
    assert (sent.data.params, sent.info.status) == ({"training.seed": "3"}, "FINISHED")
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["report.md"]
    assert not list((tmp_path / "unsent").iterdir())


def test_what_the_store_refuses_for_good_is_dropped_with_a_warning(client: Any) -> None:
    warnings: list[str] = []
    run = TrackedRun(client, client.create_run("0").info.run_id, "", warnings.append)
    run.log_params({"seed": 1})
    run.log_params({"seed": 2})  # MLflow keeps the first value
    run.log_metrics({"loss": 1.0}, 3)
    run.end_after(None)
    assert losses(client, run.run_id) == [3]
    assert [warning.startswith("MLflow did not accept the parameters") for warning in warnings] == [True]
