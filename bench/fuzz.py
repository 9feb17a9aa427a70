"""Random requests to a real server process: routes, methods, headers, framing and bodies, valid and not.

    python -m bench.fuzz [MODEL_DIR] [--requests 20000] [--clients 8] [--seed 0]

Without a directory it makes a small model with random weights. The routes and their fields are those of the service's
own /openapi.json. Reported are statuses, server errors (500 and above, except those of EXPECTED), hangs (no complete
answer and no closed connection within WAIT_S, although the service's time limits are shorter), the requests behind
both, and the growth of the worker's memory from the first tenth of the requests to the last. A valid request at the end
must have its answer of the start.
"""

import argparse
import json
import random
import re
import socket
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.server import HOST, Server, run_bench, serve
from model.build import build_config, build_model
from model.settings import ModelSettings, TokenizerSettings
from model.text.tokenizer import train_tokenizer

WAIT_S = 20.0
EXPECTED = ("501", "503", "504", "505")
"""Statuses of an unknown method, a busy service, a time limit and an unknown version of HTTP."""
LIMITS = {
    "REX_RECEIVE_TIMEOUT_S": "3",
    "REX_REQUEST_TIMEOUT_S": "10",
    "REX_QUEUE_TIMEOUT_S": "8",
    "REX_KEEP_ALIVE_S": "5",
}
PLACES = (
    "/",
    "/docs",
    "/redoc",
    "/health",
    "/livez",
    "/readyz",
    "/ping",
    "/version",
    "/metrics",
    "/server_info",
    "/tokenizer_info",
    "/schema.json",
    "/openapi.json",
    "/page/app.js",
    "/v1/models",
    "/v1/models/x",
    "/v1",
    "/nothing",
    "/v1/completions/",
    "//v1//models",
    "/%2e%2e/etc",
    "/v1/models/%00",
    "*",
    "http://x/health",
)
METHODS = (
    ("POST",) * 12 + ("GET",) * 4 + ("HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW", "get", "")
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.0,
    0.5,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "\0",
    "🦖",
    "\\ud800",
    "x" * 3000,
    "<|endoftext|>",
    [],
    {},
    [[]],
    [None],
    [1, "x"],
    [[2], [3]],
    {"a": {}},
    {"2": 1},
    [{"role": "user", "content": "x"}],
    {"type": "json_object"},
    {"$ref": "#"},
    "[a-z]+",
    'start: "a" start',
    ["a", "b"],
)
HEADERS = (
    "Accept: text/event-stream",
    "Accept-Encoding: gzip",
    "Authorization: Bearer x",
    "Authorization: \xff",
    "Cookie: a=b",
    "Connection: close",
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "Expect: 100-continue",
    "Expect: x",
    "Content-Encoding: gzip",
    "Content-Encoding: deflate",
    "Content-Encoding: x",
    "Origin: http://x",
    "Range: bytes=0-1",
    "X-Request-Id: a\tb",
    "X-Request-Id: " + "x" * 90,
    "X-Padding: " + "x" * 9000,
    "X-Padding: " + "x" * 90_000,
    "No colon",
    ": no name",
    " folded",
    "Host: y",
    "Content-Length: 5",
    "Content-Length: -1",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: x",
    "traceparent: 00-x",
    "If-None-Match: x",
)


