"""Bytes as clients send them over a raw socket, and answers read from it."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bento.openai_service import GOOD

BODY = json.dumps({**GOOD["/v1/completions"], "temperature": 0}).encode()
LONG = json.dumps({"prompt": "x", "max_tokens": 80, "temperature": 0, "ignore_eos": True}).encode()


def host_and_port(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def post(body: bytes, *headers: str, path: str = "/v1/completions", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json", *headers]
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def connection(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=30) as made:
        yield made


def read_all(made: socket.socket) -> bytes:
    received = bytearray()
    while chunk := made.recv(65536):
        received += chunk
    return bytes(received)


def read_answer(made: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer of a stated length: status, headers, body."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = made.recv(1)
        assert chunk, f"the connection was closed after {received!r}"
        received += chunk
    lines = received.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
    body = b""
    while missing := int(headers.get("content-length", 0)) - len(body):
        body += made.recv(missing)
    return int(lines[0].split()[1]), headers, body


def ask(address: tuple[str, int], request: bytes) -> tuple[int, dict[str, str], bytes]:
    with connection(address) as made:
        made.sendall(request)
        return read_answer(made)


def error(answer: tuple[int, dict[str, str], bytes], status: int) -> dict[str, str]:
    assert answer[0] == status, answer
    assert answer[1]["content-type"] == "application/json"
    body = json.loads(answer[2])
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]
