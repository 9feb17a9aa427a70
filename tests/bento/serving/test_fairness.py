"""One client's many texts beside another's few, through the real routes."""

import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from bento.http.auth import ApiKeyMiddleware
from model.generation.requests import GenerationRequest
from model.generation.turns import Turns
from tests.bento.conftest import make_service

BODY = {"prompt": "x", "max_tokens": 3, "temperature": 0}


def client_of(service, *, name: str = "testclient", port: int = 1, key: str | None = None) -> TestClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(service.app, client=(name, port), headers=headers)


@pytest.fixture
def served(monkeypatch) -> list[GenerationRequest]:
    """The requests in the order in which they got a slot. On a busy machine answers overtake each other afterwards."""
    requests: list[GenerationRequest] = []
    remove = Turns.remove

    def noted(self, generation, *, was_served):
        if was_served:
            requests.append(generation.request)
        remove(self, generation, was_served=was_served)

    monkeypatch.setattr(Turns, "remove", noted)
    return requests


def in_order_of_answers(service, asks: list[tuple[TestClient, dict[str, Any]]]) -> list[int]:
    """Send one after the other while nothing is computed; which were answered first."""
    done: list[int] = []
    statuses: list[int] = []
    service.close_gate()

    def ask(number: int, client: TestClient, body: dict[str, Any]) -> None:
        statuses.append(client.post("/v1/completions", json=body).status_code)
        done.append(number)

    threads = []
    expected = 0
    for number, (client, body) in enumerate(asks):
        expected += body.get("n", 1)
        threads.append(threading.Thread(target=ask, args=(number, client, body)))
        threads[-1].start()
        # At least: a request that leaves the queue for its slot is in neither for a moment.
        while (now := service.engine.stats()).waiting + now.running < expected:
            pass
    service.opened.set()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * len(asks)
    return done


@pytest.fixture
def service():
    made = make_service(max_queue=64)
    yield made
    made.opened.set()
    made.engine.stop()


def test_a_request_with_many_texts_delays_another_client_by_one_of_them(service, served):
    crowd = client_of(service, name="10.0.0.1"), {**BODY, "n": 16}
    other = client_of(service, name="10.0.0.2"), BODY
    assert sorted(in_order_of_answers(service, [crowd, other])) == [0, 1]
    assert [request.client for request in served] == ["10.0.0.1", "10.0.0.2", *["10.0.0.1"] * 15]


def test_connections_of_one_address_take_turns(service, served):
    crowd = client_of(service, port=1), {**BODY, "n": 16}
    other = client_of(service, port=2), BODY
    assert sorted(in_order_of_answers(service, [crowd, other])) == [0, 1]
    connections = [request.connection for request in served]
    assert connections[1] != connections[0] and set(connections[2:]) == {connections[0]}


def test_a_request_with_many_texts_is_answered_beside_many_single_ones(service):
    singles = [(client_of(service, port=number), BODY) for number in range(20)]
    crowd = client_of(service, port=99), {**BODY, "n": 16}
    assert sorted(in_order_of_answers(service, [*singles, crowd])) == list(range(21))


def test_one_client_is_served_in_the_order_of_its_requests(service, served):
    mine = [(client_of(service), {**BODY, "max_tokens": number + 1}) for number in range(6)]
    assert sorted(in_order_of_answers(service, mine)) == list(range(6))
    assert [request.max_tokens for request in served] == [1, 2, 3, 4, 5, 6]


def test_with_keys_a_client_is_identified_by_its_key_from_any_address():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["state"]["api_key"])

    import asyncio

    guarded = ApiKeyMiddleware(app, keys=["a", "b"])
    for key, host in (("a", "1"), ("a", "2"), ("b", "1")):
        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "client": (host, 1)}
        asyncio.run(guarded(scope, None, None))  # type: ignore[arg-type]
    assert seen[0] == seen[1] != seen[2]
    assert seen[0] != "a"  # a digest: keys are not kept


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_twenty_prompts_or_texts_are_answered_with_the_default_queue(path):
    service = make_service(max_queue=128)
    service.engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    wanted = {"messages": [{"role": "user", "content": "x"}], "n": 20} if "chat" in path else {"prompt": ["x"] * 20}
    answer = client_of(service).post(path, json={**wanted, "max_tokens": 2})
    service.engine.stop()
    assert len(answer.json()["choices"]) == 20