@dataclass
class Tally:
    """What came back. errors, hangs: the first bytes of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def save_small(directory: Path) -> Path:
    """A model of two small layers with random weights, and a tokenizer of this folder's sources."""
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    tokenizer = train_tokenizer(TokenizerSettings(vocab_size=1024), texts)
    shape = ModelSettings(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    build_model(build_config(shape, len(tokenizer), *special), seed=0).save_pretrained(directory)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(directory)
    return directory


class Requests:
    """Random requests, made of a service's OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._bodies: dict[str, dict[str, Any]] = {}
        self._fields: dict[str, list[str]] = {}
        schemas = document["components"]["schemas"]
        for path, operations in document["paths"].items():
            if "post" in operations:
                schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
                properties = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
                self._fields[path] = list(properties)
                self._bodies[path] = {
                    name: about["examples"][0] for name, about in properties.items() if "examples" in about
                }
        self._all_fields = sorted({name for names in self._fields.values() for name in names})

    def one(self, rng: random.Random) -> bytes:
        """The bytes of one request."""
        path = rng.choice(list(self._bodies)) if rng.random() < 0.8 else rng.choice(PLACES)
        method = "POST" if path in self._bodies and rng.random() < 0.85 else rng.choice(METHODS)
        body = self._body(rng, path) if method == "POST" or rng.random() < 0.3 else b""
        version = rng.choice(("1.1",) * 12 + ("1.0", "2.0", "x"))
        lines = [f"{method} {path} HTTP/{version}", "Host: x", "Content-Type: application/json"]
        if rng.random() < 0.1:
            del lines[rng.choice((1, 2))]
        if rng.random() < 0.3:
            lines += rng.choices(HEADERS, k=rng.choice((1, 1, 2, 40)))
        if rng.random() < 0.85:
            lines.append(f"Content-Length: {len(body)}")
        elif rng.random() < 0.7:
            lines.append("Transfer-Encoding: chunked")
            body = b"".join(_chunks(rng, body))
        elif rng.random() < 0.5:
            lines.append(f"Content-Length: {len(body) + rng.choice((-1, 1, 99))}")
        head = rng.choice(("\r\n",) * 15 + ("\n",)).join([*lines, "", ""]).encode("latin-1", "replace")
        whole = bytearray(head + body)
        if rng.random() < 0.05:
            for _ in range(rng.randint(1, 4)):
                whole[rng.randrange(len(whole))] = rng.randrange(256)
        if rng.random() < 0.03:
            del whole[rng.randint(1, len(whole)) :]
        return bytes(whole) * (2 if rng.random() < 0.03 else 1)

    def _body(self, rng: random.Random, path: str) -> bytes:
        known = self._fields.get(path, self._all_fields)
        body = {**self._bodies.get(path, {}), **({"max_tokens": 3} if "max_tokens" in known else {})}
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            body[rng.choice(known if rng.random() < 0.9 else self._all_fields)] = rng.choice(VALUES)
        if body and rng.random() < 0.1:
            body.pop(rng.choice(list(body)))
        data = bytearray(json.dumps(body).encode())
        if rng.random() < 0.08:
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)


def _chunks(rng: random.Random, body: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(body):
        size = rng.randint(1, len(body))
        part = body[at : at + size]
        yield f"{len(part):x}".encode() + rng.choice((b"", b"", b";x=y", b"z")) + b"\r\n" + part + b"\r\n"
        at += size
    yield rng.choice((b"0\r\n\r\n",) * 6 + (b"0\r\nX: y\r\n\r\n", b"", b"-1\r\n\r\n"))


def send(port: int, request: bytes, tally: Tally, rng: random.Random) -> None:
    """Send one request, half of them in two parts; count its answer."""
    received = bytearray()
    leaves_early = rng.random() < 0.05
    try:
        with socket.create_connection((HOST, port), timeout=WAIT_S) as connection:
            at = rng.randrange(len(request)) if rng.random() < 0.5 else 0
            connection.sendall(request[:at])
            connection.sendall(request[at:])
            if rng.random() < 0.3 and not leaves_early:
                connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + WAIT_S
            while not leaves_early and time.monotonic() < end and (part := connection.recv(1 << 16)):
                received += part
                if _is_complete(request, received):
                    break
            outcome = "left" if leaves_early else _status(received)
            is_hanging = time.monotonic() >= end
    except TimeoutError:
        outcome, is_hanging = _status(received), True
    except OSError:
        outcome, is_hanging = _status(received), False
    with tally.lock:
        tally.statuses[outcome] += 1
        if is_hanging:
            tally.hangs.append(repr(request[:2000]))
        if outcome[:1] == "5" and outcome not in EXPECTED:
            tally.errors.append(repr(request[:2000]))


def _final(received: bytearray) -> bytes:
    """The response without interim ones such as 100 Continue."""
    data = bytes(received)
    while data[:10].split(b" ")[-1][:1] == b"1" and b"\r\n\r\n" in data:
        data = data.partition(b"\r\n\r\n")[2]
    return data


def _status(received: bytearray) -> str:
    if not received:
        return "closed"
    parts = (_final(received) or bytes(received))[:20].split(b" ")
    return parts[1].decode("latin-1") if received[:5] == b"HTTP/" and len(parts) > 1 else "no status"


def _is_complete(request: bytes, received: bytearray) -> bool:
    """Whether the response has ended, although its connection stays open."""
    head, separator, body = _final(received).partition(b"\r\n\r\n")
    if not separator:
        return False
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return length is not None and (request.startswith(b"HEAD") or len(body) >= int(length[1]))


def measure(model_dir: Path, *, requests: int, clients: int, seed: int) -> dict[str, Any]:
    """Send all requests to one server."""
    with tempfile.TemporaryDirectory() as folder, serve(model_dir, Path(folder), **LIMITS) as server:
        with urllib.request.urlopen(f"http://{HOST}:{server.port}/openapi.json", timeout=30) as answer:
            made = Requests(json.load(answer))
        first = server.ask([5, 6, 7], 8).events
        tally, started = Tally(), time.perf_counter()
        memory = [_send_part(server, made, tally, clients, range(seed, seed + requests // 10))]
        memory.append(_send_part(server, made, tally, clients, range(seed + requests // 10, seed + requests)))
        last = server.ask([5, 6, 7], 8)
        log = (Path(folder) / "serve.log").read_text()
        return {
            "requests": requests,
            "seconds": time.perf_counter() - started,
            "statuses": dict(tally.statuses.most_common()),
            "server_errors": len(tally.errors),
            "hangs": len(tally.hangs),
            "tracebacks": log.count("Traceback"),
            "memory_mb": memory,
            "memory_growth_mb": memory[1] - memory[0],
            "answers_at_the_end": last.status == 200 and last.events == first,
            "examples": [*tally.errors[:5], *tally.hangs[:5], *_first_traceback(log)],
        }


def _first_traceback(log: str) -> list[str]:
    """The first traceback of the log and the lines after it, if there is one."""
    return re.findall(r"^.*Traceback(?:.*\n){1,40}", log, re.MULTILINE)[:1]


def _send_part(server: Server, made: Requests, tally: Tally, clients: int, seeds: range) -> float:
    """The worker's memory afterward, in MB."""

    def one(seed: int) -> None:
        rng = random.Random(seed)
        send(server.port, made.one(rng), tally, rng)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, seeds))
    return float(server.worker().memory_info().rss) / 1e6


def table(result: dict[str, Any]) -> str:
    """One line for each figure, then the requests behind errors and hangs, and a traceback."""
    names = ("requests", "seconds", "server_errors", "hangs", "tracebacks", "memory_growth_mb", "answers_at_the_end")
    rows = [f"{name:20} {result[name]}" for name in names]
    return "\n".join([*rows, f"{'statuses':20} {result['statuses']}", *result["examples"]])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8, help="that send at once")
    parser.add_argument("--seed", type=int, default=0, help="of the first request; each has the next one")
    run_bench(parser, save_small, measure, table)


if __name__ == "__main__":
    main()
