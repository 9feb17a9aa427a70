"""Reads a request's body before admission: limits its size, time and encoding.

The routes get the body in one piece. An incomplete upload occupies no slot, and a shutdown waits at most two seconds
for it. Connections and headers have their bounds in `protocol.py`.
"""

import asyncio
import time
import zlib
from collections.abc import Callable, MutableSet

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento.errors import ApiError
from bento.http.protocol import MESSAGE_BEGAN
from bento.telemetry.record import CLIENT_LEFT

WITHOUT_BODY = {"GET", "HEAD", "OPTIONS"}
ENCODINGS = ("gzip", "deflate")
MAX_GZIP_MEMBERS = 16
"""Concatenated gzip files in a body: an empty one costs 15 microseconds and the copying of the rest."""
CLOSE = {"Connection": "close"}


class UploadMiddleware:
    """Receives the body. max_body_bytes: of a body, as sent and after decompression. timeout_s: from its first byte of
    the request's head to the last of its body. refusal: returns why requests are not accepted, or None; called before
    and after the upload. uploads: deadlines of uploads in progress, which a shutdown shortens.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        timeout_s: float,
        refusal: Callable[[], ApiError | None],
        uploads: MutableSet[asyncio.Timeout],
    ) -> None:
        self.app, self._max_body_bytes, self._timeout_s = app, max_body_bytes, timeout_s
        self._refusal, self._uploads = refusal, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises ApiError 408, 413, 415, 499, and the result of `refusal`."""
        if scope["type"] != "http" or scope["method"] in WITHOUT_BODY or not _has_route(scope):
            await self.app(scope, receive, send)  # a 404 or 405 needs no body
            return
        if refusal := self._refusal():
            raise refusal
        headers = Headers(scope=scope)
        encoding = _encoding(headers)
        body: bytes | None = await self._read(scope, headers, receive)
        if encoding and body:
            heavy = scope["app"].state.heavy  # 5 ms for a megabyte
            body = await heavy.run(decompress, body, encoding, self._max_body_bytes, holds_lock=False)

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        stated = headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        began = scope["state"].get(MESSAGE_BEGAN, scope["state"]["record"].started)
        body = bytearray()
        try:
            async with asyncio.timeout(began + self._timeout_s - time.monotonic()) as deadline:
                self._uploads.add(deadline)
                try:
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ApiError(
                                CLIENT_LEFT, "the client left before its request was complete", code="client_left"
                            )
                        body += message.get("body", b"")
                        more = message.get("more_body", False)
                        if len(body) > self._max_body_bytes:
                            raise _too_large(self._max_body_bytes)
                finally:
                    self._uploads.discard(deadline)
        except TimeoutError:
            if refusal := self._refusal():  # a shutdown shortened the deadline
                refusal.headers = {**(refusal.headers or {}), **CLOSE}
                raise refusal from None
            raise ApiError(
                408,
                f"the body did not arrive in {self._timeout_s:g} s: {len(body):,} bytes of it did",
                code="request_timeout",
                headers=CLOSE,
            ) from None
        return bytes(body)


def _has_route(scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].router.routes)


def _encoding(headers: Headers) -> str:
    """The body's compression; empty if uncompressed. Raises ApiError 415 for one that is not supported."""
    codings = ",".join(headers.getlist("content-encoding")).lower().replace(" ", "").split(",")
    named = ", ".join(coding for coding in codings if coding not in ("", "identity")).removeprefix("x-")
    if not named:
        return ""
    if named not in ENCODINGS:
        raise ApiError(
            415,
            f"Content-Encoding is {named[:40]!r}: expected {' or '.join(ENCODINGS)}, or none",
            code="unsupported_content_encoding",
            headers={"Accept-Encoding": ", ".join(ENCODINGS)},
        )
    return named


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The decompressed body. Raises ApiError 400 if it is broken, 413 above `max_bytes`."""
    plain = bytearray()
    # 47: gzip or zlib by their headers. Some clients send "deflate" without zlib's header.
    wbits = 47 if encoding == "gzip" or body[0] & 15 == 8 else -zlib.MAX_WBITS
    for _ in range(MAX_GZIP_MEMBERS):
        stream = zlib.decompressobj(wbits)
        try:
            plain += stream.decompress(body, max_bytes + 1 - len(plain))
        except zlib.error:
            raise ApiError(400, f"the body is not {encoding}", code="invalid_encoding") from None
        if len(plain) > max_bytes:
            raise _too_large(max_bytes)
        if not stream.eof:
            raise ApiError(400, f"the body's {encoding} data is cut short", code="invalid_encoding")
        body = stream.unused_data  # gzip files may be concatenated
        if not body:
            return bytes(plain)
    raise ApiError(400, f"the body is more than {MAX_GZIP_MEMBERS} {encoding} texts in a row", code="invalid_encoding")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes:,} bytes, the most that is read", code="body_too_large")
