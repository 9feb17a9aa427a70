"""Connections over raw sockets to a real server: half-closed, pipelined, slow, idle, left, too many."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from bento.http.protocol import ConnectionLimits, Http1Protocol
from tests.bento.conftest import make_service
from tests.bento.http.wire import BODY, LONG, ask, connection, error, host_and_port, post, read_all, read_answer
from tests.bento.openai_service import MAX_BODY_BYTES, Service, on_a_port, running_service

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(receive_timeout_s=1.0) as running:
        yield running


def test_a_half_closed_client_gets_its_answer(address):
    for stream in (False, True):
        body = json.dumps({**json.loads(LONG), "stream": stream}).encode()
        with connection(address) as made:
            made.sendall(post(body))
            made.shutdown(socket.SHUT_WR)
            received = read_all(made)
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"length" in received


def test_the_bytes_of_a_request_in_tiny_pieces_gather_before_they_are_parsed(address, monkeypatch):
    pieces: list[int] = []
    parse = Http1Protocol._parse

    def noting(self: Http1Protocol, piece: bytes) -> None:
        pieces.append(len(piece))
        parse(self, piece)

    monkeypatch.setattr(Http1Protocol, "_parse", noting)
    request = post(BODY)
    with connection(address) as made:
        for _ in range(2):  # on one connection
            pieces.clear()
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for place in range(len(request)):
                made.sendall(request[place : place + 1])
                time.sleep(0.0005)
            assert read_answer(made)[0] == 200
            assert sum(pieces) == len(request)
            assert len(pieces) < len(request) / 3


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_client_that_left_is_not_mistaken_for_a_half_closed_one(how):
    service = make_service()
    try:
        with on_a_port(service.app) as url:
            service.close_gate()
            made = socket.create_connection(host_and_port(url))
            made.sendall(post(LONG, path="/generate"))
            assert service.reached.wait(30)
            if how == "reset":
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            made.close()
            service.opened.set()
            deadline = time.monotonic() + 30
            while service.app.state.admission.under_way:
                service.close_gate()  # a step at a time, so that the text cannot end before the client is missed
                time.sleep(0.1)
                service.opened.set()
                time.sleep(0.01)
                assert time.monotonic() < deadline
            assert service.engine.stats().cancelled_total == 1 or service.steps < 90
    finally:
        service.opened.set()
        service.engine.stop()


def test_pipelined_requests_are_answered_in_order(address):
    count = 500
    paths = ["/v1/models" if i % 2 else "/v1/nothing" for i in range(count)]
    requests = [f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths]
    with connection(address) as made:
        made.sendall(b"".join(requests))
        assert [read_answer(made)[0] for _ in range(count)] == [200 if i % 2 else 404 for i in range(count)]


def test_an_invalid_request_after_valid_ones_is_refused_after_their_answers(address):
    with connection(address) as made:
        made.sendall(post(BODY) + b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\nnonsense\r\n\r\n")
        assert read_answer(made)[0] == 200
        assert read_answer(made)[0] == 200
        assert error(read_answer(made), 400)["code"] == "invalid_http"


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost",
        post(BODY)[:-1],
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
    ],
    ids=["nothing", "empty lines", "headers", "body", "chunked body"],
)
def test_a_request_that_does_not_arrive_is_answered_408(address, begun):
    with connection(address) as made:
        made.sendall(begun)
        answer = read_answer(made)
        assert error(answer, 408)["code"] == "request_timeout"
        assert answer[1]["connection"] == "close"
        assert made.recv(1) == b""


def test_a_request_that_arrives_byte_by_byte_has_the_same_deadline(address):
    with connection(address) as made:
        made.settimeout(0.05)
        answer = b""
        for byte in post(BODY + b" " * 500):
            try:
                made.sendall(bytes([byte]))
                answer = made.recv(4096)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")


def test_the_rest_of_a_refused_body_is_read_so_that_the_refusal_arrives(address):
    with connection(address) as made:
        made.sendall(post(b" " * (20 * MAX_BODY_BYTES)))
        assert error(read_answer(made), 413)["code"] == "body_too_large"
        made.sendall(post(BODY))
        assert read_answer(made)[0] == 200


@pytest.mark.parametrize("size", [100_000, 1_100_000, 3_000_000])
def test_after_a_body_that_was_answered_early_the_connection_goes_on(size):
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.1)  # the body fills the buffers meanwhile
        await JSONResponse({"length": dict(scope["headers"])[b"content-length"].decode()}, 413)(scope, receive, send)

    with on_a_port(refuse) as url, connection(host_and_port(url)) as made:
        for length in (size, 2, size, 3):
            made.sendall(post(b"x" * length))
            assert read_answer(made)[2] == b'{"length":"%d"}' % length


def test_beyond_the_limit_the_longest_idle_connection_makes_room(service):
    with on_a_port(service.app, ConnectionLimits(max_connections=5)) as url:
        address = host_and_port(url)
        first = [socket.create_connection(address, timeout=30) for _ in range(5)]
        try:
            first[0].sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_answer(first[0])[0] == 200  # so that the second is idle for longest
            assert ask(address, post(BODY))[0] == 200
            assert first[1].recv(1) == b""
            first[0].sendall(post(BODY))
            assert read_answer(first[0])[0] == 200
        finally:
            for made in first:
                made.close()


def test_an_idle_connection_is_kept_for_as_long_as_is_said(service):
    limits = ConnectionLimits(receive_timeout_s=0.2, keep_alive_s=1.0)
    with on_a_port(service.app, limits) as url, connection(host_and_port(url)) as made:
        made.sendall(post(BODY))
        assert read_answer(made)[0] == 200
        time.sleep(0.5)  # beyond the deadline of a request, which has not begun
        made.sendall(post(BODY))
        assert read_answer(made)[0] == 200
        assert made.recv(1) == b""  # closed without an answer


def test_a_client_that_leaves_during_its_upload_is_not_an_invalid_request(service, address):
    with connection(address) as made:
        made.sendall(post(BODY)[:-1])
    deadline = time.monotonic() + 30
    while 'status="499"' not in TestClient(service.app).get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
