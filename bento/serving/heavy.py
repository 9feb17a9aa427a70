"""Work of one request that would hold up all others: parsing, tokenizing and rendering of long texts.

It runs in one thread, one piece at a time, in turns of the clients. After a piece that held the interpreter's lock the
thread pauses for three times as long, so that such work takes at most a quarter of the time from the event loop and the
engine, however much of it clients send. Short pieces run where they are: waking a thread would cost more.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
PAUSE = 3.0
LONGEST_PAUSE_S = 0.2


class HeavyWork:
    """One piece at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    async def run(self, work: Callable[..., T], *arguments: Any, holds_lock: bool = True) -> T:
        """The result of `work(*arguments)`. holds_lock: whether it holds the interpreter lock; Rust and zlib do not."""
        async with self._turn:
            pause_s = self._free_at - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            started = time.monotonic()
            try:
                return await asyncio.to_thread(work, *arguments)
            finally:
                now = time.monotonic()
                self._free_at = now + (min(PAUSE * (now - started), LONGEST_PAUSE_S) if holds_lock else 0.0)
