"""When the service takes no requests, what it says then, and how it drains."""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.testclient import TestClient

from bento.api import create_app
from bento.serving.admission import Admission
from bento.serving.models import Models, Served
from model.generation.requests import EngineStats
from tests.bento.conftest import make_service
from tests.bento.running_service import GREEDY
from tests.support.tiny import save_tiny_model


@dataclass
class Engine:
    is_alive: bool = True
    is_ready: bool = True
    step_name: str = "reference"
    precision: str = "float32"

    def stats(self) -> EngineStats:
        return EngineStats(*[0] * 10)


def refusal(**state: Any) -> dict[str, Any]:
    app = create_app(model_name="m", request_timeout_s=1, max_body_bytes=100)
    if engine := state.pop("engine", None):
        app.state.models.serve(engine)
    for name, value in state.items():
        setattr(app.state.admission, name, value)
    client = TestClient(app)
    answer = client.post("/generate", json=GREEDY)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert client.get("/openapi.json").status_code == 200
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "server_error"
    assert f'rex_requests_rejected_total{{reason="{error["code"]}"}} 1.0' in client.get("/metrics").text
    return error


def test_each_state_without_a_place_has_its_own_503():
    assert refusal()["code"] == "loading"
    assert refusal(has_failed=True)["code"] == "stopped"
    assert refusal(engine=Engine(is_alive=False))["code"] == "stopped"
    assert refusal(engine=Engine(), is_draining=True)["code"] == "draining"


def test_a_request_that_waits_too_long_is_503_and_was_never_started():
    service = make_service(queue_timeout_s=0.2)
    answers = []
    with TestClient(service.app) as client:
        service.close_gate()
        first = threading.Thread(target=lambda: client.post("/generate", json={**GREEDY, "max_tokens": 4}))
        first.start()
        assert service.reached.wait(30)
        second = threading.Thread(target=lambda: answers.append(client.post("/generate", json=GREEDY)))
        second.start()
        second.join(1)
        service.opened.set()
        first.join(30)
        second.join(30)
    service.engine.stop()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "queue_timeout"
    assert answers[0].headers["retry-after"]


async def drained(under_way: int, timeout_s: float) -> list[str]:
    """What happened: the last request ends 0.1 s after it was canceled."""
    admission, happened = Admission(Models("m")), []
    admission.under_way = under_way

    async def end() -> None:
        await asyncio.sleep(0.1)
        admission.under_way = 0

    async def cancel() -> None:
        happened.append("cancelled")
        happened.append(asyncio.create_task(end()).get_name() and "ended")

    await admission.drain(timeout_s, cancel)
    assert admission.is_draining
    assert admission.refusal() is not None
    assert admission.under_way == 0
    return happened


def test_draining_waits_for_the_last_request_and_cancels_after_the_grace_period():
    assert asyncio.run(drained(0, 60)) == []
    assert asyncio.run(drained(2, 0.1)) == ["cancelled", "ended"]


@pytest.mark.parametrize(
    ("engine", "ready", "alive"),
    [
        (None, False, True),
        (Engine(), True, True),
        (Engine(is_ready=False), False, True),
        (Engine(False, False), False, False),
    ],
    ids=["loading", "serving", "restarting", "dead"],
)
def test_readiness_follows_the_engine_and_liveness_fails_only_when_it_is_dead(
    tmp_path, monkeypatch, engine, ready, alive
):
    monkeypatch.setenv("REX_MODEL", str(save_tiny_model(tmp_path)))
    from bento.service import RexService, app

    service = object.__new__(RexService.inner)
    monkeypatch.setattr(app.state.models, "current", engine and Served(engine))
    assert asyncio.run(service.__is_ready__()) is ready
    assert asyncio.run(service.__is_alive__()) is alive
    monkeypatch.setattr(app.state.admission, "is_draining", True)
    assert asyncio.run(service.__is_ready__()) is False
    assert asyncio.run(service.__is_alive__()) is alive
