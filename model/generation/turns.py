"""Start-time fair queueing (Goyal, Vin and Cheng, 1996) over clients, and over the connections of each client.

A request's tag is the larger of the time and its sender's latest tag plus one; the smallest tag is served first, ties
by arrival. So a burst from one sender waits behind other senders for all but its first request, and idle time earns no
credit. The time is the last served tag, and goes on by one while as many requests are served as wait: with the last tag
alone, a second request would wait for ever behind new senders, each with its first. Not thread-safe: `queue.py` has the
lock.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from model.generation.requests import Generation


@dataclass
class _Tags:
    """Tags of one level: clients, or connections of one client."""

    now: float = 0.0
    latest: dict[str, float] = field(default_factory=dict)

    def next(self, sender: str) -> float:
        tag = max(self.now, self.latest.get(sender, -1.0) + 1)
        self.latest[sender] = tag
        return tag

    def serve(self, tag: float, waiting: int) -> None:
        """Count a served request of `waiting` ones."""
        self.now = max(self.now, tag) + 1 / (waiting + 1)
        if len(self.latest) > 2 * waiting + 64:  # a queue may never be empty
            self.latest = {sender: latest for sender, latest in self.latest.items() if latest + 1 > self.now}


@dataclass
class _Line:
    """Requests of one client. tags: its tags among clients. requests: with their connections' tags, by arrival."""

    tags: deque[float] = field(default_factory=deque)
    connections: _Tags = field(default_factory=_Tags)
    requests: list[tuple[float, int, Generation]] = field(default_factory=list)


class Turns:
    """Waiting requests in the order of service."""

    def __init__(self) -> None:
        self._clients = _Tags()
        self._lines: dict[str, _Line] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(line.requests) for line in self._lines.values())

    def __iter__(self) -> Iterator[Generation]:
        return (generation for line in self._lines.values() for _, _, generation in line.requests)

    def append(self, generation: Generation) -> None:
        """Enqueue a request."""
        request = generation.request
        line = self._lines.setdefault(request.client, _Line())
        line.tags.append(self._clients.next(request.client))
        self._arrivals += 1
        line.requests.append((line.connections.next(request.connection), self._arrivals, generation))

    def first(
        self, is_allowed: Callable[[Generation], bool], *, is_allowed_client: Callable[[str], bool]
    ) -> Generation | None:
        """The next request among those allowed, which stays queued; None if there is none."""
        best: tuple[tuple[float, int], Generation] | None = None
        for client, line in self._lines.items():
            if not is_allowed_client(client):
                continue
            first: tuple[float, int, Generation] | None = None
            for item in line.requests:
                if (first is None or item[:2] < first[:2]) and is_allowed(item[2]):
                    first = item
            if first is not None:
                key = (line.tags[0], first[1])
                if best is None or key < best[0]:
                    best = (key, first[2])
        return best[1] if best else None

    def remove(self, generation: Generation, *, was_served: bool) -> None:
        """Remove a request if it is still queued. was_served: count it as its client's turn."""
        line = self._lines.get(generation.request.client)
        item = next((item for item in line.requests if item[2] is generation), None) if line else None
        if line is None or item is None:
            return
        if was_served:
            self._clients.serve(line.tags.popleft(), len(self._lines))
            line.connections.serve(item[0], len(line.requests))
        else:
            line.tags.pop()
        line.requests.remove(item)
        if not line.requests:
            del self._lines[generation.request.client]
        if not self._lines:  # tags only order requests that are queued at the same time
            self._clients = _Tags()

    def count(self, client: str) -> int:
        """Requests of one client."""
        return len(self._lines[client].requests) if client in self._lines else 0

    @property
    def clients(self) -> set[str]:
        """Waiting clients."""
        return set(self._lines)

    def clear(self) -> list[Generation]:
        """Remove all requests."""
        taken = [
            item[2] for item in sorted((i for line in self._lines.values() for i in line.requests), key=lambda i: i[1])
        ]
        self._lines.clear()
        self._clients = _Tags()
        return taken
