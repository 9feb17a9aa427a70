"""The routes: what they answer, what they refuse, and what happens when the client leaves or time is up."""

import asyncio
import json
import logging
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from bento.api import create_app
from model.generation.steps.step import Segment
from tests.bento.conftest import MAX_BODY_BYTES, Service, make_service
from tests.model.generation.engines import StepHook
from tests.support.tiny import CONTEXT

GREEDY = {"prompt": "def main", "max_tokens": 8, "temperature": 0}


def events(text: str) -> list[Any]:
    """The data of server-sent events, JSON parsed but for the closing [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]


def metric(client: TestClient, line: str) -> float:
    found = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0


def test_generate_answers_text_usage_and_model(client):
    answer = client.post("/generate", json=GREEDY)
    body = answer.json()
    assert answer.status_code == 200
    assert set(body) == {"text", "finish_reason", "usage", "model"}
    assert body["finish_reason"] == "length" and body["model"] == "rex-tiny:1"
    used = body["usage"]
    assert used["generated_tokens"] == 8
    assert used["total_tokens"] == used["prompt_tokens"] + 8


def test_a_stream_gives_the_same_text_in_pieces_then_usage_then_done(client):
    request = {**GREEDY, "temperature": 0.9, "seed": 4, "max_tokens": 40}
    whole = client.post("/generate", json=request).json()
    answer = client.post("/generate", json={**request, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(answer.text)
    assert len(pieces) > 5
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert last == {"text": "", "finish_reason": "length", "usage": whole["usage"]}


def test_a_seed_makes_an_answer_reproducible(client):
    def ask(**options: Any) -> str:
        return client.post("/generate", json={"prompt": "x", "max_tokens": 30, **options}).json()["text"]

    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask() != ask()


def test_sampling_fields_reach_the_engine(client):
    greedy = client.post("/generate", json=GREEDY).json()["text"]
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert client.post("/generate", json={**GREEDY, "temperature": 1, **narrow}).json()["text"] == greedy
    assert client.post("/generate", json={**GREEDY, "repetition_penalty": 50.0}).json()["text"] != greedy


def test_without_max_tokens_the_answer_fills_the_context_at_most(client):
    used = client.post("/generate", json={"prompt": "x"}).json()["usage"]
    assert used["total_tokens"] == CONTEXT


def test_the_context_of_the_earlier_service_stands_before_the_prompt_on_its_own_line(service, client):
    given: list[list[int]] = []
    submit = service.engine.submit_all
    service.engine.submit_all = lambda requests, deliver: (
        given.extend(request.prompt_ids for request in requests) or submit(requests, deliver)
    )
    try:
        body = {"prompt": "b", "context": "a", "num_of_token_generated": 9}
        answer = client.post("/generate_text", json=body)
        client.post("/generate_text", json={"prompt": "b", "num_of_token_generated": 1})
        client.post("/generate_text_without_prompt", json={"num_of_token_generated": 1})
    finally:
        service.engine.submit_all = submit
    assert set(answer.json()) == {"generated_text"}
    assert given == [service.engine.encode("a\nb"), service.engine.encode("b"), [0]]


@pytest.mark.parametrize("route", ["/generate_text", "/generate_text_without_prompt"])
def test_the_earlier_routes_generate_exactly_the_requested_number_of_tokens(client, route, caplog):
    caplog.set_level(logging.INFO, "bentoml.requests")
    body = {"num_of_token_generated": 9} | ({"prompt": "b"} if route == "/generate_text" else {})
    assert client.post(route, json=body).status_code == 200
    assert " generated_tokens=9 " in caplog.text


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/generate", {"prompt": 5}, "prompt"),
        ("/generate", {"prompt": None}, "prompt"),
        ("/generate", {"prompt": ""}, "prompt"),
        ("/generate", {}, "prompt"),
        ("/generate", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": -3}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": CONTEXT}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": True}, "max_tokens"),
        ("/generate", {"prompt": "x", "max_tokens": "7"}, "max_tokens"),
        ("/generate", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/generate", {"prompt": "x", "temperature": float("nan")}, "temperature"),
        ("/generate", {"prompt": "x", "temperature": float("inf")}, "temperature"),
        ("/generate", {"prompt": "x", "temperature": "0.5"}, "temperature"),
        ("/generate", {"prompt": "x", "top_p": -0.1}, "top_p"),
        ("/generate", {"prompt": "x", "top_p": 1.01}, "top_p"),
        ("/generate", {"prompt": "x", "top_k": -2}, "top_k"),
        ("/generate", {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ("/generate", {"prompt": "x", "seed": -(2**63) - 1}, "seed"),
        ("/generate", {"prompt": "x", "seed": 2**63}, "seed"),
        ("/generate", {"prompt": "x", "stream": "yes"}, "stream"),
        ("/generate", {"prompt": "x", "color": "red"}, "color"),
        ("/generate", {"prompt": "x" * 500}, "prompt"),
        ("/generate", {"prompt": "x" * CONTEXT, "stream": True}, "prompt"),
        ("/generate_text", {"prompt": "x"}, "num_of_token_generated"),
        ("/generate_text", {"prompt": "x", "num_of_token_generated": 0}, "num_of_token_generated"),
        ("/generate_text", {"prompt": "x", "num_of_token_generated": 5000}, "num_of_token_generated"),
        ("/generate_text", {"prompt": "", "num_of_token_generated": 5}, "prompt"),
        ("/generate_text", {"prompt": "x", "context": 1, "num_of_token_generated": 5}, "context"),
        ("/generate_text_without_prompt", {"num_of_token_generated": 5000}, "num_of_token_generated"),
        ("/generate_text_without_prompt", {"prompt": "x", "num_of_token_generated": 5}, "prompt"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else str(value),
)
def test_a_bad_field_is_refused_and_named(client, route, body, param):
    content = json.dumps(body)  # httpx would refuse to send NaN
    answer = client.post(route, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    refusal = error(answer)
    assert refusal["type"] == "invalid_request_error"
    assert refusal["param"] == param
    assert param in refusal["message"]


def test_an_over_long_request_names_both_numbers_and_the_limit(client):
    message = error(client.post("/generate", json={"prompt": "x" * 50, "max_tokens": 70}))["message"]
    prompt = client.post("/generate", json={"prompt": "x" * 50, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert f" {prompt} tokens" in message and " 70 " in message and str(CONTEXT) in message


@pytest.mark.parametrize(
    ("content", "media"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[1, 2]", "application/json"),
        (b"null", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b"[" * 3000, "application/json"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (b'{"prompt": "x"}', "text/plain"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(client, content, media):
    answer = client.post("/generate", content=content, headers={"content-type": media})
    assert answer.status_code == 400
    assert error(answer)["type"] == "invalid_request_error"


def test_a_refusal_does_not_repeat_the_users_text(client):
    secret = "my secret words"
    for body in ({"prompt": [secret]}, {"prompt": secret, "max_tokens": CONTEXT}, {"prompt": secret, "context": 1}):
        assert secret not in client.post("/generate", json=body).text


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_413_however_it_is_sent(client, is_chunked):
    body = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()
    content = (body[start : start + 1000] for start in range(0, len(body), 1000)) if is_chunked else body
    answer = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert error(answer)["code"] == "body_too_large"
    assert f"{MAX_BODY_BYTES:,}" in answer.text


def test_a_wrong_method_has_the_same_shape_of_error(client):
    answer = client.get("/generate")
    assert answer.status_code == 405
    assert error(answer)["code"] == "http_405"


def test_before_the_model_is_loaded_requests_are_503():
    app = create_app(model_name="m", request_timeout_s=1, max_body_bytes=1000)
    answer = TestClient(app).post("/generate", json={"prompt": "x"})
    assert answer.status_code == 503
    assert error(answer)["code"] == "loading"
    assert TestClient(app).get("/metrics").status_code == 200


def test_a_stopped_engine_is_503():
    service = make_service()
    service.engine.stop()
    answer = TestClient(service.app).post("/generate", json={"prompt": "x"})
    assert answer.status_code == 503
    assert error(answer)["type"] == "server_error"


def explode(segments: list[Segment]) -> None:
    """Fail in every step but the one that asks whether the model works at all: a single token at the beginning."""
    if any(segment.start + len(segment.ids) > 1 for segment in segments):
        raise RuntimeError("internal detail")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_while_generating_is_500_without_its_cause(service, client, stream, caplog):
    handle = StepHook(service.engine, before=explode)
    answer = client.post("/generate", json={**GREEDY, "stream": stream})
    handle.remove()
    assert answer.status_code == 500
    assert error(answer)["code"] == "internal_error"
    assert "internal detail" not in answer.text
    assert "internal detail" in caplog.text
    assert client.post("/generate", json=GREEDY).status_code == 200


def test_a_failure_in_mid_stream_is_the_last_event(service, client):
    steps: list[None] = []

    def explode_later(segments: list[Segment]) -> None:
        steps.append(None)
        if len(steps) >= 3:  # later calls compute several tokens
            explode(segments)

    handle = StepHook(service.engine, before=explode_later)
    answer = client.post("/generate", json={**GREEDY, "max_tokens": 20, "stream": True})
    handle.remove()
    *pieces, last = events(answer.text)
    assert answer.status_code == 200 and pieces
    assert last["error"]["code"] == "internal_error"


def test_a_full_queue_is_429_with_retry_after(service, client):
    service.close_gate()
    answers: list[int] = []

    def ask() -> None:
        answers.append(client.post("/generate", json=GREEDY).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]  # one runs, two wait
    for thread in threads:
        thread.start()
    assert service.reached.wait(30)
    while service.engine.stats().waiting < 2:
        pass
    refused = client.post("/generate", json=GREEDY)
    service.opened.set()
    for thread in threads:
        thread.join(30)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert error(refused)["code"] == "queue_full"
    assert answers == [200, 200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_complete_in_time_is_504(stream):
    service = make_service(request_timeout_s=1e-6)
    answer = TestClient(service.app).post("/generate", json={**GREEDY, "stream": stream})
    service.engine.stop()
    assert answer.status_code == 504
    assert error(answer)["code"] == "timeout"


def call_and_leave(service: Service, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a request, disconnect once the model computes it, and return what was sent before the engine became idle."""
    sent: list[dict[str, Any]] = []

    async def play() -> None:
        has_body = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not has_body.is_set():
                has_body.set()
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await asyncio.to_thread(service.reached.wait, 30)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "query_string": b""}
        await asyncio.wait_for(service.app(scope, receive, send), 30)
        # Still in this event loop: closing it would end the generation as well.
        service.opened.set()
        while service.engine.stats().running:
            await asyncio.sleep(0.01)

    asyncio.run(play())
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(service, client, stream, caplog):
    caplog.set_level(logging.INFO, "bentoml.requests")
    service.close_gate()
    before = service.steps
    sent = call_and_leave(service, {**GREEDY, "max_tokens": 80, "stream": stream})
    assert service.steps - before == 1  # the one it was at
    assert client.post("/generate", json=GREEDY).status_code == 200
    assert sent[0]["status"] == 499  # the server around the app waits for an answer, even if no client reads it
    assert "status=499" in caplog.text and "finish_reason=cancelled" in caplog.text


