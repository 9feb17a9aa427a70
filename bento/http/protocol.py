"""HTTP/1 connections: uvicorn's httptools protocol with the limits and tolerance of a public server.

uvicorn does not limit headers, idle connections or slow requests, treats an upgrade request as the end of HTTP and
drops the body, and answers malformed requests in plain text. This class adds:

- bounds: bytes and number of headers, bytes of chunk extensions and trailers (431), seconds until a request has arrived
  (408), connections, idle time, pipelining;
- upgrade requests (h2c, websocket) are ignored, as RFC 9110 section 7.8 allows, and the body is read;
- a client that has closed its sending side (a half-closed connection) still gets its answer;
- HTTP/1.0 clients get streams without chunks; malformed requests get the service's error object;
- a client that uses more than its share of the event loop waits until more is read from it
  (`bento/serving/shares.py`), and so does one that sends a request in tiny pieces, whose bytes gather meanwhile.

httptools is kept because h11 costs 6 to 9 microseconds for each streamed chunk against 1.7 (bench/LOG.md). Tested with
uvicorn 0.54.0 and httptools 0.9.0. The body's deadline is in `upload.py`.
"""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from bento.errors import error_content
from bento.serving.shares import CHARGE, CONNECTION_S, ClientShares

MAX_HEAD_BYTES = 65_536
MAX_HEADERS = 200
MAX_PIPELINED = 16
MAX_CHUNKS = 16_384
"""Chunks of a body: each costs a microsecond or two, however few bytes it has."""
FEED_BYTES = 4096
"""Bytes passed to the parser at a time, which limits the requests parsed from one read."""
LINGER_S, MAX_DISCARDED = 1.0, 1_000_000
"""After a refusal: seconds and bytes that the rest of the request is read for. To close a socket with unread bytes
resets the connection, and the client may lose the answer."""
FEED_AT_ONCE = 16
"""Pieces that the parser consumes before the event loop serves other connections."""
SHORT_READ, MAX_SHORT_READS, GATHER_S = 1024, 8, 0.02
"""After this many reads of a request that brought fewer bytes than SHORT_READ, seconds for which its bytes gather: each
read costs a turn of the parser, the event loop and the upload, whether it brings one byte or thousands."""
HOST = re.compile(rb"(\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~%!$&'()*+,;=-]*)(:[0-9]*)?")
"""The syntax of RFC 3986 section 3.2.2; a request for no host has an empty one."""
WRONG_VERSION = "HTTP/{} is not spoken here: use HTTP/1.1"
HOP_BY_HOP = {b"upgrade", b"http2-settings"}
MESSAGE_BEGAN = "message_began"
"""Key of the scope's state: `time.monotonic()` at the first byte of the request, seconds."""
HALF_CLOSE_S = 0.2
"""If the client's data ends within this time of its request, the end belongs to the request."""
FIRST_PROBE_S, PROBE_S = 1.0, 5.0
RESET_S = 0.02
LENIENCIES = {"lenient_data_after_close": True, "lenient_version": True}
"""Uvicorn's, and versions: HTTP/1.2 is answered as 1.1 (RFC 9110 section 2.5), `_wrong_head` refuses HTTP/3."""
TCP_CLOSED = 7
"""TCP_CLOSE of Linux's tcp_states.h."""


@dataclass
class ConnectionLimits:
    """Bounds on all connections of one server.

    receive_timeout_s: from a new connection, or a request's first byte, until the request is complete.
    keep_alive_s: idle time between two requests. max_connections: beyond it, each new connection closes the longest
    idle one.
    """

    receive_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    max_connections: int = 4096
    idle: "dict[Http1Protocol, None]" = field(default_factory=dict)
    """Connections without a request in progress, the longest idle first."""
    shares: ClientShares = field(default_factory=ClientShares)

    def make_room(self, connections: int) -> bool:
        """Close idle connections to make room for one more. False if none is idle."""
        if connections <= self.max_connections:
            return True
        for protocol in self.idle:
            del self.idle[protocol]
            protocol.transport.abort()
            return True
        return False


def protocol_class(limits: ConnectionLimits) -> Callable[..., "Http1Protocol"]:
    """The protocol class for uvicorn's setting `http`."""
    return partial(Http1Protocol, limits=limits)


