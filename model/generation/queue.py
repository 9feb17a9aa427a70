"""The queue of requests waiting for a slot: bounded by requests and prompt tokens, fair among clients."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from model.generation.requests import Generation
from model.generation.turns import Turns

SHORT_ANSWER = 64
"""Most tokens of an answer that may use the slots reserved for short ones."""
REQUESTS_PER_RESERVED = 16
"""For each of this many requests at once there is one slot more, for short answers, so that they do not wait for long
ones.
"""
PRESENT_S = 5.0
"""A client counts as present for this long after its last request."""


class QueueFull(Exception):
    """The requests do not fit into the queue."""


class RequestQueue:
    """Thread-safe.

    max_requests, max_tokens: limits of waiting requests and of their prompt tokens. An empty queue accepts one request
    of any length. A named client with less than its share of a full queue may exceed the limits, up to twice.
    clock: seconds; for tests.
    """

    def __init__(self, max_requests: int, max_tokens: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_requests, self._max_tokens, self._clock = max_requests, max_tokens, clock
        self._waiting = Turns()
        self._held = 0
        """Places of running beam searches, whose requests come back to the queue for each token."""
        self._arrivals: dict[str, float] = {}
        """When each client's latest request arrived."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting)

    def generations(self) -> list[Generation]:
        """The waiting requests."""
        with self._lock:
            return list(self._waiting)

    @property
    def tokens(self) -> int:
        """Prompt tokens of the waiting requests."""
        with self._lock:
            return _tokens(self._waiting)

    def put(
        self, generations: Sequence[Generation], *, room: int, beginnings: Sequence[Generation] | None = None
    ) -> None:
        """Enqueue all or none. room: free slots, whose requests leave the queue at once. beginnings: enqueue these
        instead; the places of the others stay taken until `release`.

        Raises QueueFull; none is enqueued then.
        """
        entering = generations if beginnings is None else beginnings
        dropped = []
        with self._lock:
            fits = self._fits(generations, room)
            if not fits:
                dropped = self._take_interrupted()
                fits = self._fits(generations, room)
            if fits:
                self._arrivals |= {one.request.client: self._clock() for one in entering if one.request.client}
                self._held += len(generations) - len(entering)
                for generation in entering:
                    self._waiting.append(generation)
        for generation in dropped:
            _finish(generation)
        if not fits:
            raise QueueFull

    def put_continuations(self, generations: Sequence[Generation]) -> None:
        """Enqueue the next requests of a beam search, which has its places."""
        with self._lock:
            for generation in generations:
                self._waiting.append(generation)

    def release(self, places: int) -> None:
        """Free the places of a beam search that ended."""
        with self._lock:
            self._held -= places

    def first(
        self,
        is_allowed: Callable[[Generation], bool] = lambda _: True,
        *,
        is_allowed_client: Callable[[str], bool] = lambda _: True,
    ) -> Generation | None:
        """Peek at the next request of those that both accept, by itself and by its client; None if there is none."""
        with self._lock:
            return self._waiting.first(is_allowed, is_allowed_client=is_allowed_client)

    def present_clients(self) -> set[str]:
        """Clients that sent a request within PRESENT_S, or wait.

        A request without a name, as a server sends to warm up, counts while it waits.
        """
        with self._lock:
            oldest = self._clock() - PRESENT_S
            self._arrivals = {client: at for client, at in self._arrivals.items() if at >= oldest}
            return self._waiting.clients | self._arrivals.keys()

    def count(self, client: str) -> int:
        """Waiting requests of one client."""
        with self._lock:
            return self._waiting.count(client)

    def remove(self, generation: Generation) -> None:
        """Remove a request if it is still queued."""
        with self._lock:
            self._waiting.remove(generation, was_served=True)

    def finish_interrupted(self) -> int:
        """Finish canceled and timed-out requests at once; returns their number."""
        if not self:
            return 0
        with self._lock:
            interrupted = self._take_interrupted()
        for generation in interrupted:
            _finish(generation)
        return len(interrupted)

    def clear(self) -> list[Generation]:
        """Remove and return all requests."""
        with self._lock:
            return self._waiting.clear()

    def _fits(self, generations: Sequence[Generation], room: int) -> bool:
        waiting = [generation for generation in self._waiting if not generation.is_continuation]
        requests = self._held + len(waiting) + len(generations)
        tokens = _tokens(waiting) + _tokens(generations)
        share = self._share(generations[0].request.client) if generations else 1
        fits = tokens <= share * self._max_tokens or requests <= max(room, 1)
        return requests <= share * self._max_requests + room and fits

    def _share(self, client: str) -> int:
        """2 for a named client with less than its share of a queue with other clients, else 1."""
        others = self._waiting.clients - {client}
        return 2 if client and others and self._waiting.count(client) < self._max_requests // (len(others) + 1) else 1

    def _take_interrupted(self) -> list[Generation]:
        interrupted = [generation for generation in self._waiting if generation.interruption()]
        for generation in interrupted:
            self._waiting.remove(generation, was_served=False)
        return interrupted


def usual_requests(device: str) -> int:
    """Requests at once that a type of device computes well: on a GPU, 64 take hardly longer than one."""
    return 64 if device == "cuda" else 16


def slots_for(requests: int) -> int:
    """Slots for so many requests at once, and those reserved for short answers."""
    return requests + requests // REQUESTS_PER_RESERVED


def unreserved(slots: int, running: Iterable[Generation]) -> Callable[[Generation], bool]:
    """Whether a request may take a free one of `slots` beside the running ones: a long answer leaves those that are
    reserved for short ones.
    """
    most_long = slots - slots // (REQUESTS_PER_RESERVED + 1)
    long = sum(not _is_short(generation) for generation in running)
    return lambda generation: long < most_long or _is_short(generation)


def _is_short(generation: Generation) -> bool:
    return generation.request.max_tokens <= SHORT_ANSWER


def _tokens(generations: Iterable[Generation]) -> int:
    return sum(len(generation.request.prompt_ids) for generation in generations)


def _finish(generation: Generation) -> None:
    generation.finish(generation.interruption() or "cancelled")