def test_each_request_is_one_log_line_without_its_text(client, caplog):
    caplog.set_level(logging.INFO, "bentoml.requests")
    answer = client.post("/generate", json={**GREEDY, "prompt": "secret words"})
    client.post("/generate", json={"prompt": "secret words", "max_tokens": "secret words"})
    lines = [record.getMessage() for record in caplog.records if record.name == "bentoml.requests"]
    assert len(lines) == 2
    for part in (f"id={answer.headers['x-request-id']}", "route=/generate", "status=200", "generated_tokens=8"):
        assert part in lines[0]
    assert "status=400" in lines[1]
    assert "secret" not in caplog.text and answer.json()["text"] not in caplog.text


@pytest.mark.parametrize(
    ("given", "is_kept"), [("abc-1.2_3", True), ("x" * 65, False), ("a b", False), ("a;b=c", False)]
)
def test_a_plain_request_id_of_the_client_is_kept(client, given, is_kept):
    answer = client.post("/generate", json={"prompt": ""}, headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) is is_kept
    assert answer.headers["x-request-id"]


def test_metrics_count_by_route_and_status_and_do_not_grow_with_unknown_paths(client):
    client.post("/generate", json=GREEDY)
    before = len(client.get("/metrics").text.splitlines())
    for number in range(5):
        assert client.get(f"/nothing/{number}").status_code == 404
    lines = client.get("/metrics").text.splitlines()
    assert len(lines) <= before + 4
    assert any(line.startswith('rex_requests_total{finish_reason="-",route="other",status="404"}') for line in lines)
    assert metric(client, 'rex_requests_total{finish_reason="length",route="/generate",status="200"}') >= 1
    assert metric(client, "rex_time_to_first_token_seconds_count") >= 1
    assert metric(client, "rex_num_requests_running") == 0
