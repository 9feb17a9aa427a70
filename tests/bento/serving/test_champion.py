"""The service follows the champion: a real server, a real registry, and requests that never stop coming."""

import asyncio
import gc
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
import pytest
from bentoml.exceptions import InvalidArgument

from bento.serving.champion import ChampionWatcher, ModelRegistry, Version
from bento.serving.models import Models
from model.errors import PipelineError
from model.generation.engine import Engine
from tests.bento.running_service import GREEDY, Server, serve
from tests.bento.serving.registry import Registered, mlflow_server, save_version
from tests.bento.test_lifecycle import Asking, running, wait_until
from tests.support.tiny import tiny_model, tiny_tokenizer

NAME = "rex-tiny"


@dataclass
class Stack:
    """A service that started before there was any champion, its registry, and three models with what they write."""

    server: Server
    registered: Registered
    directories: list[Path]
    texts: list[str]

    def version(self) -> str | None:
        (model,) = httpx.get(f"{self.server.url}/v1/models").json()["data"]
        assert model["id"] == NAME
        return model["version"]

    def wait_for_version(self, version: str) -> None:
        wait_until(lambda: self.version() == version)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("champion")
    directories = [folder / name for name in ("first", "second", "broken")]
    texts = [
        save_version(directory, seed=seed, vocab_size=size)
        for seed, (directory, size) in enumerate(zip(directories, (280, 270, 280), strict=True))
    ]
    assert len(set(texts)) == 3
    with (
        mlflow_server(folder) as uri,
        serve(
            folder,
            None,
            is_ready=False,
            REX_CHAMPION=NAME,
            MLFLOW_TRACKING_URI=uri,
            REX_CHAMPION_POLL_S="0.2",
            REX_STEP="reference",  # a long answer takes seconds there
        ) as server,
    ):
        yield Stack(server, Registered(uri, NAME), directories, texts)


@pytest.mark.e2e
def test_without_a_champion_the_service_is_alive_and_reports_the_reason(stack):
    wait_until(lambda: "waiting for one" in stack.server.log)
    assert httpx.get(f"{stack.server.url}/livez").status_code == 200
    assert httpx.get(f"{stack.server.url}/readyz").status_code == 503
    refusal = stack.server.ask()
    assert refusal.status_code == 503 and f"no champion of '{NAME}'" in refusal.json()["error"]["message"]
    assert stack.version() is None
    assert stack.registered.promote(stack.directories[0]) == "1"
    stack.server.wait_until_ready()
    assert stack.version() == "1"
    assert stack.server.ask(ignore_eos=True).json()["text"] == stack.texts[0]
    assert stack.server.log.count("waiting for one") == 1


@dataclass
class Load:
    """Closed-loop clients, some of them streaming, until the end of the block."""

    url: str
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)
    is_over: bool = False

    async def _ask_again(self, client: httpx.AsyncClient, **body: object) -> None:
        while not self.is_over:
            answer = await client.post("/v1/completions", json={**GREEDY, "ignore_eos": True, "model": NAME, **body})
            if "stream" in body:
                lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
                text = "".join(httpx.Response(200, text=line).json()["choices"][0]["text"] for line in lines)
                self.answers[answer.status_code, text if answer.text.endswith("[DONE]\n\n") else "cut"] += 1
            else:
                text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
                self.answers[answer.status_code, text] += 1

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            await asyncio.gather(*(self._ask_again(client, **body) for body in ({}, {}, {"stream": True})))

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        self._thread.join(60)


@pytest.mark.e2e
def test_a_promotion_under_load_loses_no_request_and_running_requests_finish_on_their_model(stack):
    first, second = stack.texts[:2]
    long = Asking(stack.server, max_tokens=2000, ignore_eos=True)
    wait_until(lambda: running(stack.server) >= 1)
    with Load(stack.server.url) as load:
        wait_until(lambda: load.answers[200, first] > 5)
        assert stack.registered.promote(stack.directories[1]) == "2"
        stack.wait_for_version("2")
        wait_until(lambda: load.answers[200, second] > 5)
    assert set(load.answers) == {(200, first), (200, second)}
    assert long.result().status_code == 200
    assert long.result().json()["text"].startswith(first)
    assert long.result().json()["usage"]["generated_tokens"] == 2000
    wait_until(lambda: "the former version 1 has ended" in stack.server.log)
    metrics = stack.server.metrics()
    assert metrics[f'rex_model_info{{model="{NAME}",version="2"}}'] == 1
    assert f'rex_model_info{{model="{NAME}",version="1"}}' not in metrics
    assert metrics["rex_generation_tokens_total"] >= 2000 + 8 * load.answers.total()


