"""The middleware of every route: the client's share, request id, body limit, keys, admission, log line, metrics, span
and error answers.

A log line holds numbers, values from fixed sets and an id of plain characters; never prompts, texts or keys.
"""

import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento.errors import ApiError, server_error
from bento.http.auth import ApiKeyMiddleware
from bento.http.upload import UploadMiddleware
from bento.serving.admission import Admission, AdmissionMiddleware
from bento.serving.models import Models
from bento.serving.shares import CHARGE, Charged
from bento.telemetry.metrics import ServiceMetrics
from bento.telemetry.record import CLIENT_LEFT, RequestRecord

logger = logging.getLogger("bentoml.requests")  # BentoML's log configuration shows loggers below `bentoml`
CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
REJECTIONS = {429, 503}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}


def add_middleware(
    app: FastAPI,
    *,
    metrics: ServiceMetrics,
    admission: Admission,
    models: Models,
    max_body_bytes: int,
    receive_timeout_s: float,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
) -> None:
    """Add the middleware of this module to `app`; the last one added is the outermost."""
    app.add_middleware(AdmissionMiddleware, admission=admission, models=models)
    app.add_middleware(
        UploadMiddleware,
        max_body_bytes=max_body_bytes,
        timeout_s=receive_timeout_s,
        refusal=admission.refusal,
        uploads=admission.uploads,
    )
    app.add_middleware(ApiKeyMiddleware, keys=api_keys)
    app.add_middleware(RequestMiddleware, metrics=metrics)
    if cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(ChargeMiddleware)


class ChargeMiddleware:
    """Charges the client with the CPU time of its request; streams are exempt, because the engine shares generation.

    Part of the app and not of the connection, since BentoML runs the app in a task of its own, whose time `Charged`
    does not see.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        charge = CHARGE.get()
        if charge is None:
            await self.app(scope, receive, send)
            return

        async def send_free(message: Message) -> None:
            if message.get("more_body"):
                answer.is_free = True
            await send(message)

        answer = Charged(self.app(scope, receive, send_free), charge)
        await answer


class Cors(CORSMiddleware):
    """Starlette's, with refusals of preflight requests in the service's error shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight request."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        kept = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return ApiError(400, bytes(answer.body).decode(), code="cors", headers=kept).response()


class RequestMiddleware:
    """Outermost middleware but CORS: the request's record, its log line, and answers to failures."""

    def __init__(self, app: ASGIApp, *, metrics: ServiceMetrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A copy, because the server reads the method from the original scope to drop the body for HEAD.
        inner = {**scope, **as_routed(scope)}
        headers = Headers(scope=scope)
        record = RequestRecord(_request_id(headers), self._metrics)
        inner.setdefault("state", {})["record"] = record

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            await self.app(inner, receive, recording_send)
        except ApiError as refusal:  # from an inner middleware; route errors have FastAPI's handlers
            if record.status == CLIENT_LEFT:
                record.error_code = refusal.content["error"]["code"]
                await refusal.response(inner["path"])(scope, receive, recording_send)
        except Exception:
            # Catch everything: on an exception BentoML's middleware would leave the client waiting until its timeout.
            logger.exception("request %s failed", record.id)
            if record.status == CLIENT_LEFT:
                error = server_error(500, "the server failed; its log has the reason", code="internal_error")
                await error.response(inner["path"])(scope, receive, recording_send)
        finally:
            self._account(inner, headers, record)

    def _account(self, scope: Scope, headers: Headers, record: RequestRecord) -> None:
        route = scope.get("route")
        label = route.path if isinstance(route, APIRoute) else "other"
        seconds = time.monotonic() - record.started
        self._metrics.requests[label, str(record.status), record.finish_reason] += 1
        if record.status in REJECTIONS:
            self._metrics.rejections[record.error_code or str(record.status)] += 1
        if record.finish_reason != "-":
            self._metrics.end_to_end.observe(seconds)
        tracer: Any = getattr(scope["app"].state, "tracer", None)
        trace_id = tracer.record(label, _method(scope), headers, record, seconds) if tracer else None
        logger.info(
            "request id=%s route=%s status=%d prompt_tokens=%d cached_tokens=%d generated_tokens=%d finish_reason=%s "
            "queue_ms=%s first_token_ms=%s ms=%.0f%s",
            record.id,
            label,
            record.status,
            record.prompt_tokens,
            record.cached_tokens,
            record.generated_tokens,
            record.finish_reason,
            _milliseconds(record.queue_s),
            _milliseconds(record.first_token_s),
            1000 * seconds,
            f" trace_id={trace_id}" if trace_id else "",
        )


def as_routed(scope: Scope) -> dict[str, Any]:
    """The method and path that the routes see: HEAD becomes GET, and redundant slashes are removed."""
    path = re.sub("//+", "/", scope["path"])
    return {
        "path": path.rstrip("/") or "/" if path != "*" else path,
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
    }


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def _method(scope: Scope) -> str:
    """The method if it is a known one: invented methods must not become span names."""
    return scope["method"] if scope["method"] in METHODS else "_OTHER"


def _request_id(headers: Headers) -> str:
    """The client's id if it is short and plain (it is logged), else a new one."""
    given = headers.get("x-request-id", "")
    return given if CLIENT_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
