"""The kinds of abuse: for each a request, made once, and the manner in which clients send it.

`KINDS` is the table. A kind is a function that makes the bytes of a request, in one of the groups below; its manner is
the one of its group. Nothing here measures.
"""

import gzip
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

from bench.server import HOST

ABUSER = "127.0.0.2"
"""The service distinguishes clients by address."""
MB = 1_000_000
COMPLETIONS, TOKENIZE, EMBEDDINGS, CHAT = "/v1/completions", "/tokenize", "/v1/embeddings", "/v1/chat/completions"
CONTEXT, VOCABULARY = 1000, 4000
"""Tokens that fit into the context of any model that is measured, and ids that any vocabulary has."""
TRICKLING = 4
"""Slow requests of a client."""
LONG_TEXT = {"prompt": "def", "max_tokens": 400, "ignore_eos": True}

Make = Callable[[], bytes]
Send = Callable[[socket.socket, bytes, float], None]
"""Sends a request on an open connection and reads what comes, until the answer's end or the clock's given time."""


@dataclass(frozen=True)
class Kind:
    """A request and how it is sent. clients: for each client of the command line."""

    make: Make
    send: Send
    clients: int = 1


def _post(path: str, body: bytes, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _ask(path: str, **body: Any) -> bytes:
    return _post(path, json.dumps(body).encode())


def _get(path: str, **headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {HOST}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def _fill(piece: str, separator: str = ",", size: int = MB - 1000) -> str:
    return separator.join([piece] * (size // (len(piece) + len(separator))))


def _ids(count: int) -> list[int]:
    return [random.randrange(2, VOCABULARY) for _ in range(count)]


# Bodies that are costly to read.


def many_fields() -> bytes:
    """An object with 60,000 fields."""
    return _post(COMPLETIONS, ("{" + ",".join(f'"field{number}":1' for number in range(60_000)) + "}").encode())


def few_fields() -> bytes:
    """As many unknown fields as the service parses."""
    return _ask(COMPLETIONS, prompt="x", **{f"field{number}": 1 for number in range(8_000)})


def empty_lists() -> bytes:
    """A prompt of lists without tokens."""
    return _post(COMPLETIONS, f'{{"prompt":[{_fill("[]")}]}}'.encode())


def deep_and_wide() -> bytes:
    """Objects of lists of objects."""
    piece = '{"a":' * 20 + "[1,2,3]" + "}" * 20
    return _post(COMPLETIONS, f'{{"prompt":"x","metadata":[{_fill(piece)}]}}'.encode())


def many_numbers() -> bytes:
    """As many numbers as are parsed, each long."""
    return _post(COMPLETIONS, f'{{"prompt":[{_fill("-1.2345e-300", size=MB)}]}}'.encode())


def escapes() -> bytes:
    """A megabyte of escaped characters."""
    return _post(COMPLETIONS, f'{{"prompt":"{_fill(chr(92) + "u00e9", "")}","max_tokens":1}}'.encode())


def broken_unicode() -> bytes:
    """A megabyte that is not UTF-8, at its end."""
    return _post(COMPLETIONS, b'{"prompt":"' + b"x" * (MB - 1000) + b'\xff"}')


def name_twice() -> bytes:
    """Eight thousand names, the last of them twice."""
    names = [*range(8_000), 7_999]
    return _post(COMPLETIONS, ("{" + ",".join(f'"field{number}":1' for number in names) + "}").encode())


def compressed() -> bytes:
    """Sixty-four megabytes of spaces in a gzip body of 64 kB."""
    return _post(COMPLETIONS, gzip.compress(b" " * (64 * MB)), Content_Encoding="gzip")


def many_chunks() -> bytes:
    """A body in 100,000 chunks of a byte."""
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    body = b'{"prompt":"' + b"x" * 100_000 + b'","max_tokens":1}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


def large_headers() -> bytes:
    """Headers of the largest number and length that the service accepts."""
    return _get("/v1/models", **{f"x-header-{number}": "x" * 280 for number in range(190)})


# Texts that are costly to tokenize or to render.


def spaces() -> bytes:
    """A prompt of a megabyte of spaces."""
    return _ask(COMPLETIONS, prompt=" " * (MB - 1000), max_tokens=1)


def long_texts() -> bytes:
    """A megabyte to tokenize, with the strings of its tokens."""
    return _ask(TOKENIZE, prompt=_fill("def f(x): return x", "\n"), return_token_strs=True)


def many_texts() -> bytes:
    """Texts to embed, each short enough to be tokenized at once."""
    return _ask(EMBEDDINGS, input=[_fill("word", " ", 400)] * 2000)


def many_prompts() -> bytes:
    """The largest number of prompts of a request, each of the size that is tokenized at once; they do not fit."""
    return _ask(COMPLETIONS, prompt=[_fill("word", " ", 4000)] * 64, max_tokens=1)


def many_messages() -> bytes:
    """A conversation of a thousand messages."""
    turns = [{"role": role, "content": "word " * 20} for role in ("user", "assistant")] * 500
    return _ask(CHAT, messages=[*turns, turns[0]], max_tokens=1)


def many_tools() -> bytes:
    """Two hundred tools for a conversation."""
    parameters = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(10)}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": parameters}} for n in range(120)]
    return _ask(CHAT, messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice="required", max_tokens=8)


def token_names() -> bytes:
    """A hundred thousand tokens as text."""
    return _ask("/detokenize", tokens=_ids(100_000))


# Texts that are costly to generate.


def wide_sampling() -> bytes:
    """Long texts, sampled from all tokens."""
    return _ask(COMPLETIONS, **LONG_TEXT, temperature=5.0, top_p=0.999)


def penalties() -> bytes:
    """Long texts with every penalty, a thousand biases and the most stop strings."""
    bias = {str(number): -1 for number in range(2, 302)}
    stops = [f"never{number}" for number in range(16)]
    sampling = {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2}
    return _ask(COMPLETIONS, **LONG_TEXT, **sampling, logit_bias=bias, stop=stops)


def log_probabilities() -> bytes:
    """Long texts with the most log-probabilities."""
    return _ask(COMPLETIONS, **LONG_TEXT, logprobs=20, n=4)


def many_choices() -> bytes:
    """Sixteen choices of one prompt."""
    return _ask(COMPLETIONS, prompt="def", max_tokens=64, n=16, ignore_eos=True)


def best_of() -> bytes:
    """One of sixteen long texts."""
    return _ask(COMPLETIONS, prompt="def", max_tokens=200, n=1, best_of=16, ignore_eos=True)


def long_prompts() -> bytes:
    """Prompts of a whole context without a common beginning."""
    return _ask(COMPLETIONS, prompt=[_ids(CONTEXT) for _ in range(8)], max_tokens=1)


def scored_prompts() -> bytes:
    """Prompts of a whole context, each token with the most log-probabilities."""
    return _ask(COMPLETIONS, prompt=[_ids(CONTEXT) for _ in range(4)], max_tokens=1, prompt_logprobs=20)


def long_embeddings() -> bytes:
    """Embeddings of whole contexts."""
    return _ask(EMBEDDINGS, input=[_ids(CONTEXT) for _ in range(8)])


def grammars() -> bytes:
    """A schema that is costly to compile."""
    properties = {f"p{number}": {"type": "string", "maxLength": 1000 + number} for number in range(400)}
    schema = {"type": "object", "properties": properties, "required": sorted(properties)}
    return _ask(COMPLETIONS, prompt="x", max_tokens=8, guided_json=schema)


def expressions() -> bytes:
    """A regular expression with many states."""
    return _ask(COMPLETIONS, prompt="x", max_tokens=100, guided_regex="(a|b|[c-z ]){1,200}(x{1,100}|y{1,100}){1,9}")


def alternatives() -> bytes:
    """A thousand texts to choose from."""
    return _ask(COMPLETIONS, prompt="x", max_tokens=8, guided_choice=[f"choice {number}" for number in range(1000)])


# Large numbers of requests.


def pipelined() -> bytes:
    """Requests that do not wait for answers."""
    return _get("/livez") * 2000


def measurements() -> bytes:
    """The metrics, again and again."""
    return _get("/metrics")


def documents() -> bytes:
    """Repeated requests for the OpenAPI document."""
    return _get("/openapi.json")


def unknown_paths() -> bytes:
    """Paths that are not there, each another."""
    return b"".join(_get(f"/{random.random()}") for _ in range(500))


def refusals() -> bytes:
    """Small wrong requests."""
    return _ask(COMPLETIONS, prompt="x", max_tokens="many")


# Answers that are read slowly, or not at all.


def streams() -> bytes:
    """Streams that are read a byte at a time."""
    return _ask(COMPLETIONS, **LONG_TEXT, stream=True)


def left_streams() -> bytes:
    """Streams whose reader leaves after their first bytes."""
    return _ask(COMPLETIONS, **LONG_TEXT, stream=True)


# Requests that arrive slowly, or not at all.


def half_requests() -> bytes:
    """Bodies of which half arrives."""
    return _ask(COMPLETIONS, prompt="x" * 5000)[:-2500]


def slow_requests() -> bytes:
    """Requests that arrive byte by byte."""
    return _ask(COMPLETIONS, prompt="x" * 5000)


def connections() -> bytes:
    """Connections without a request."""
    return b""


def ask(connection: socket.socket, request: bytes, end: float) -> None:
    """Send, and read the answer."""
    connection.sendall(request)
    while time.monotonic() < end:
        answer = connection.recv(1 << 20)
        if not answer or answer.endswith((b"}", b"\n")):
            return


def read_slowly(connection: socket.socket, request: bytes, end: float) -> None:
    """Read a byte at a time."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(request)
    while time.monotonic() < end:
        time.sleep(0.2)
        if not connection.recv(1):
            return


def leave(connection: socket.socket, request: bytes, end: float) -> None:
    """Leave when the answer begins."""
    connection.sendall(request)
    connection.recv(1)


def hold(connection: socket.socket, request: bytes, end: float) -> None:
    """Send what there is and keep the connection for a second."""
    connection.sendall(request)
    connection.settimeout(min(1.0, max(end - time.monotonic(), 0.1)))
    connection.recv(1)


def trickle(connection: socket.socket, request: bytes, end: float) -> None:
    """Send a byte at a time on several connections, without waiting for answers. A thread for each would take half a
    core, which the service on this machine needs.
    """
    with ExitStack() as opened:
        further = (
            socket.create_connection(connection.getpeername(), timeout=1.0, source_address=(ABUSER, 0))
            for _ in range(TRICKLING - 1)
        )
        connections = [connection, *map(opened.enter_context, further)]
        for one in connections:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(len(request)):
            if time.monotonic() > end:
                return
            for one in connections:
                one.sendall(request[place : place + 1])
            time.sleep(0.001)


_GROUPS: list[tuple[Send, int, tuple[Make, ...]]] = [
    (
        ask,
        1,
        (
            many_fields, few_fields, empty_lists, deep_and_wide, many_numbers, escapes, broken_unicode, name_twice,
            compressed, many_chunks, large_headers, spaces, long_texts, many_texts, many_prompts, many_messages,
            many_tools, token_names, wide_sampling, penalties, log_probabilities, many_choices, best_of, long_prompts,
            scored_prompts, long_embeddings, grammars, expressions, alternatives, pipelined, measurements, documents,
            unknown_paths, refusals,
        ),
    ),
    (read_slowly, 4, (streams,)),
    (leave, 1, (left_streams,)),
    (hold, 8, (half_requests, connections)),
    (trickle, 1, (slow_requests,)),
]  # fmt: skip
KINDS = {
    make.__name__.replace("_", " "): Kind(make, send, clients) for send, clients, makes in _GROUPS for make in makes
}
"""By name."""


def abuse(name: str, port: int, clients: int, end: float, has_begun: Event) -> None:
    """Send requests of a kind from `clients` threads until the clock's `end`; called in a separate process."""
    kind = KINDS[name]
    request = kind.make()

    def again() -> None:
        while time.monotonic() < end:
            try:
                left_s = max(end - time.monotonic(), 0.1)
                with socket.create_connection((HOST, port), timeout=left_s, source_address=(ABUSER, 0)) as connection:
                    kind.send(connection, request, end)
            except OSError:  # refused, cut off or not answered in time: try again
                time.sleep(0.01)

    threads = [threading.Thread(target=again, daemon=True) for _ in range(kind.clients * clients)]
    for thread in threads:
        thread.start()
    has_begun.set()
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
