"""Whose request is next: start-time fair queueing (Goyal, Vin and Cheng, 1996) over clients, and over connections of
each.

A request's tag is the larger of the tag that was served last and its sender's latest tag plus one; the smallest tag is
served first, equal ones by arrival. So a sender of many requests at once waits behind others for all but the first, and
a sender that was idle gains nothing from that. Not thread-safe: `queue.py` has the lock.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from model.generation.requests import Generation


@dataclass
class _Tags:
    """Tags of one level: clients, or connections of one client."""

    now: int = 0
    latest: dict[str, int] = field(default_factory=dict)

    def next(self, sender: str) -> int:
        tag = max(self.now, self.latest.get(sender, -1) + 1)
        self.latest[sender] = tag
        return tag


@dataclass
class _Line:
    """Requests of one client. tags: its turns among clients. requests: with their connections' tags, by arrival."""

    tags: deque[int] = field(default_factory=deque)
    connections: _Tags = field(default_factory=_Tags)
    requests: list[tuple[int, int, Generation]] = field(default_factory=list)


class Turns:
    """Requests that wait, in the order in which they are to be served."""

    def __init__(self) -> None:
        self._clients = _Tags()
        self._lines: dict[str, _Line] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return sum(len(line.requests) for line in self._lines.values())

    def __iter__(self) -> Iterator[Generation]:
        return (generation for line in self._lines.values() for _, _, generation in line.requests)

    def append(self, generation: Generation) -> None:
        """Let a request wait."""
        request = generation.request
        line = self._lines.setdefault(request.client, _Line())
        line.tags.append(self._clients.next(request.client))
        self._arrivals += 1
        line.requests.append((line.connections.next(request.connection), self._arrivals, generation))

    def first(self, is_allowed: Callable[[Generation], bool]) -> Generation | None:
        """The request that is next among those allowed; it stays. None where there is none."""
        best: tuple[tuple[int, int], Generation] | None = None
        for line in self._lines.values():
            allowed = [item for item in line.requests if is_allowed(item[2])]
            if allowed:
                _, arrival, generation = min(allowed, key=lambda item: item[:2])
                key = (line.tags[0], arrival)
                if best is None or key < best[0]:
                    best = (key, generation)
        return best[1] if best else None

    def remove(self, generation: Generation, *, was_served: bool) -> None:
        """Take a request out; nothing happens where it has gone. was_served: its client has had its turn."""
        line = self._lines.get(generation.request.client)
        item = next((item for item in line.requests if item[2] is generation), None) if line else None
        if line is None or item is None:
            return
        line.requests.remove(item)
        if was_served:
            self._clients.now = max(self._clients.now, line.tags.popleft())
            line.connections.now = max(line.connections.now, item[0])
        else:
            line.tags.pop()
        if not line.requests:
            del self._lines[generation.request.client]
        if not self._lines:  # tags only order requests that wait together
            self._clients = _Tags()

    def count(self, client: str) -> int:
        """Requests of one client."""
        return len(self._lines[client].requests) if client in self._lines else 0

    @property
    def clients(self) -> set[str]:
        """Clients that wait."""
        return set(self._lines)

    def clear(self) -> list[Generation]:
        """Take all requests out."""
        taken = [
            item[2] for item in sorted((i for line in self._lines.values() for i in line.requests), key=lambda i: i[1])
        ]
        self._lines.clear()
        self._clients = _Tags()
        return taken
