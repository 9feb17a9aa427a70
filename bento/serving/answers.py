"""Delivers the events of one HTTP request's generations to the event loop and streams them.

The engine emits events in its own thread. All events of a step wake the event loop once, for all requests, because a
wake-up costs more than an event. The routes format the events.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bento.errors import UNSUPPORTED_VALUE, ApiError, server_error
from bento.serving.admission import never_started, queue_timeout
from bento.telemetry.record import CLIENT_LEFT, RequestRecord
from model.generation.requests import Event, Finished, Generation, GenerationRequest, TextPiece

if TYPE_CHECKING:
    from model.generation.engine import Engine

Batch = list[tuple[int, Event]]
"""A batch of events, each with the index of its generation in the request."""
T = TypeVar("T")
PING_S = 3.0
DONE = "data: [DONE]\n\n"
REFUSED = {"grammar": "grammar_too_complex", "value": UNSUPPORTED_VALUE}
"""The code of each refusal of the engine."""
GATHER_S = 0.001
"""Wait for the other events of the same step; the event loop's clock has no finer resolution."""


class Mailbox:
    """Carries events from the engine's thread into one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[Answers, int, Event]] = deque()
        self._is_scheduled = False
        self.running = 0
        """Generations that still have events to come."""

    def post(self, answers: "Answers", index: int, event: Event) -> None:
        """Called in the engine's thread. Raises RuntimeError if the loop is closed."""
        self._events.append((answers, index, event))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                self._is_scheduled = False
                raise

    def _wake(self) -> None:
        if self.running == 1:
            self._empty()
            return
        # We wake on the step's first event; wait GATHER_S so that one wake-up takes them all.
        self._loop.call_later(GATHER_S, self._empty)

    def _empty(self) -> None:
        # Reset before reading the events, so that an event arriving in between schedules a wake-up.
        self._is_scheduled = False
        while self._events:
            answers, index, event = self._events.popleft()
            answers.take(index, event)


_mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}


def _mailbox() -> Mailbox:
    loop = asyncio.get_running_loop()
    if loop not in _mailboxes:
        for closed in [one for one in _mailboxes if one.is_closed()]:
            del _mailboxes[closed]
        _mailboxes[loop] = Mailbox(loop)
    return _mailboxes[loop]


class Answers:
    """The generations of one request, admitted together.

    observe: called with the end of each generation and its seconds from submission. Raises as `Engine.submit_all` does.
    """

    def __init__(
        self,
        engine: "Engine",
        requests: Sequence[GenerationRequest],
        record: RequestRecord,
        observe: Callable[[Finished, float], None] | None = None,
    ) -> None:
        self._observe = observe
        self._pending: Batch = []
        self._waiter: asyncio.Future[None] | None = None
        mailbox = self._mailbox = _mailbox()
        self._generations: list[Generation] = engine.submit_all(requests, lambda i, event: mailbox.post(self, i, event))
        self._clocks = [record.follow(generation) for generation in self._generations]
        self._running = set(range(len(self._generations)))
        mailbox.running += len(self._running)

    def take(self, index: int, event: Event) -> None:
        """One event; called in the event loop."""
        self._pending.append((index, event))
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def batches(self) -> AsyncGenerator[Batch]:
        """All events as they arrive. Raises ApiError at the point where a generation fails."""
        while self._running:
            if not self._pending:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            batch, self._pending = self._pending, []
            for place, (index, event) in enumerate(batch):
                if isinstance(event, TextPiece):
                    self._clocks[index].tick(len(event.token_ids))
                elif isinstance(event, Finished):
                    self._end(index, event)
                    if failure := self._failure(index, event):
                        if place:
                            yield batch[:place]
                        raise failure
            yield batch

    async def whole(self, receive: Receive) -> list[tuple[list[Event], Finished]]:
        """For each generation all events before the last, and the last. Stops when the client leaves.

        Raises ApiError if one fails.
        """
        events: list[list[Event]] = [[] for _ in self._generations]
        last: dict[int, Finished] = {}

        async def collect() -> None:
            async with aclosing(self.batches()) as batches:
                async for batch in batches:
                    for index, event in batch:
                        if isinstance(event, Finished):
                            last[index] = event
                        else:
                            events[index].append(event)

        try:
            await until_disconnect(receive, collect())
        finally:
            self.close()
        return [(events[index], last[index]) for index in range(len(events))]

    def close(self) -> None:
        """Cancel the running generations."""
        for index in list(self._running):
            self._generations[index].cancel()
            self._end(index, None)

    def _end(self, index: int, last: Finished | None) -> None:
        self._running.remove(index)
        self._mailbox.running -= 1
        self._clocks[index].stop(last)
        if self._observe and last:
            self._observe(last, time.monotonic() - self._generations[index].submitted_at)

    def _failure(self, index: int, last: Finished) -> ApiError | None:
        """Reason why a generation is incomplete, else None."""
        if last.finish_reason == "timeout" and never_started(self._generations[index]):
            return queue_timeout()
        if last.finish_reason == "timeout":
            return server_error(
                504,
                f"the answer was not complete in time; {last.generated_tokens} tokens were generated: ask for fewer",
                code="timeout",
            )
        if last.finish_reason == "cancelled":  # by the service: a client that left gets no answer
            return server_error(503, "the service is stopping", code="stopped")
        if last.refusal:
            return ApiError(400, last.error or "the request cannot be answered", code=REFUSED[last.refusal])
        if last.finish_reason == "error":
            reason = last.error or "generating failed: the server's log has the reason"
            return server_error(500, reason, code="internal_error")
        return None


class EventStream(Response):
    """Server-sent events, produced by `events` from the engine's events, then `ending`: [DONE].

    A failure before the first event is an ordinary error response; after it, the event that `failure` returns. The
    stream stops when the client leaves. An idle stream sends its status and a comment line every PING_S, so that
    proxies keep it open.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        events: Callable[[AsyncGenerator[Batch]], AsyncGenerator[str]],
        *,
        ending: str = DONE,
        failure: Callable[[ApiError], str] = lambda error: server_sent(json.dumps(error.content)),
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers, self._events = answers, events
        self._ending, self._failure = ending, failure
        self._is_started = False
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await until_disconnect(receive, self._send_all(send))
        except ApiError:
            # Before the first piece an ordinary response is still possible, and the server expects one.
            if not self._is_started:
                raise
        finally:
            self._answers.close()

    async def _send_all(self, send: Send) -> None:
        pinging = asyncio.ensure_future(self._ping(send))
        try:
            await self._send_events(send)
        finally:
            pinging.cancel()

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_S)
            if loop.time() - self._last_sent >= PING_S:
                await self._body(send, ": waiting\n\n")

    async def _body(self, send: Send, text: str, *, more: bool = True) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        if not self._is_started:
            self._is_started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    async def _send_events(self, send: Send) -> None:
        async def body(text: str, *, more: bool = True) -> None:
            await self._body(send, text, more=more)

        try:
            async with aclosing(self._answers.batches()) as batches:
                async for text in self._events(batches):
                    await body(text)
        except ApiError as error:
            if not self._is_started:
                raise
            await body(self._failure(error))
        await body(self._ending, more=False)


def server_sent(data: str) -> str:
    """One event; `data` has no line breaks."""
    return f"data: {data}\n\n"


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`. When the client leaves, cancels it and raises ApiError 499, for the log."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_LEFT, "the client left", code="client_left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
