"""Thousands of broken bodies: each has an answer in the one shape, and the engine is none the worse."""

import asyncio
import json
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, GOOD, Service, refusal, running_service

pytestmark = pytest.mark.medium

NAN, INFINITY = float("nan"), float("inf")
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, NAN, INFINITY, "", "x", "\0", "🦖", "x" * 999,
    "<|endoftext|>", [], [[]], [None], [1, "x"], [2], [[2], [3]], {}, {"a": {}}, {"2": 1}, {"role": "user"},
    [{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
]  # fmt: skip
FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "n",
    "best_of",
    "echo",
    "logprobs",
    "top_logprobs",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "seed",
    "stream",
    "stream_options",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "suffix",
    "user",
    "metadata",
    "tools",
    "response_format",
    "return_token_ids",
    "tokens",
    "context",
    "num_of_token_generated",
    "add_special_tokens",
    "return_token_strs",
    "store",
    "service_tier",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "bad_words",
    "allowed_token_ids",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "input",
    "dimensions",
    "encoding_format",
    "chat_template_kwargs",
    "text_1",
    "documents",
    "top_n",
    "no_such_field",
]


def broken_body(rng: random.Random, path: str) -> bytes:
    """A good body with some fields set to anything, or the bytes of one with some changed."""
    body = dict(GOOD[path])
    for _ in range(rng.choice((1, 1, 2, 4))):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.2:
        body.pop(rng.choice(list(body)))
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


def test_thousands_of_broken_bodies_are_refused_in_one_shape_and_the_engine_stays_well(caplog):
    good = {"prompt": "def main", "max_tokens": 16, "temperature": 0}
    with running_service(chat_template=CHAT_TEMPLATE) as service:
        alone = service.post("/v1/completions", **good).json()["choices"]
        statuses = asyncio.run(send_broken_bodies(service))
        assert statuses[400] > 2000 and statuses[200] > 100
        assert service.post("/v1/completions", **good).json()["choices"] == alone
        stats = service.engine.stats()
        assert service.engine.is_ready and stats.running == stats.waiting == stats.restarts_total == 0
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def send_broken_bodies(service: Service) -> Counter[int]:
    rng = random.Random(20)
    statuses: Counter[int] = Counter()
    transport = httpx.ASGITransport(service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for _ in range(4000):
            path = rng.choice(list(GOOD))
            content = broken_body(rng, path)
            answer = await client.post(path, content=content, headers={"content-type": "application/json"})
            statuses[answer.status_code] += 1
            if answer.status_code != 200:
                assert answer.status_code in (400, 404), (path, content, answer.text)
                refusal(answer, answer.status_code)
    return statuses
