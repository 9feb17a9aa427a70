"""Runs work of one request that would delay all others: parsing, tokenizing and rendering of long texts.

One thread runs one task at a time, alternating among clients. After a task that held the GIL the thread pauses for
three times as long, so that such work takes at most a quarter of the time of event loop and engine, regardless of the
load. Short tasks run in the calling thread, because waking a thread would cost more.
"""

import asyncio
import sys
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
SWITCH_S = 0.0005
"""How long a thread waits for the GIL while such work holds it; Python's default is 5 ms. Event loop and engine need it
a dozen times for a token."""


class HeavyWork:
    """One piece at a time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._free_at = 0.0
        # One long-lived thread: glibc keeps an arena for each thread, as large as its largest task.
        self._thread = ThreadPoolExecutor(1, "heavy-work")

    async def run(self, work: Callable[..., T], *arguments: Any, holds_lock: bool = True) -> T:
        """The result of `work(*arguments)`. holds_lock: whether it holds the GIL; Rust and zlib release it."""
        async with self._turn:
            pause_s = self._free_at - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            started, before = time.monotonic(), sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_S)
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *arguments))
            finally:
                sys.setswitchinterval(before)
                now = time.monotonic()
                self._free_at = now + (min(PAUSE * (now - started), MAX_PAUSE_S) if holds_lock else 0.0)
                if charge := CHARGE.get():
                    charge(now - started)


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
            yield b"," if number else b"["
            yield from _parts(value[number], depth - 1)
            value[number] = None
        yield b"]"
    else:
        yield orjson.dumps(value)
