"""The queue of requests that wait for a slot: bounded by requests and by prompt tokens, first come, first served."""

import threading
from collections import deque
from collections.abc import Sequence

from model.generation.requests import Generation


class QueueFull(Exception):
    """The requests do not fit into the queue."""


class RequestQueue:
    """Every method is safe to call from any thread.

    max_requests, max_tokens: requests that wait and prompt tokens of theirs, at most. An empty queue takes one request,
    however long its prompt.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._waiting: deque[Generation] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        with self._lock:
            return _tokens(self._waiting)

    def put(self, generations: Sequence[Generation], *, room: int) -> None:
        """Let them all wait. room: requests that leave the queue at once, as their slots are free.

        Raises QueueFull, and then none of them waits.
        """
        dropped = []
        with self._lock:
            fits = self._fits(generations, room)
            if not fits:
                dropped = self._take_interrupted()
                fits = self._fits(generations, room)
            if fits:
                self._waiting.extend(generations)
        for generation in dropped:
            _finish(generation)
        if not fits:
            raise QueueFull

    def first(self) -> Generation | None:
        """The request that is next, which stays; None where none waits."""
        with self._lock:
            return self._waiting[0] if self._waiting else None

    def remove(self, generation: Generation) -> None:
        """Take a request out; nothing happens where it has gone."""
        with self._lock:
            if generation in self._waiting:
                self._waiting.remove(generation)

    def finish_interrupted(self) -> int:
        """Finish those that were cancelled or whose time is up, without waiting for their turn; how many they were."""
        if not self._waiting:
            return 0
        with self._lock:
            interrupted = self._take_interrupted()
        for generation in interrupted:
            _finish(generation)
        return len(interrupted)

    def clear(self) -> list[Generation]:
        """Take all requests out."""
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
        return taken

    def _fits(self, generations: Sequence[Generation], room: int) -> bool:
        requests = len(self._waiting) + len(generations)
        tokens = _tokens(self._waiting) + _tokens(generations)
        return requests <= self._max_requests + room and (tokens <= self._max_tokens or requests <= max(room, 1))

    def _take_interrupted(self) -> list[Generation]:
        interrupted = [generation for generation in self._waiting if generation.interruption()]
        for generation in interrupted:
            self._waiting.remove(generation)
        return interrupted


def _tokens(generations: Sequence[Generation] | deque[Generation]) -> int:
    return sum(len(generation.request.prompt_ids) for generation in generations)


def _finish(generation: Generation) -> None:
    generation.finish(generation.interruption() or "cancelled")
