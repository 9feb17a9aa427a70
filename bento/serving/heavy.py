"""Runs work of one request that would delay all others: parsing, tokenizing and rendering of long texts.

One thread runs one task at a time, alternating among clients. After a task that held the GIL the thread pauses for
three times as long, so that such work takes at most a quarter of the time of event loop and engine, regardless of the
load; long tasks also pause in between, where they call `rest`. A task that releases the GIL takes a core instead: its
thread has a low priority. Short tasks run in the calling thread, because waking a thread would cost more.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import orjson
from starlette.responses import JSONResponse, Response

from bento.serving.shares import CHARGE

T = TypeVar("T")
PARTS_DEPTH = 5
"""Nesting levels at which an answer is split for encoding: down to each token of a text."""
PAUSE = 3.0
MAX_PAUSE_S = 0.2
AT_ONCE_S, STRETCH_S, MAX_REST_S = 0.005, 0.002, 0.02
"""How long a task runs before its first rest and between two rests, and the longest rest."""
NICE = 10
"""Added to the priority value of the thread whose work does not hold the GIL: the engine's threads have ten times its
share of the cores. A thread that holds the GIL must not wait for them, as they would wait for it."""
SWITCH_S = 0.0005
"""How long a thread waits for the GIL while such work holds it; Python's default is 5 ms. Event loop and engine need it
a dozen times for a token."""


class _Clock(threading.local):
    """The running task's times. since: the end of its last rest; None outside such a task."""

    since: float | None = None
    until = rested_s = 0.0


_CLOCK = _Clock()


def rest() -> None:
    """Let others run, if this is a task that has run for a while. Work that takes long calls it every few microseconds:
    for a tenth of a second of it, another client would wait for each of its tokens a few times as long.
    """
    if _CLOCK.since is None or (now := time.monotonic()) < _CLOCK.until:
        return
    time.sleep(min(PAUSE * (now - _CLOCK.since), MAX_REST_S))
    _CLOCK.since = time.monotonic()
    _CLOCK.until = _CLOCK.since + STRETCH_S
    _CLOCK.rested_s += _CLOCK.since - now


class HeavyWork:
    """One piece at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._free_at = self._pause_s = self._worked_s = 0.0
        # Long-lived threads: glibc keeps an arena for each thread, as large as its largest task.
        self._thread = ThreadPoolExecutor(1, "heavy-work")
        self._thread_without_lock = ThreadPoolExecutor(1, "heavy-work-aside", initializer=_lower_priority)

    async def run(self, work: Callable[..., T], *arguments: Any, holds_lock: bool = True) -> T:
        """The result of `work(*arguments)`. holds_lock: whether it holds the GIL; Rust and zlib release it."""
        async with self._turn:
            pause_s = self._free_at - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            task = partial(self._timed, partial(work, *arguments), holds_lock)
            thread = self._thread if holds_lock else self._thread_without_lock
            done = asyncio.get_running_loop().run_in_executor(thread, task)
            before = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_S)
            try:
                await _end_of(done)
                return done.result()
            finally:
                sys.setswitchinterval(before)
                self._free_at = time.monotonic() + self._pause_s
                if charge := CHARGE.get():
                    charge(self._worked_s)

    def _timed(self, work: Callable[[], T], holds_lock: bool) -> T:
        """In the thread: run a task and note how long it worked, and for how long to pause after it."""
        _CLOCK.since = started = time.monotonic()
        _CLOCK.until, _CLOCK.rested_s = started + AT_ONCE_S, 0.0
        try:
            return work()
        finally:
            now = time.monotonic()
            self._worked_s = now - started - _CLOCK.rested_s
            self._pause_s = min(PAUSE * (now - _CLOCK.since), MAX_PAUSE_S) if holds_lock else 0.0
            _CLOCK.since = None


async def _end_of(done: asyncio.Future[Any]) -> None:
    """Wait for work in a thread, which cannot be stopped: it keeps its turn to the end, also if the client leaves."""
    try:
        await asyncio.wait([done])
    except asyncio.CancelledError:
        await asyncio.wait([done])
        done.exception()  # read, so that it is not logged as forgotten
        raise


def _lower_priority() -> None:
    """Of this thread; where the system has priorities of processes only, nothing."""
    if sys.platform == "linux":
        thread = os.PRIO_PROCESS, threading.get_native_id()
        os.setpriority(*thread, max(os.getpriority(*thread), NICE))


async def json_response(heavy: HeavyWork, content: Callable[[], Any], *, is_short: bool) -> Response:
    """A response with the value that `content` returns, encoded as heavy work unless it is short."""
    if is_short:
        return JSONResponse(content())

    def render() -> bytes:
        return encode_in_parts(content())

    return Response(await heavy.run(render), media_type="application/json")


def encode_in_parts(value: Any) -> bytes:
    """JSON of a large answer, in parts between which other threads can run. Takes `value` apart.

    To encode an answer at once, or to free it at once, would hold the GIL for as long: a tenth of a second for the
    log-probabilities of four prompts of 1,024 tokens.
    """
    return b"".join(_parts(value, PARTS_DEPTH))


def _parts(value: Any, depth: int) -> Iterator[bytes]:
    # Others are encoded at once, in microseconds: lists of plain values, and the likely tokens beside one token.
    if depth and isinstance(value, dict) and list in map(type, value.values()):
        for number, key in enumerate(value):
            yield (b"," if number else b"{") + orjson.dumps(key) + b":"
            yield from _parts(value[key], depth - 1)
            value[key] = None
        yield b"}"
    elif depth and isinstance(value, list) and not {dict, list}.isdisjoint(map(type, value)):
        for number in range(len(value)):
            rest()
            yield b"," if number else b"["
            yield from _parts(value[number], depth - 1)
            value[number] = None
        yield b"]"
    else:
        yield orjson.dumps(value)
