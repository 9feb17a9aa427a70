"""How the real server starts, ends and recovers: keys, open addresses, SIGTERM under load, a killed worker."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.bento.running_service import GREEDY, Server, command, environment, save_long_model, serve
from tests.e2e.workplace import free_port
from tests.support.native import needs_native

pytestmark = pytest.mark.e2e
KEYS = {"LLM_API_KEYS": "first-key, second-key", "REX_CORS_ORIGINS": "https://app.example"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_long_model(directory)
    return directory


class Asking(threading.Thread):
    """A request in the background, and what became of it."""

    def __init__(self, server: Server, **body: object) -> None:
        super().__init__(daemon=True)
        self.body, self.url = {**GREEDY, **body}, server.url
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = httpx.post(f"{self.url}/generate", json=self.body, timeout=60)

    def result(self) -> httpx.Response:
        self.join(60)
        assert self.answer is not None, "the request was never answered"
        return self.answer


def wait_until(is_so: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(server: Server) -> float:
    return server.metrics()["rex_num_requests_running"]


def test_sigterm_lets_running_requests_finish_and_answers_new_ones_503(model_dir, tmp_path):
    with serve(tmp_path, model_dir, REX_STEP="reference") as server:  # 400 tokens take a while there
        plain, stream = Asking(server, max_tokens=400), Asking(server, max_tokens=400, stream=True)
        wait_until(lambda: running(server) == 2)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        late = server.ask()
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert int(late.headers["retry-after"]) >= 1
        assert plain.result().status_code == 200
        assert plain.result().json()["usage"]["generated_tokens"] == 400
        events = stream.result().text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["finish_reason"] == "length"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log


def test_after_the_grace_period_the_rest_is_cancelled_with_a_clear_error(model_dir, tmp_path):
    with serve(tmp_path, model_dir, REX_DRAIN_TIMEOUT_S="0.5", REX_STEP="reference") as server:
        plain, stream = Asking(server, max_tokens=8000), Asking(server, max_tokens=8000, stream=True)
        wait_until(lambda: running(server) == 2)
        server.process.send_signal(signal.SIGTERM)
        assert plain.result().status_code == 503
        assert plain.result().json()["error"]["code"] == "stopped"
        events = stream.result().text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "stopped"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log


def test_a_worker_that_is_killed_comes_back(model_dir, tmp_path):
    with serve(tmp_path, model_dir) as server:
        before = server.worker()
        before.kill()
        wait_until(lambda: not before.is_running() or before.status() == "zombie")
        wait_until(lambda: any("--fd" in one.cmdline() for one in _children(server)))
        server.wait_until_ready()
        assert server.worker().pid != before.pid
        assert server.ask().status_code == 200


def _children(server: Server) -> list:
    import psutil

    return [one for one in psutil.Process(server.process.pid).children() if one.status() != "zombie"]


def test_with_keys_every_route_but_health_wants_one_and_no_key_or_prompt_is_logged(model_dir, tmp_path):
    with serve(tmp_path, model_dir, **KEYS) as server, server.client() as client:
        for path in ("/livez", "/readyz", "/healthz", "/readyz/", "/livez//"):
            assert client.get(path).status_code == client.head(path).status_code == 200
            wrong = client.post(path)
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
            assert wrong.json()["error"]["code"] == "http_405"
        for path in ("/metrics", "/v1/models", "/nothing", "/schema.json", "/docs.json", "/static_content/index.css"):
            answer = client.get(path)
            assert answer.status_code == 401, path
        refused = client.post(
            "/generate", json=GREEDY, headers={"Authorization": "Bearer guessed-key", "Origin": "https://app.example"}
        )
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            answer = client.post(
                "/generate", json={**GREEDY, "prompt": "private words"}, headers={"Authorization": f"Bearer {key}"}
            )
            assert answer.status_code == 200
            record = f"id={answer.headers['x-request-id']} "
            wait_until(lambda record=record: record in server.log)  # written after the answer
        for secret in ("first-key", "second-key", "guessed-key", "private"):
            assert secret not in server.log


def start_and_end(folder: Path, model_dir: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("--port", str(free_port()), *options),
        cwd=folder,
        env=environment(folder, REX_MODEL=str(model_dir), **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_open_address_without_a_key_ends_the_start_in_one_line(model_dir, tmp_path):
    done = start_and_end(tmp_path, model_dir, "--host", "0.0.0.0")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    for part in ("0.0.0.0", "LLM_API_KEYS", "REX_ALLOW_ANONYMOUS"):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LLM_API_KEYS_FILE", "/nowhere/keys"), ("LLM_API_KEYS", "s e c r e t"), ("REX_CORS_ORIGINS", "example.org")],
)
def test_wrong_keys_and_origins_end_the_start_in_one_line(model_dir, tmp_path, variable, value):
    done = start_and_end(tmp_path, model_dir, "--host", "127.0.0.1", **{variable: value})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert variable in done.stderr
    assert "s e c r e t" not in done.stderr


@needs_native
def test_a_draft_model_is_loaded_and_changes_no_text(model_dir, tmp_path):
    answers = []
    for draft in ("", str(model_dir)):
        folder = tmp_path / ("with" if draft else "without")
        folder.mkdir()
        with serve(folder, model_dir, REX_DRAFT=draft) as server, server.client() as client:
            answers.append(client.post("/generate", json=GREEDY).json()["text"])
            assert ("a step of the draft model takes" in server.log) == bool(draft)
    assert answers[0] == answers[1]


def test_a_draft_model_that_is_missing_or_has_another_tokenizer_ends_the_start_in_one_line(model_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    found = json.loads((other / "tokenizer.json").read_text())
    found["model"]["vocab"] = {name: (id_ ^ 1 if id_ > 99 else id_) for name, id_ in found["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(found))
    for draft, expected in ((other, "has another tokenizer"), (tmp_path / "none", "there is no")):
        done = start_and_end(tmp_path, model_dir, "--host", "127.0.0.1", REX_DRAFT=str(draft))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and expected in done.stderr and str(draft) in done.stderr


def test_an_upload_that_is_not_complete_does_not_hold_up_the_end(model_dir, tmp_path):
    with serve(tmp_path, model_dir, REX_STEP="reference") as server:  # 400 tokens take a while there
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
        body = json.dumps(GREEDY).encode()
        with socket.create_connection(address, timeout=60) as upgrading:
            upgrading.sendall(head % (len(body), offer) + body)
            assert upgrading.recv(12) == b"HTTP/1.1 200"  # so BentoML's worker runs our protocol
        with (
            socket.create_connection(address, timeout=60) as idle,
            socket.create_connection(address, timeout=60) as upload,
        ):
            idle.sendall(b"GET /v1/mod")
            upload.sendall(head % (len(body), b"") + body[:5])
            generating = Asking(server, max_tokens=400)
            wait_until(lambda: running(server) == 1)
            server.process.send_signal(signal.SIGTERM)
            answer = b""
            while chunk := upload.recv(65536):
                answer += chunk
            assert answer.startswith(b"HTTP/1.1 503")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "draining"
            assert generating.result().json()["usage"]["generated_tokens"] == 400
            assert server.process.wait(30) == 0
        assert "Traceback" not in server.log
        assert "requests are canceled" not in server.log
