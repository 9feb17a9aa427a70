"""Admission control: the service accepts no requests while it loads, after a failure, or while it drains.

SIGTERM starts draining: the port stays open, new requests are answered 503, running ones finish, and the process ends
after the last of them or after the grace period.
"""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType

from starlette.types import ASGIApp, Receive, Scope, Send

from bento.bentoml_internals import uvicorn_server
from bento.errors import ApiError, server_error
from bento.serving.models import Models
from model.generation.requests import Generation

logger = logging.getLogger("bentoml.admission")
RETRY_AFTER_S = 5
LAST_ANSWERS_S = 5.0
"""After the grace period: time to send the errors of canceled requests, and for clients to read them."""
UPLOAD_GRACE_S = 2.0
"""While draining: time for uploads in progress to complete. They are not work in flight."""


class Admission:
    """The service's state and its number of requests in flight."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.is_draining = False
        self.has_failed = False
        """The model could not be loaded."""
        self.waits_for = "the model is being loaded: try again"
        """The reason given to requests while no model is loaded."""
        self.under_way = 0
        self.uploads: set[asyncio.Timeout] = set()
        """Deadlines of request bodies that are still arriving."""

    def refusal(self) -> ApiError | None:
        """Why the service accepts no requests; None if it does. A restarting engine refuses requests itself."""
        served = self._models.current
        if self.is_draining:
            return unavailable("the service is stopping: another instance or the next one answers", "draining")
        if self.has_failed or (served and not served.engine.is_alive):
            return unavailable("the model has stopped and needs a restart of the service", "stopped")
        if served is None:
            return unavailable(self.waits_for, "loading")
        return None

    async def drain(self, timeout_s: float, cancel: Callable[[], Awaitable[None]]) -> None:
        """Accept nothing more and wait for the requests in flight; after `timeout_s` call `cancel`."""
        self.is_draining = True
        logger.info("draining: %d requests in flight, at most %g s", self.under_way, timeout_s)
        last = asyncio.get_running_loop().time() + UPLOAD_GRACE_S
        for upload in self.uploads:
            upload.reschedule(min(last, upload.when() or last))
        await self._wait_for_last(timeout_s)
        if self.under_way:
            logger.warning("the grace period is over: %d requests are canceled", self.under_way)
            await cancel()
            await self._wait_for_last(LAST_ANSWERS_S)

    async def _wait_for_last(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self.under_way and loop.time() < end:
            await asyncio.sleep(0.05)


def never_started(generation: Generation) -> bool:
    """Whether a generation timed out in the queue, not at the deadline of the whole answer."""
    limit_s, waited_s = generation.request.timeout_s, time.monotonic() - generation.submitted_at
    return generation.started_at is None and (limit_s is None or waited_s < limit_s)


def unavailable(message: str, code: str) -> ApiError:
    """A 503 with a Retry-After header."""
    return server_error(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def queue_timeout() -> ApiError:
    """For a generation that never started."""
    return unavailable("no slot became free in time: try again", "queue_timeout")


class AdmissionMiddleware:
    """Refuses requests that need the model (all but GET and HEAD) while it accepts none, and counts the others. Each
    holds the model that was served at its arrival: `request.state.served`.
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
    """Make SIGTERM and SIGINT drain before the server ends; a second SIGINT ends it at once.

    Called in the event loop of a uvicorn server, whose own handlers would close the port at once and refuse later
    connections. Does nothing in another thread (a test's client).
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop, server = asyncio.get_running_loop(), uvicorn_server()
    tasks: list[asyncio.Task[None]] = []  # keeps a reference: the loop holds tasks weakly

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
                    if server:  # uvicorn would wait forever for a client that does not read its answer
                        server.config.timeout_graceful_shutdown = int(LAST_ANSWERS_S)
                    end_server(number, None)

            if not admission.is_draining:
                admission.is_draining = True
                loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(drain_and_end())))
            elif number == signal.SIGINT:
                end_server(number, frame)

        signal.signal(number, handle)
