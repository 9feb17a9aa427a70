"""The event loop is shared: a client whose requests cost much waits while others send theirs."""

import asyncio
import gc
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from bentoml._internal.server.http.traffic import TimeoutMiddleware

from bento.http.protocol import MAX_CHUNKS, ConnectionLimits
from bento.serving.heavy import HeavyWork
from bento.serving.shares import BURST_S, CHARGE, MAX_CLIENTS, MAX_WAIT_S, OTHERS_S, SHARE, Charged, ClientShares
from tests.bento.openai_service import GOOD, Service, on_a_port, running_service

COSTLY, OTHER = "127.0.0.2", "127.0.0.1"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shares(clock: Clock) -> ClientShares:
    return ClientShares(clock=clock)


def test_a_client_alone_never_waits(shares: ClientShares, clock: Clock) -> None:
    for _ in range(100):
        shares.arrive("one")
        assert shares.wait_s("one") == 0
        shares.charge("one", 1.0)
        clock.now += 0.01


def test_beside_others_a_client_waits_until_its_costs_have_drained(shares: ClientShares, clock: Clock) -> None:
    shares.arrive("costly")
    shares.arrive("cheap")
    assert shares.wait_s("costly") == shares.wait_s("cheap") == 0
    shares.charge("costly", BURST_S + SHARE / 4)
    assert shares.wait_s("cheap") == 0
    assert shares.wait_s("costly") == pytest.approx(0.25)
    clock.now += 0.25
    assert shares.wait_s("cheap") == 0
    assert shares.wait_s("costly") == pytest.approx(0, abs=1e-9)


def test_a_burst_within_the_allowance_is_free(shares: ClientShares) -> None:
    shares.arrive("other")
    shares.charge("one", BURST_S)
    assert shares.wait_s("one") == 0


def test_no_wait_is_longer_than_the_longest(shares: ClientShares) -> None:
    shares.arrive("other")
    shares.charge("one", 1000.0)
    assert shares.wait_s("one") == pytest.approx(MAX_WAIT_S)


def test_a_client_stops_waiting_once_the_others_have_left(shares: ClientShares, clock: Clock) -> None:
    shares.arrive("other")
    shares.charge("one", 1000.0)
    clock.now += OTHERS_S + 0.1
    shares.charge("one", 1000.0)
    assert shares.wait_s("one") == 0


def test_of_several_waiting_connections_one_is_read_at_a_time(shares: ClientShares, clock: Clock) -> None:
    """At the moment when the bucket has drained, all are asked whether they must wait."""
    for _ in range(20):
        shares.learn("costly", SHARE / 2)
    shares.arrive("other")
    shares.charge("costly", BURST_S)
    assert shares.wait_s("costly") == 0
    shares.request("costly")
    assert shares.wait_s("costly") == pytest.approx(0.5, rel=0.01)
    clock.now += 0.51
    shares.arrive("other")
    assert shares.wait_s("costly") == 0


@pytest.mark.parametrize(("usual", "parts"), [(0.02, [0.01, 0.005]), (0.02, [0.01, 0.02, 0.03]), (0.0, [0.01])])
def test_a_request_costs_what_was_charged_in_advance_or_what_it_took_if_that_is_more(
    clock: Clock, usual: float, parts: list[float]
) -> None:
    shares = ClientShares(clock=clock)
    for _ in range(50):
        shares.learn("one", usual)
    request = shares.request("one")
    for part in parts:
        request.charge(part)
    assert request.spent_s == pytest.approx(sum(parts))
    assert shares._buckets["one"].level_s == pytest.approx(max(usual, sum(parts)), rel=1e-4)


def test_clients_that_left_are_forgotten(shares: ClientShares, clock: Clock) -> None:
    for number in range(3 * MAX_CLIENTS):
        shares.charge(str(number), 0.001)
        clock.now += 0.001
    assert len(shares._buckets) <= MAX_CLIENTS + 1


def test_all_steps_of_a_coroutine_are_charged_and_its_waits_are_not() -> None:
    charged: list[float] = []

    async def work() -> str:
        for _ in range(3):
            began = time.thread_time()
            while time.thread_time() - began < 0.01:
                pass
            await asyncio.sleep(0.05)
        return "done"

    assert asyncio.run(_run(work(), charged)) == "done"
    assert len(charged) == 4 and 0.03 <= sum(charged) < 0.1


async def _run(coroutine, charged: list[float]):
    CHARGE.set(charged.append)
    return await Charged(coroutine, charged.append)


