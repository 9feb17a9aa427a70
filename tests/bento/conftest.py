"""A tiny model behind the routes, without a server."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from bento.api import create_app
from model.generation.engine import Engine
from model.modeling_rex import RexForCausalLM
from tests.model.generation.engines import StepHook
from tests.support.tiny import tiny_model, tiny_tokenizer

MAX_BODY_BYTES = 4096
TIMEOUT_S = 60.0


@dataclass
class Service:
    """The app, its engine, and a gate that holds the model at its next step while it is closed."""

    app: FastAPI
    engine: Engine
    model: RexForCausalLM
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def __post_init__(self) -> None:
        self.opened.set()
        StepHook(self.engine, before=self._wait)

    def close_gate(self) -> None:
        self.reached.clear()
        self.opened.clear()

    def _wait(self, segments: object) -> None:
        self.steps += 1
        self.reached.set()
        assert self.opened.wait(30)


def make_service(*, request_timeout_s: float = TIMEOUT_S, max_queue: int = 2, seed: int = 0, **options: Any) -> Service:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, seed=seed)
    limits = {
        "request_timeout_s": request_timeout_s,
        "max_body_bytes": MAX_BODY_BYTES,
        "clamp_max_tokens": False,
        **options,
    }
    app = create_app(model_name="rex-tiny:1", **limits)
    # Random weights stop anywhere, and lengths are to be known.
    engine = Engine(model, tokenizer, max_batch_size=1, max_queue=max_queue, end_of_text_ids=frozenset())
    app.state.models.serve(engine)
    return Service(app, engine, model)


@pytest.fixture(scope="session", autouse=True)
def bentoml_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the stores of the user who runs them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(tmp_path_factory.mktemp("bentoml")))
        patch.setenv("BENTOML_DO_NOT_TRACK", "True")
        yield


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = make_service()
    yield made
    made.engine.stop()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(service.app) as made:
        yield made
    service.opened.set()