@pytest.mark.e2e
def test_a_version_that_cannot_be_loaded_is_one_line_and_the_former_one_stays(stack):
    weights = stack.directories[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"evil")
    assert stack.registered.promote(stack.directories[2]) == "3"
    wait_until(lambda: "version 3" in stack.server.log)
    time.sleep(1)  # several more questions
    said = [line for line in stack.server.log.splitlines() if "version 3" in line]
    assert len(said) == 1 and "model.safetensors was altered" in said[0]
    assert stack.version() == "2"
    assert stack.server.ask(ignore_eos=True).json()["text"] == stack.texts[1]


@pytest.mark.e2e
def test_the_alias_goes_back_and_the_service_with_it(stack):
    stack.registered.point_to("1")
    stack.wait_for_version("1")
    assert stack.server.ask(ignore_eos=True).json()["text"] == stack.texts[0]
    assert "Traceback" not in stack.server.log


class Shelf:
    """A registry that returns the versions that a test puts into it."""

    def __init__(self) -> None:
        self.now: Version | None = None
        self.error: Exception | None = None

    def champion(self, name: str) -> Version | None:
        if self.error:
            raise self.error
        return self.now

    def download(self, name: str, version: Version, folder: Path) -> Path:
        return folder


@pytest.fixture
def follower(caplog):
    caplog.set_level("INFO")
    shelf, models, waits, engines = Shelf(), Models(NAME), [], []

    def load(folder: Path, version: str) -> Engine:
        if version == "bad":
            raise PipelineError("no weights")
        tokenizer = tiny_tokenizer()
        engine = Engine(tiny_model(tokenizer), tokenizer, max_batch_size=1)
        engines.append(weakref.ref(engine._step))
        return engine

    made = ChampionWatcher(
        shelf, NAME, models, load=load, after_release=gc.collect, on_wait=waits.append, poll_s=0.01, drain_s=30
    )  # fmt: skip
    made.start()
    yield shelf, models, waits, engines
    made.stop()
    models.stop()


@pytest.mark.medium
def test_a_former_model_is_kept_for_its_requests_and_then_freed(follower):
    shelf, models, _, engines = follower
    shelf.now = Version("1", "")
    wait_until(lambda: models.current is not None)
    with models.hold() as held:
        shelf.now = Version("2", "")
        wait_until(lambda: models.current.version == "2")
        assert held.version == "1" and held.engine.is_alive
        held.engine.warm_up()
    del held
    wait_until(lambda: engines[0]() is None)
    assert engines[1]() is not None and models.current.engine.is_alive
    assert models.stats().generated_tokens_total == 1


def test_an_unreachable_server_is_polled_again_and_logged_once(follower, caplog):
    shelf, models, waits, _ = follower
    wait_until(lambda: bool(waits))
    shelf.error = httpx.ConnectError("connection refused")
    wait_until(lambda: "connection refused" in waits[-1])
    shelf.now, shelf.error = Version("bad", ""), None
    wait_until(lambda: "cannot be loaded: no weights" in waits[-1])
    shelf.now = Version("1", "")
    wait_until(lambda: models.current is not None)
    assert caplog.text.count("connection refused") == caplog.text.count("no weights") == 1


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "mlflow:5000"])
def test_only_a_server_can_be_followed(uri):
    with pytest.raises(InvalidArgument, match=r"^MLFLOW_TRACKING_URI is"):
        ModelRegistry(uri, {})


def test_files_outside_the_model_are_refused(tmp_path, monkeypatch):
    registry = ModelRegistry("http://127.0.0.1:1", {})

    def listing(name: str, version: Version, path: str, folder: Path) -> None:
        (folder / path).write_text('{"files": {"../../evil": {}}}')

    monkeypatch.setattr(registry, "_fetch", listing)
    with pytest.raises(PipelineError, match=r"'\.\./\.\./evil', which is outside"):
        registry.download(NAME, Version("1", "file:///somewhere/model"), tmp_path)
