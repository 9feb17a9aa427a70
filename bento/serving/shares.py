"""Shares the event loop among clients: the CPU time of their requests, but not of streams.

Each client, an address, has a leaky bucket that fills with the CPU time of its requests and drains at `SHARE` of a
core. While other clients post requests too, the server reads nothing from the connections of a client whose bucket is
full, so that its data waits in the kernel. A request is charged in advance with what the client's requests usually
cost, so that of several connections that wait, one is read at a time. A client alone never waits. Generation has its
own turns (`model/generation/turns.py`).
"""

import time
from collections.abc import Awaitable, Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

SHARE = 0.1
"""Fraction of a core for one client while others send requests."""
BURST_S = 0.05
"""CPU seconds that a client can use in a burst before it waits."""
MAX_WAIT_S = 1.0
OTHERS_S = 1.0
"""A client without a request for this many seconds no longer counts as present."""
CONNECTION_S = 0.0005
"""Charged per connection: work of the kernel and the event loop that is not measured with any request."""
MAX_CLIENTS = 4096
NEWEST_WEIGHT = 0.25
"""Weight of a request's cost in the moving average that is charged in advance."""

Charge = Callable[[float], None]
CHARGE: ContextVar[Charge | None] = ContextVar("charge", default=None)
"""Charges the client of the current request with seconds of CPU time."""


@dataclass
class _Bucket:
    level_s: float = 0.0
    at: float = 0.0
    usual_s: float = 0.0
    """Moving average of the cost of a request."""


@dataclass
class ClientShares:
    """The buckets of all clients. clock: seconds; for tests."""

    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, _Bucket] = field(default_factory=dict)
    _newest: str = ""
    _newest_at: float = float("-inf")
    _other_at: float = float("-inf")

    def charge(self, client: str, seconds: float) -> None:
        """Add the cost of a part of a request."""
        now = self.clock()
        bucket = self._drained(client, now)
        bucket.level_s = min(bucket.level_s + seconds, BURST_S + SHARE * MAX_WAIT_S)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets = {name: one for name, one in self._buckets.items() if now - one.at < MAX_WAIT_S}

    def request(self, client: str) -> "RequestCost":
        """Charge the client's usual cost for a request that begins."""
        usual_s = self._buckets[client].usual_s if client in self._buckets else 0.0
        self.charge(client, usual_s)
        return RequestCost(self, client, usual_s)

    def learn(self, client: str, seconds: float) -> None:
        """Note the whole cost of a request that has ended."""
        bucket = self._buckets.setdefault(client, _Bucket(at=self.clock()))
        bucket.usual_s += NEWEST_WEIGHT * (seconds - bucket.usual_s)

    def arrive(self, client: str) -> None:
        """Note a request that makes other clients wait for their share. Health probes do not count."""
        if client != self._newest:
            self._newest, self._other_at = client, self._newest_at
        self._newest_at = self.clock()

    def wait_s(self, client: str) -> float:
        """Seconds until the client's next request may be read; 0 if at once."""
        now = self.clock()
        if now - (self._other_at if client == self._newest else self._newest_at) > OTHERS_S:
            return 0.0
        return max(0.0, (self._drained(client, now).level_s - BURST_S) / SHARE)

    def _drained(self, client: str, now: float) -> _Bucket:
        bucket = self._buckets.setdefault(client, _Bucket(at=now))
        bucket.level_s = max(0.0, bucket.level_s - SHARE * (now - bucket.at))
        bucket.at = now
        return bucket


@dataclass
class RequestCost:
    """The charges of one request, of which `paid_s` were charged in advance."""

    shares: ClientShares
    client: str
    paid_s: float
    spent_s: float = 0.0

    def charge(self, seconds: float) -> None:
        """Add the cost of a part of the request."""
        unpaid_s = max(0.0, self.spent_s + seconds - max(self.spent_s, self.paid_s))
        self.spent_s += seconds
        if unpaid_s:
            self.shares.charge(self.client, unpaid_s)

    def end(self) -> None:
        """Add the request's whole cost to the client's moving average."""
        self.shares.learn(self.client, self.spent_s)


class Charged:
    """An awaitable that runs a coroutine and charges the CPU time of each of its steps, until it is `is_free`."""

    def __init__(self, coroutine: Awaitable[Any], charge: Charge) -> None:
        self._coroutine, self._charge = coroutine, charge
        self.is_free = False

    def __await__(self) -> Generator[Any, Any, Any]:
        """As the coroutine's own."""
        steps: Any = self._coroutine.__await__()
        error: BaseException | None = None
        while True:
            began = time.thread_time()
            try:
                waits_for = steps.throw(error) if error else steps.send(None)
            except StopIteration as end:
                return end.value
            finally:
                if not self.is_free:
                    self._charge(time.thread_time() - began)
            error = None
            try:
                yield waits_for
            except BaseException as raised:  # noqa: BLE001 - the coroutine handles it, a cancellation too
                error = raised
