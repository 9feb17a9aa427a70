"""The answers to requests that vLLM does not take or fails on, over a process that speaks its protocol."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from bento.api import create_app
from model.generation.vllm.engine import VllmEngine
from tests.bento.openai_service import MAX_BODY_BYTES, MODEL, refusal
from tests.model.generation.vllm.stand_in import CRASH, FAILS, GARBLED, REFUSED
from tests.support.tiny import save_tiny_model

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    made = create_app(model_name=MODEL, request_timeout_s=60, max_body_bytes=MAX_BODY_BYTES)
    model_dir = save_tiny_model(tmp_path_factory.mktemp("model"))
    engine = VllmEngine(model_dir, python=Path(sys.executable), worker="tests.model.generation.vllm.stand_in")
    made.state.models.serve(engine)
    engine.warm_up()
    yield made
    engine.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"prompt": [REFUSED, 5]}, 400, "unsupported_value", "vLLM refuses the request: too bad"),
        ({"prompt": [5], "temperature": 3}, 400, "unsupported_value", "temperature is 3: the engine vllm takes 0 to 2"),
        ({"prompt": [FAILS, 5]}, 500, "internal_error", "generating failed: the server's log has the reason"),
        ({"prompt": [GARBLED, 5]}, 500, "internal_error", "generating failed: the server's log has the reason"),
    ],
)
def test_each_kind_of_failure_has_its_own_code(
    app: FastAPI, body: dict, stream: bool, status: int, code: str, message: str
) -> None:
    answer = TestClient(app).post("/v1/completions", json={"max_tokens": 3, "stream": stream, **body})
    error = refusal(answer, status)
    assert error["code"] == code and error["message"].startswith(message)
    assert error["type"] == ("invalid_request_error" if status == 400 else "server_error")


def test_features_of_our_own_engine_alone_are_unsupported_values(app: FastAPI) -> None:
    error = refusal(TestClient(app).post("/v1/embeddings", json={"input": "a"}))
    assert error["code"] == "unsupported_value" and "embedding: the engine vllm does not offer it" in error["message"]


def test_a_form_of_the_text_holds_and_a_wrong_one_is_refused_as_ever(app: FastAPI) -> None:
    client = TestClient(app)
    said = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 9, "guided_regex": "(yes|no)!"}).json()
    assert said["choices"][0]["text"] in ("yes!", "no!")
    error = refusal(client.post("/v1/completions", json={"prompt": "a", "guided_regex": "("}))
    assert error["code"] == "invalid_grammar"


def test_a_process_that_ends_fails_its_request_then_the_service_answers_again_and_at_last_stops(app: FastAPI) -> None:
    client = TestClient(app)
    for message in ("the engine died: it restarts, try again", "the engine died"):
        error = refusal(client.post("/v1/completions", json={"prompt": [CRASH], "max_tokens": 3}), 500)
        assert (error["code"], error["message"]) == ("internal_error", message)
        if "again" in message:
            assert client.post("/v1/completions", json={"prompt": [5], "max_tokens": 3}).status_code == 200
    error = refusal(client.post("/v1/completions", json={"prompt": [5], "max_tokens": 3}), 503)
    assert error["code"] == "stopped"
