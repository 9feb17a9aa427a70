"""Around every route: a request id, the limit on bodies, one log line, metrics, and an answer when anything fails.

A log line says what a request cost, never what it asked: prompts and texts stay out of the log.
"""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento.errors import ApiError, server_error
from bento.metrics import ServiceMetrics

logger = logging.getLogger("bentoml.requests")  # the name decides that the server's log shows it
CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499


@dataclass
class RequestRecord:
    """What is known about one request when it ends; routes fill it in through `request.state.record`."""

    id: str
    started: float = field(default_factory=time.monotonic)
    status: int = CLIENT_LEFT
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str = "-"


class RequestMiddleware:
    """Wraps the routes. max_body_bytes: of a body, however it is sent; more is answered 413."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, metrics: ServiceMetrics) -> None:
        self.app, self._max_body_bytes, self._metrics = app, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(_request_id(headers))
        scope.setdefault("state", {})["record"] = record
        stated = headers.get("content-length", "")
        received_bytes = int(stated) if stated.isdecimal() and int(stated) > self._max_body_bytes else 0

        async def limited_receive() -> Message:
            nonlocal received_bytes
            if received_bytes > self._max_body_bytes:
                raise self._too_large()
            message = await receive()
            if message["type"] == "http.request":
                # Counted besides: a chunked body states no length.
                received_bytes += len(message.get("body", b""))
                if received_bytes > self._max_body_bytes:
                    raise self._too_large()
            return message

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            await self.app(scope, limited_receive, recording_send)
        except Exception:
            # Nothing may leave here: the server around it would leave the client without an answer until its timeout.
            logger.exception("request %s failed", record.id)
            if record.status == CLIENT_LEFT:
                error = server_error(500, "the server failed; its log has the reason", code="internal_error")
                await error.response()(scope, receive, recording_send)
        finally:
            self._account(scope, record)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_body_bytes:,} bytes, the most that is read", code="body_too_large"
        )

    def _account(self, scope: Scope, record: RequestRecord) -> None:
        route = scope.get("route")
        label = route.path if isinstance(route, APIRoute) else "other"
        self._metrics.requests.labels(label, str(record.status)).inc()
        self._metrics.prompt_tokens.inc(record.prompt_tokens)
        self._metrics.generated_tokens.inc(record.generated_tokens)
        logger.info(
            "request id=%s route=%s status=%d prompt_tokens=%d generated_tokens=%d finish_reason=%s ms=%.0f",
            record.id,
            label,
            record.status,
            record.prompt_tokens,
            record.generated_tokens,
            record.finish_reason,
            1000 * (time.monotonic() - record.started),
        )


def _request_id(headers: Headers) -> str:
    """The client's own id where it is short and plain (it ends up in the log), else a new one."""
    given = headers.get("x-request-id", "")
    return given if CLIENT_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
