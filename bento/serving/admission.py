"""Whether the service takes requests now: no while it starts, when it is broken and while it drains.

The queue itself, with its bounds and deadlines, is the engine's. Draining is what SIGTERM starts: the port stays open,
new requests are answered 503, those under way finish, and the process ends when the last has or the grace period is
over.
"""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from bento.errors import ApiError, server_error
from bento.serving.models import Models
from model.generation.requests import Generation

logger = logging.getLogger("bentoml.admission")
RETRY_AFTER_S = 5
LAST_ANSWERS_S = 5.0
"""After the grace period: time for those that were cancelled to be told, and for clients to read what is left."""


class Admission:
    """The service's state, and how many requests are under way."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.is_draining = False
        self.has_failed = False
        """The model could not be loaded."""
        self.waits_for = "the model is being loaded: try again"
        """What requests are told while there is no model."""
        self.under_way = 0

    def refusal(self) -> ApiError | None:
        """Why no request is taken, None where one is. An engine that restarts refuses by itself."""
        served = self._models.current
        if self.is_draining:
            return unavailable("the service is stopping: another instance or the next one answers", "draining")
        if self.has_failed or (served and not served.engine.is_alive):
            return unavailable("the model has stopped and does not come back without a restart", "stopped")
        if served is None:
            return unavailable(self.waits_for, "loading")
        return None

    async def drain(self, timeout_s: float, cancel: Callable[[], Awaitable[None]]) -> None:
        """Take nothing more and wait until nothing is under way, calling `cancel` when `timeout_s` are over."""
        self.is_draining = True
        logger.info("draining: %d requests under way, at most %g s", self.under_way, timeout_s)
        await self._wait_for_last(timeout_s)
        if self.under_way:
            logger.warning("the grace period is over: %d requests are cancelled", self.under_way)
            await cancel()
            await self._wait_for_last(LAST_ANSWERS_S)

    async def _wait_for_last(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self.under_way and loop.time() < end:
            await asyncio.sleep(0.05)


def never_started(generation: Generation) -> bool:
    """Whether a generation that timed out did so in the queue, and not by the deadline of the whole answer."""
    limit_s, waited_s = generation.request.timeout_s, time.monotonic() - generation.submitted_at
    return generation.started_at is None and (limit_s is None or waited_s < limit_s)


def unavailable(message: str, code: str) -> ApiError:
    """A 503 that says when to try again."""
    return server_error(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def queue_timeout() -> ApiError:
    """For a generation that never started."""
    return unavailable("no place became free in time: try again", "queue_timeout")


class AdmissionMiddleware:
    """Refuses requests that would need the model (all but GET and HEAD) where the model takes none; counts the others,
    each of which holds the model that serves when it comes: `request.state.served`.
    """

    def __init__(self, app: ASGIApp, *, admission: Admission, models: Models) -> None:
        self.app, self._admission, self._models = app, admission, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        if refusal := self._admission.refusal():
            raise refusal
        self._admission.under_way += 1
        try:
            with self._models.hold() as served:
                scope.setdefault("state", {})["served"] = served
                await self.app(scope, receive, send)
        finally:
            self._admission.under_way -= 1


def drain_on_signal(admission: Admission, timeout_s: float, cancel: Callable[[], Awaitable[None]]) -> None:
    """From now on SIGTERM and SIGINT drain before the server ends; a second SIGINT does not wait.

    Called in the event loop of a uvicorn server, which has installed its own handlers: they close the port at once, and
    a request that comes a moment later would find nobody. Does nothing in another thread (a test's client).
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []  # a task that nobody holds may be collected before it ends

    for number in (signal.SIGTERM, signal.SIGINT):
        end_server = signal.getsignal(number)
        if not callable(end_server):
            continue

        def handle(
            number: int,
            frame: FrameType | None,
            end_server: Callable[[int, FrameType | None], object] = end_server,
        ) -> None:
            async def drain_and_end() -> None:
                try:
                    await admission.drain(timeout_s, cancel)
                finally:
                    _bound_the_end(end_server)
                    end_server(number, None)

            if not admission.is_draining:
                admission.is_draining = True
                loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(drain_and_end())))
            elif number == signal.SIGINT:
                end_server(number, frame)

        signal.signal(number, handle)


def _bound_the_end(end_server: object) -> None:
    """Give a client that does not read its answer a few seconds: uvicorn would wait for it for ever."""
    server = getattr(end_server, "__self__", None)
    if isinstance(server, uvicorn.Server):
        server.config.timeout_graceful_shutdown = int(LAST_ANSWERS_S)