def test_errors_and_cancellations_pass_through_a_charged_coroutine() -> None:
    seen: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("canceled")
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("what it is")

    async def main() -> None:
        task = asyncio.create_task(_run(waits(), []))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(LookupError, match="what it is"):
            await _run(fails(), [])

    asyncio.run(main())
    assert seen == ["canceled"]


def test_heavy_work_is_charged_to_the_client_whose_request_it_is() -> None:
    charged: list[float] = []

    async def request() -> None:
        assert CHARGE.get() == charged.append
        await HeavyWork().run(time.sleep, 0.05)

    asyncio.run(_run(request(), charged))
    assert sum(charged) >= 0.05


@pytest.mark.parametrize("fails", [False, True])
def test_heavy_work_of_a_client_that_leaves_meanwhile_is_its_own_to_the_end(fails: bool, caplog) -> None:
    leaver, other = [], []

    def work() -> None:
        time.sleep(0.2)
        if fails:
            raise LookupError

    async def main() -> None:
        heavy = HeavyWork()
        left = asyncio.create_task(_run(heavy.run(work), leaver))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        stays = asyncio.create_task(_run(heavy.run(time.monotonic, holds_lock=False), other))
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert await stays - began >= 0.25  # the rest of the work, and the pause after it

    asyncio.run(main())
    assert sum(leaver) >= 0.2
    assert sum(other) < 0.1
    gc.collect()
    assert not caplog.records


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


def _post(address: tuple[str, int], body: bytes, source: str) -> socket.socket:
    made = socket.create_connection(address, timeout=30, source_address=(source, 0))
    made.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return made


@pytest.mark.medium
def test_on_a_real_server_one_client_waits_while_another_is_answered_and_is_answered_later(
    service: Service, clock: Clock, shares: ClientShares
) -> None:
    body = json.dumps({**GOOD["/v1/completions"], "temperature": 0}).encode()
    with on_a_port(service.app, ConnectionLimits(shares=shares)) as url:
        address = (OTHER, int(url.rpartition(":")[2]))
        assert httpx.get(f"{url}/v1/models").status_code == 200
        clock.now += MAX_WAIT_S
        shares.arrive(OTHER)
        assert shares.wait_s(OTHER) == 0
        shares.charge(COSTLY, 1000.0)
        with _post(address, body, COSTLY) as whole, _post(address, body, COSTLY) as half_closed:
            half_closed.shutdown(socket.SHUT_WR)
            for _ in range(3):
                assert httpx.post(f"{url}/v1/completions", json=json.loads(body)).status_code == 200
                clock.now += MAX_WAIT_S / 10
            for waiting in (whole, half_closed):
                waiting.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    waiting.recv(1)
            clock.now += 10 * MAX_WAIT_S
            for waiting in (whole, half_closed):
                waiting.settimeout(30)
                assert b"200 OK" in waiting.recv(4096)


def test_behind_middleware_that_runs_the_app_in_another_task_a_request_is_charged_and_a_probe_makes_nobody_wait(
    service: Service, clock: Clock, shares: ClientShares
) -> None:
    fields = {f"{number}": 1 for number in range(1_400)}
    app = TimeoutMiddleware(service.app, 60)
    with on_a_port(app, ConnectionLimits(shares=shares)) as url:
        for _ in range(4):
            assert httpx.post(f"{url}/v1/completions", json=GOOD["/v1/completions"] | fields).status_code == 400
        assert shares._buckets[OTHER].usual_s > 0.0005
        assert httpx.get(f"{url}/health").status_code == 200
        shares.charge(COSTLY, 1000.0)
        assert shares.wait_s(COSTLY) > 0
        clock.now += OTHERS_S + 0.1
        shares.charge(COSTLY, 1000.0)
        assert httpx.get(f"{url}/health").status_code == 200
        assert shares.wait_s(COSTLY) == 0


@pytest.mark.medium
@pytest.mark.parametrize(("chunks", "status"), [(MAX_CHUNKS - 100, b"200"), (MAX_CHUNKS + 1, b"413")])
def test_the_number_of_chunks_is_bounded(service: Service, chunks: int, status: bytes) -> None:
    body = json.dumps({**GOOD["/v1/completions"], "temperature": 0}).encode()
    body = b" " * (chunks - 1) + body  # white space before JSON is JSON
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body[: chunks - 1])
    last = body[chunks - 1 :]
    sent = pieces + b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)
    with (
        on_a_port(service.app) as url,
        socket.create_connection((OTHER, int(url.rpartition(":")[2])), timeout=30) as made,
    ):
        made.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + sent)
        answer = b""
        while part := made.recv(65536):
            answer += part
    assert answer.split()[1] == status, answer