class Http1Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser.set_dangerous_leniencies(**LENIENCIES)
        self._limits = limits
        self.timeout_keep_alive = limits.keep_alive_s  # type: ignore[assignment]
        self._received = bytearray()
        self._is_feeding = self._is_in_head = self._is_in_message = self._is_refused = False
        self._has_upgrade_offer = False
        self._head_bytes = 0
        """Bytes of the head, or since the last byte of a body: of chunk extensions and trailers."""
        self._chunks = self._discarded = self._short_reads = 0
        self._began = self._completed_at = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._later: asyncio.TimerHandle | None = None
        """When the received bytes that had to wait are parsed."""
        self._refusal: tuple[int, str, str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request; refuse the connection if there are too many."""
        super().connection_made(transport)
        self._client_host = self.client[0] if self.client else ""
        self._charge(CONNECTION_S)
        self.flow = _Flow(transport, self._received)
        if not self._limits.make_room(len(self.connections)):
            self._refuse(503, "too many connections: try again", "too_many_connections")
            return
        self._limits.idle[self] = None
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the limits."""
        self._limits.idle.pop(self, None)
        self._stop_deadline()
        if self._later:
            self._later.cancel()
        self._received.clear()
        for cycle, _ in self.pipeline:
            cycle.disconnected = True
        self.pipeline.clear()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, a few requests at a time."""
        self._unset_keepalive_if_required()
        if self._is_refused:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED:
                self.transport.close()
            return
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._start_deadline()
        self._received += data
        self._short_reads += len(data) < SHORT_READ
        if self._is_in_message and self._short_reads > MAX_SHORT_READS and not self._later:
            self._wait(GATHER_S)
        self._feed()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep a half-closed connection open for its pending answers.

        A client that closed its sending side and one that left look the same. If the end comes with the request, the
        client is assumed to wait. Later, repeatedly while the answer is not ready, the client gets an interim response,
        which clients skip (RFC 9110 section 15.2) and which a client that left answers with a reset.
        """
        due = self.cycle is not None and not self.cycle.response_complete and not self._is_in_message
        if not due or self.scheme == "https" or not hasattr(socket, "TCP_INFO"):
            return None
        came_with_request = self.loop.time() - self._completed_at < HALF_CLOSE_S
        is_old = self.scope["http_version"] == "1.0"  # HTTP/1.0 has no interim responses
        if is_old and not came_with_request:
            return None
        self.cycle.keep_alive = False
        if not is_old:
            self.loop.call_later(FIRST_PROBE_S if came_with_request else 0, self._probe)
        return True

    def _probe(self) -> None:
        if self.transport.is_closing() or self.pipeline or self.cycle.response_started:
            return  # writing the answers shows whether the client is connected
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(RESET_S, self._abort_if_reset)
        self.loop.call_later(PROBE_S, self._probe)

    def _abort_if_reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        if self.transport.is_closing() or sock is None:
            return
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSED:
            self.transport.abort()

    def _feed(self) -> None:
        if self._is_feeding or self._later:  # a response that completes while the parser runs, or waits
            return
        wait_s = self._limits.shares.wait_s(self._client_host)
        if wait_s > 0:
            self._wait(wait_s)
            return
        self._is_feeding = True
        began, pieces = time.thread_time(), 0
        try:
            while self._received and len(self.pipeline) < MAX_PIPELINED and not self.transport.is_closing():
                if pieces == FEED_AT_ONCE:
                    self._wait(0)
                    break
                piece = bytes(self._received[:FEED_BYTES])
                del self._received[:FEED_BYTES]
                self._parse(piece)
                pieces += 1
                if self._is_refused:
                    self._received.clear()
        finally:
            self._is_feeding = False
            self._charge(time.thread_time() - began)
        if self._received:
            self.flow.pause_reading()

    def _wait(self, seconds: float) -> None:
        self.flow.pause_reading()
        self._later = self.loop.call_later(seconds, self._feed_later)

    def _feed_later(self) -> None:
        self._later = None
        self._feed()
        self._read_on()

    def _read_on(self) -> None:
        """Resume reading unless received bytes wait for the parser, or an unanswered body for the app."""
        body = self.cycle.body if self.cycle and not self.cycle.response_complete else b""
        if not (self._received or self._later or len(body) > HIGH_WATER_LIMIT or self.transport.is_closing()):
            self.flow.resume_reading()

    def _charge(self, seconds: float) -> None:
        self._limits.shares.charge(self._client_host, seconds)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        cost = self._limits.shares.request(self._client_host)

        async def charged(scope: Any, receive: Any, send: Any) -> None:
            CHARGE.set(cost.charge)
            try:
                await app(scope, receive, send)
            finally:
                cost.end()

        super()._start_asgi_task(cycle, charged)

    def _parse(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as pause:
            rest = piece[pause.args[0] :]
            if self._has_upgrade_offer:
                self._parse_without_offer(rest)
            else:  # CONNECT: the following bytes would belong to a tunnel
                self._refuse(405, "CONNECT is not a method of this service", "http_405")
            return
        except httptools.HttpParserError as error:
            if "PRI" in str(error):  # the method of the HTTP/2 connection preface
                self._refusal = (505, WRONG_VERSION.format("2"), "http_version")
            reason = f"the request is not valid HTTP/1.1 ({error})"
            self._refuse(*(self._refusal or (400, reason, "invalid_http")))
            return
        if self._is_in_message:
            self._head_bytes += len(piece)
            if self._head_bytes > MAX_HEAD_BYTES:
                what = "headers" if self._is_in_head else "chunk extensions or trailers"
                self._refuse(431, f"the {what} are longer than {MAX_HEAD_BYTES:,} bytes", "headers_too_large")

    def _parse_without_offer(self, rest: bytes) -> None:
        """Parse the request again without its upgrade header, then the bytes after its head."""
        self._has_upgrade_offer = False
        head = [self.scope["method"].encode(), b" ", self.url, b" HTTP/", self.scope["http_version"].encode(), b"\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in HOP_BY_HOP)
            if name not in HOP_BY_HOP:
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(**LENIENCIES)
        self._parse(b"".join([*head, b"\r\n"]))
        self._head_bytes = 0
        self._received[:0] = rest

    def on_message_begin(self) -> None:
        """Parser: the first byte of a request."""
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True
        self._head_bytes = self._chunks = 0
        if self._deadline is None:
            self._start_deadline()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser: a header."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refusal = (431, f"the request has more than {MAX_HEADERS} headers", "too_many_headers")
            raise ValueError

    def on_chunk_header(self) -> None:
        """Parser: a chunk of a body without a stated length."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            self._refusal = (
                413,
                f"the body comes in more than {MAX_CHUNKS:,} chunks: send larger ones",
                "too_many_chunks",
            )
            raise ValueError

    def on_headers_complete(self) -> None:
        """Parser: the head is complete. Start the app, or queue the request after the current one."""
        self._is_in_head = False
        self._head_bytes = 0
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = self.parser.get_http_version()
        if self._refusal is None and (refusal := self._wrong_head()):
            self._refusal = refusal
            raise ValueError
        if self.parser.should_upgrade():
            self._has_upgrade_offer = self.scope["method"] != "CONNECT"
            return
        if self.url == b"*":  # OPTIONS * asks about the server as a whole
            raw_path, query = b"*", b""
        else:
            try:
                parsed = httptools.parse_url(self.url)
            except httptools.HttpParserInvalidURLError:
                self._refusal = (400, "the target of the request is not a path or an http address", "invalid_http")
                raise
            raw_path, query = parsed.path or b"/", parsed.query or b""
        self.scope["path"] = self.root_path + unquote(raw_path.decode("ascii"))
        self.scope["raw_path"] = self.root_path.encode("ascii") + raw_path
        self.scope["query_string"] = query
        self.scope["state"][MESSAGE_BEGAN] = self._began
        self._stop_deadline()
        self._limits.idle.pop(self, None)
        if self.scope["method"] == "POST":
            self._limits.shares.arrive(self._client_host)
        earlier = self.cycle
        is_old = self.scope["http_version"] == "1.0"
        self.cycle = (_Http10Cycle if is_old else _Cycle)(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and not is_old,
            keep_alive=not is_old and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if earlier is None or earlier.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))

    def _wrong_head(self) -> tuple[int, str, str] | None:
        """Violations of RFC 9112 (sections 2.3, 3.2, 6.1) that the parser accepts: status, message and code."""
        version = self.scope["http_version"]
        if not version.startswith(("0.", "1.")):
            return 505, WRONG_VERSION.format(version), "http_version"
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1:
            return 400, "the request has several Host headers: send one", "invalid_http"
        if not hosts and version == "1.1":
            return 400, "the request has no Host header, which HTTP/1.1 requires", "invalid_http"
        if hosts and not HOST.fullmatch(hosts[0]):
            return 400, "the Host header is not a host name or address, with or without a port", "invalid_http"
        codings = b",".join(value for name, value in self.headers if name == b"transfer-encoding")
        if codings and codings.strip().lower() != b"chunked":
            return 501, "Transfer-Encoding has another value than chunked: compress with Content-Encoding", "encoding"
        return None

    def on_body(self, body: bytes) -> None:
        """Parser: a part of the body."""
        super().on_body(body)
        self._head_bytes = 0

    def on_message_complete(self) -> None:
        """Parser: the body is complete."""
        self._is_in_message = False
        self._short_reads = 0
        self._completed_at = self.loop.time()
        if self._has_upgrade_offer or self.cycle is None:
            return
        if self.cycle.response_complete:
            self._stop_deadline()  # the rest of a body that was answered before it arrived
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Continue with the next request after the app has answered."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal and not self.pipeline and self.cycle.response_complete:
            self._refuse(*self._refusal)
        elif self.cycle.response_complete:
            self._limits.idle[self] = None
            if self._is_in_message:  # the rest of the body is still arriving
                self._start_deadline()
        self._feed()
        self._read_on()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's own refusal, in the service's error shape."""
        self._refuse(400, msg, "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the app and close. Waits for the answers of earlier requests of this connection."""
        self._is_refused = True
        self._stop_deadline()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not self._is_in_message or self._is_in_head or self.pipeline:
                self._refusal = (status, message, code)  # a later request is invalid: answer the earlier ones first
                return
            cycle.disconnected = True  # its own body is invalid: the app stops
            cycle.waiting_for_100_continue = False  # nothing can be written after the refusal
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = json.dumps(error_content(message, type=kind, param=None, code=code)).encode()
        phrase = HTTPStatus(status).phrase
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        if not self.transport.is_closing():
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            if status == 503 or not self.transport.can_write_eof():
                self.transport.close()
                return
            self.transport.write_eof()
            self._received.clear()
            self.flow.resume_reading()
            self.loop.call_later(LINGER_S, self.transport.close)

    def _start_deadline(self) -> None:
        self._stop_deadline()
        self._began = time.monotonic()
        self._deadline = self.loop.call_later(self._limits.receive_timeout_s, self._miss_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _miss_deadline(self) -> None:
        self._deadline = None
        if self.cycle is not None and self._is_in_message and not self._is_in_head:
            self.transport.abort()  # answered long ago, and the body is still incomplete
            return
        self._refuse(408, f"no request arrived in {self._limits.receive_timeout_s:g} s", "request_timeout")


class _Flow(FlowControl):
    """Pauses reading while received bytes wait for the parser."""

    def __init__(self, transport: asyncio.Transport, received: bytearray) -> None:
        super().__init__(transport)
        self._received = received

    def resume_reading(self) -> None:
        """Resume reading; uvicorn's request cycle and the protocol call it."""
        if not self._received:
            super().resume_reading()


class _Cycle(RequestResponseCycle):
    """A response that closes the connection if the client still waits for `100 Continue`: whether it sends the body
    after a final status is its choice (RFC 9110, section 10.1.1), so the next request could not be told from it.
    """

    async def send(self, message: Any) -> None:
        """ASGI."""
        if self.waiting_for_100_continue and self.more_body:
            self.keep_alive = False
        await super().send(message)


class _Http10Cycle(RequestResponseCycle):
    """A response to HTTP/1.0, which has no chunked encoding: a body of unknown length ends with the connection."""

    async def send(self, message: Any) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            self._is_unbounded = b"content-length" not in names and message["status"] not in (204, 304)
            if self._is_unbounded:
                self.chunked_encoding = False
        elif self._is_unbounded and self.scope["method"] != "HEAD":
            self.expected_content_length = len(message.get("body", b"")) + bool(message.get("more_body"))
        await super().send(message)
