"""vllm-router and smg in front of two replicas: requests reach both, streams come through, one replica goes on."""

import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, on_a_port, running_service
from tests.e2e.workplace import BIN, free_port

pytestmark = [pytest.mark.processes, pytest.mark.medium]
WAIT_S = 60
GATEWAYS = {"vllm-router": ([], "/health"), "smg": (["launch"], "/readiness")}
"""Arguments before the options, and the path that says whether the replicas are known."""
GREEDY = {"model": MODEL, "max_tokens": 6, "temperature": 0}


@dataclass
class Gateway:
    url: str
    replicas: list[Service]
    first: ExitStack

    def generated(self) -> list[int]:
        return [replica.engine.stats().generated_tokens_total for replica in self.replicas]


@contextmanager
def running_gateway(name: str, replicas: list[str], log: Path, policy: str = "round_robin") -> Iterator[str]:
    """The address of a gateway in front of replicas, once it knows them."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"{name} has wheels only for x86-64 Linux")
    program = BIN / name
    assert program.exists(), "run `make setup`: the gateways are among the packages for tests"
    arguments, ready = GATEWAYS[name]
    port, prometheus = free_port(), free_port()
    command = [program, *arguments, "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    command += ["--prometheus-port", str(prometheus), "--worker-urls", *replicas]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
        while not _is_healthy(f"{url}{ready}"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.kill()  # at SIGTERM smg keeps its port for 5 s
        process.wait(WAIT_S)


@pytest.fixture(scope="module", params=GATEWAYS)
def gateway(request, tmp_path_factory) -> Iterator[Gateway]:
    log = tmp_path_factory.mktemp("router") / "router.log"
    with ExitStack() as stack, ExitStack() as first:
        replicas, urls = [], []
        for keep in (first, stack):
            replicas.append(stack.enter_context(running_service(chat_template=CHAT_TEMPLATE)))
            urls.append(keep.enter_context(on_a_port(replicas[-1].app)))
        yield Gateway(stack.enter_context(running_gateway(request.param, urls, log)), replicas, first)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_requests_reach_both_replicas_and_have_the_same_answers(gateway, client):
    before = gateway.generated()
    texts = {client.completions.create(prompt="def main", **GREEDY).choices[0].text for _ in range(8)}
    assert len(texts) == 1
    assert [after - start for start, after in zip(before, gateway.generated(), strict=True)] == [24, 24]
    assert MODEL in [model.id for model in client.models.list()]


def test_streams_and_conversations_come_through(client):
    messages = [{"role": "user", "content": "größer?"}]
    whole = client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_refusal_keeps_its_status_and_its_words(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="x", **{**GREEDY, "temperature": -1})
    assert "temperature" in str(caught.value)


def test_one_replica_goes_on_alone(gateway, client):
    gateway.first.close()  # its port is closed
    before = gateway.generated()
    for _ in range(4):
        assert client.completions.create(prompt="def main", **GREEDY).usage.completion_tokens == 6
    assert [after - start for start, after in zip(before, gateway.generated(), strict=True)] == [0, 24]
