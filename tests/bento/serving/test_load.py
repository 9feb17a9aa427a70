"""Many requests at once against the real server: nothing is lost, nothing leaks, no request's text changes."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from model.text.tokenizer import token_bytes
from tests.bento.running_service import GREEDY, Server, save_long_model, serve

pytestmark = pytest.mark.e2e
SLOTS, QUEUE = 8, 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, *save_long_model(directory)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Server]:
    limits = {"REX_MAX_BATCH_SIZE": str(SLOTS), "REX_MAX_QUEUE": str(QUEUE)}
    with serve(tmp_path_factory.mktemp("server"), model[0], **limits) as running:
        yield running


async def ask_all(server: Server, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    async with server.async_client() as client:
        return await asyncio.gather(*(client.post("/generate", json={**GREEDY, **body}) for body in bodies))


def gauges(server: Server) -> dict[str, float]:
    names = (
        "rex_num_requests_running",
        "rex_num_requests_waiting",
        "rex_num_tokens_waiting",
        "rex_kv_cache_usage_perc",
    )
    metrics = server.metrics()
    return {name: metrics[name] for name in names}


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 30
    while any(gauges(server).values()):
        assert time.monotonic() < deadline, gauges(server)
        time.sleep(0.1)


def test_after_a_storm_of_disconnects_the_next_client_is_answered_and_no_slot_leaks(server):
    async def leave(number: int) -> None:
        body = json.dumps({**GREEDY, "max_tokens": 4000, "stream": number % 2 == 0}).encode()
        address = httpx.URL(server.url)
        _, writer = await asyncio.open_connection(address.host, address.port)
        head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await asyncio.sleep(0.5)
        writer.close()

    async def storm() -> None:
        await asyncio.gather(*(leave(number) for number in range(200)))

    assert server.ask(max_tokens=500).json()["usage"]["generated_tokens"] == 500  # none would have ended by itself
    asyncio.run(storm())
    answer = server.ask()
    assert answer.status_code == 200
    wait_until_idle(server)
    metrics = server.metrics()
    assert metrics["rex_requests_cancelled_total"] >= SLOTS
    left = 'rex_requests_total{finish_reason="cancelled",route="/generate",status="%d"}'
    # 200 where a stream had begun, 499 where the client was gone.
    assert metrics.get(left % 200, 0) + metrics[left % 499] == 200


def test_neighbors_change_another_requests_text(server, model):
    _, reference, tokenizer = model
    pieces = token_bytes(tokenizer)
    prompts = ["def main", "return 'größer", "日本語 🦖", "x", "print(" * 40]
    greedy = [{"prompt": prompt, "max_tokens": 20 + 9 * i} for i, prompt in enumerate(prompts)]
    sampled = [
        {"temperature": 0.8, "seed": 1, "max_tokens": 60},
        {"temperature": 1.0, "top_k": 9, "seed": 2, "max_tokens": 50},
        {"temperature": 1.2, "top_p": 0.7, "seed": 3, "max_tokens": 40},
        {"temperature": 0.9, "repetition_penalty": 1.3, "seed": 4, "max_tokens": 30},
        {"temperature": 0.0, "repetition_penalty": 1.3, "max_tokens": 30},
    ]
    alone = [server.ask(**body).json()["text"] for body in sampled]
    together = asyncio.run(ask_all(server, [*greedy, *sampled] * 4))
    assert [answer.status_code for answer in together] == [200] * 40
    texts = [answer.json()["text"] for answer in together]
    for first in range(0, 40, 10):
        assert texts[first + 5 : first + 10] == alone
    for body, text in zip(greedy, texts, strict=False):
        ids = tokenizer(body["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        all_ids = reference.generate(
            ids, do_sample=False, max_new_tokens=body["max_tokens"], eos_token_id=tokenizer.eos_token_id
        )
        new = [token for token in all_ids[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        assert text == b"".join(pieces[token] for token in new).decode("utf-8", "replace")


def test_a_soak_leaves_memory_flat(server):
    async def rounds(count: int) -> None:
        async with server.async_client() as client:
            for number in range(count):
                posts = [
                    client.post("/generate", json={**GREEDY, "prompt": f"{number} {i} " * 8, "max_tokens": 12})
                    for i in range(16)
                ]
                leaving = [
                    client.post("/generate", json={**GREEDY, "max_tokens": 2000}, timeout=0.05) for _ in range(4)
                ]
                answers = await asyncio.gather(*posts, *leaving, return_exceptions=True)
                assert all(one.status_code == 200 for one in answers[:16])

    worker = server.worker()
    asyncio.run(rounds(10))  # caches fill, allocators grow to their working size
    before = worker.memory_info().rss
    threads, files = worker.num_threads(), worker.num_fds()
    asyncio.run(rounds(25))
    grown = worker.memory_info().rss - before
    wait_until_idle(server)
    assert grown < 16 << 20, f"{grown:,} bytes after 500 more requests"
    assert worker.num_threads() <= threads + 2
    assert worker.num_fds() <= files + 4


def test_at_ten_times_the_capacity_every_request_is_answered(model, tmp_path):
    slots, places = 2, 4
    with serve(tmp_path, model[0], REX_MAX_BATCH_SIZE=str(slots), REX_MAX_QUEUE=str(places)) as server:
        answers = asyncio.run(ask_all(server, [{"max_tokens": 120}] * (10 * (slots + places))))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= slots + places
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["usage"]["generated_tokens"] == 120
            else:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        assert server.metrics()['rex_requests_rejected_total{reason="queue_full"}'] == statuses.count(429)
        wait_until_idle(server)
