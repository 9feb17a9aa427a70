"""Runs work of one request that would delay all others: parsing, tokenizing and rendering of long texts.

One thread runs one task at a time, alternating among clients. After a task that held the GIL the thread pauses for
three times as long, so that such work takes at most a quarter of the time of event loop and engine, regardless of the
load. Short tasks run in the calling thread, because waking a thread would cost more.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
PAUSE = 3.0
LONGEST_PAUSE_S = 0.2


class HeavyWork:
    """One piece at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._free_at = 0.0
        # The same thread each time: glibc keeps a pool of memory for each, as large as its largest piece of work.
        self._thread = ThreadPoolExecutor(1, "heavy-work")

    async def run(self, work: Callable[..., T], *arguments: Any, holds_lock: bool = True) -> T:
        """The result of `work(*arguments)`. holds_lock: whether it holds the GIL; Rust and zlib release it."""
        async with self._turn:
            pause_s = self._free_at - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            started = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *arguments))
            finally:
                now = time.monotonic()
                self._free_at = now + (min(PAUSE * (now - started), LONGEST_PAUSE_S) if holds_lock else 0.0)
