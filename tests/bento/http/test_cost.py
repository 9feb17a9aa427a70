"""What a body may cost is bounded before it is parsed, and long work takes turns off the event loop."""

import asyncio
import copy
import json
import os
import sys
import threading
import time
from typing import Any

import pytest

from bento.errors import ApiError
from bento.http.body import MAX_DEPTH, MAX_NAMES, MAX_VALUES, check_cost, parse
from bento.serving.heavy import NICE, HeavyWork, encode_in_parts, rest
from tests.bento.openai_service import refusal, running_service

COSTLY = {
    "fields": json.dumps({f"field{i}": 1 for i in range(MAX_NAMES + 1)}),
    "lists": "[" + ",".join(["[]"] * (MAX_NAMES + 1)) + "]",
    "objects": "[" + ",".join(["{}"] * (MAX_NAMES + 1)) + "]",
    "numbers": "[" + ",".join(["1"] * (MAX_VALUES + 2)) + "]",
    "texts": "[" + ",".join(['""'] * (MAX_VALUES + 2)) + "]",
    "escaped texts": "[" + ",".join(['"\\\\"'] * (2 * MAX_VALUES)) + "]",
    "depth": "[" * (MAX_NAMES + 10) + "]" * (MAX_NAMES + 10),
    "a text that hides them": '{"a": "' + '\\"' * 20_000 + '", "b": [' + ",".join(["[]"] * (MAX_NAMES + 1)) + "]}",
}


@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY.keys())
def test_a_body_of_many_values_is_refused_before_it_is_parsed(body, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ApiError, match="more than") as caught:
        parse(body.encode())
    assert caught.value.status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 'f(a[0], {\'b\': "c"}, [[[{{{\\" ' * 20_000},
        {"prompt": [[7] * 1000] * 64},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 1000},
        {"logit_bias": {str(i): 1.0 for i in range(1024)}, "prompt": 'x"\\' * 10_000},
        {"prompt": "\\" * 10_001},
    ],
    ids=["code", "ids", "messages", "biases", "backslashes"],
)
def test_large_bodies_that_people_send_are_within_the_bounds(body):
    for text in (json.dumps(body), json.dumps(body, indent=1)):
        check_cost(text.encode())
        assert parse(text.encode()) == body


def test_depth_keeps_its_own_refusal():
    with pytest.raises(ApiError, match="nested"):
        parse(b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2))


def test_a_costly_body_is_refused_over_http():
    with running_service(max_body_bytes=1 << 20) as service:
        for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize"):
            error = refusal(service.post(path, **json.loads(COSTLY["fields"])))
            assert error["code"] == "too_many_values"


def test_heavy_work_runs_one_piece_at_a_time_beside_the_event_loop():
    running, most, loop_thread = 0, 0, threading.get_ident()
    lock = threading.Lock()

    def piece(number: int) -> int:
        nonlocal running, most
        assert threading.get_ident() != loop_thread
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        return number

    async def play() -> list[int]:
        heavy = HeavyWork()
        return await asyncio.gather(*(heavy.run(piece, number) for number in range(8)))

    assert asyncio.run(play()) == list(range(8))
    assert most == 1


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_only_work_that_releases_the_lock_has_a_low_priority():
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def play() -> list[int]:
        heavy = HeavyWork()
        return [await heavy.run(priority), await heavy.run(priority, holds_lock=False), await heavy.run(priority)]

    own = priority()
    assert asyncio.run(play()) == [own, max(own, NICE), own]


def test_a_failure_of_heavy_work_is_the_callers_and_the_next_piece_runs():
    async def play() -> bytes:
        heavy = HeavyWork()
        with pytest.raises(ApiError):
            await heavy.run(parse, b"{")
        return await heavy.run(bytes, 3)

    assert asyncio.run(play()) == bytes(3)


def test_long_work_rests_for_longer_than_it_works_and_other_threads_never_do(monkeypatch):
    def work(seconds: float) -> tuple[float, float]:
        """Seconds that it took, and those of them that it computed."""
        began, computed = time.monotonic(), time.thread_time()
        while time.thread_time() - computed < seconds:
            rest()
        return time.monotonic() - began, time.thread_time() - computed

    async def play() -> tuple[float, float]:
        return await HeavyWork().run(work, 0.1)

    took_s, computed_s = asyncio.run(play())
    assert took_s > 2 * computed_s
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it slept"))
    work(0.02)


def test_many_short_texts_are_tokenized_off_the_event_loop_and_keep_their_order():
    loop_thread: list[int] = []
    encoded_in: set[int] = set()
    texts = [f"text {number} " * 40 for number in range(300)]
    with running_service(max_body_bytes=1 << 20) as service:
        encode = service.engine.encode

        def noting(text: str) -> list[int]:
            encoded_in.add(threading.get_ident())
            return encode(text)

        service.engine.encode = noting  # type: ignore[method-assign]

        @service.app.middleware("http")
        async def note_thread(request, call_next):
            loop_thread.append(threading.get_ident())
            return await call_next(request)

        body = {"input": texts, "truncate_prompt_tokens": 2}
        vectors = [one["embedding"] for one in service.post("/v1/embeddings", **body).json()["data"]]
        assert encoded_in and not encoded_in & set(loop_thread)
        for number in (0, 299):
            (alone,) = service.post("/v1/embeddings", **{**body, "input": texts[number]}).json()["data"]
            assert vectors[number] == pytest.approx(alone["embedding"], abs=1e-4)
        asked = {"prompt": texts[:64], "max_tokens": 1, "truncate_prompt_tokens": 5, "return_token_ids": True}
        choices = service.post("/v1/completions", **asked).json()["choices"]
        assert [choice["prompt_token_ids"] for choice in choices] == [encode(text)[-5:] for text in texts[:64]]


@pytest.mark.parametrize(
    "value",
    [
        {"choices": [{"logprobs": {"top_logprobs": [{"é\n": -1e-07, '"': 1e22}, None, {}], "tokens": []}, "n": True}]},
        [[[[[[[{"deeper": [1, 2.5, "x"]}]]]]]]],
        {}, [], "text", 3, None, {"a": {}, "b": [[]]},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_encoded_in_parts_equals_plain_json(value: Any) -> None:
    encoded = encode_in_parts(copy.deepcopy(value))
    assert json.loads(encoded) == value and b", " not in encoded
