"""The effect of abusive clients on a good client's time to first token, by kind of abuse, on a real server process.

    python -m bench.abuse [MODEL_DIR] [--seconds 8] [--clients 4] [--only NAME ...]

Without a directory it makes a model of the shape of the `stdlib_30m` experiment with random weights. A good client
requests 8 tokens repeatedly, alone and beside CLIENTS that abuse the service from another process and another address.
The table has the good client's milliseconds to its first token, and the ratio of its p99 to its p99 alone, which should
be at most 2. The client alone is measured before and after all kinds. On a machine with few cores the abusers' own CPU
time counts too, so their bodies are made once and they read answers with almost no work.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.hardware import describe
from bench.server import HOST, Answer, Server, run_bench, serve
from bench.serving import IDLE_PROMPT_TOKENS, Prompts, save_random_30m
from model.text.tokenizer import load_tokenizer

ABUSER = "127.0.0.2"
"""The service tells clients apart by address."""
MB = 1_000_000
LONG = 3000.0
COMPLETIONS, TOKENIZE, EMBEDDINGS = "/v1/completions", "/tokenize", "/v1/embeddings"


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _ask(path: str, **body: Any) -> bytes:
    return _post(path, json.dumps(body).encode())


def _fill(piece: str, separator: str = ",", size: int = MB - 1000) -> str:
    return separator.join([piece] * (size // (len(piece) + len(separator))))


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


def wide_sampling() -> bytes:
    """Long texts, sampled from all tokens."""
    return _ask(COMPLETIONS, prompt="def", max_tokens=400, temperature=5.0, top_p=0.999, ignore_eos=True)


def log_probabilities() -> bytes:
    """Long texts with the most log-probabilities."""
    return _ask(COMPLETIONS, prompt="def", max_tokens=400, logprobs=20, n=4, ignore_eos=True)


def many_choices() -> bytes:
    """Sixteen choices of one prompt."""
    return _ask(COMPLETIONS, prompt="def", max_tokens=64, n=16, ignore_eos=True)


def grammars() -> bytes:
    """A schema that is costly to compile."""
    properties = {f"p{number}": {"type": "string", "maxLength": 1000 + number} for number in range(400)}
    schema = {"type": "object", "properties": properties, "required": sorted(properties)}
    return _ask(COMPLETIONS, prompt="x", max_tokens=8, guided_json=schema)


def pipelined() -> bytes:
    """Requests that do not wait for answers."""
    return f"GET /livez HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode() * 2000


def streams() -> bytes:
    """Streams that are read a byte at a time."""
    return _ask(COMPLETIONS, prompt="def", max_tokens=400, stream=True, ignore_eos=True)


KINDS: dict[str, tuple[Callable[[], bytes], bool]] = {
    make.__name__.replace("_", " "): (make, make is streams)
    for make in (
        many_fields, few_fields, empty_lists, deep_and_wide, spaces, long_texts, many_texts, many_prompts,
        wide_sampling, log_probabilities, many_choices, grammars, pipelined, streams,
    )
}  # fmt: skip


def abuse(name: str, port: int, clients: int, end: float) -> None:
    """Send requests of a kind from `clients` threads until the clock's `end`; called in a separate process."""
    make, is_slow = KINDS[name]
    request = make()

    def again() -> None:
        while time.monotonic() < end:
            try:
                _send(request, port, end, is_slow=is_slow)
            except OSError:  # refused, cut off or not answered in time: try again
                time.sleep(0.01)

    threads = [threading.Thread(target=again, daemon=True) for _ in range(4 * clients if is_slow else clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))


def _send(request: bytes, port: int, end: float, *, is_slow: bool) -> None:
    """One request; returns when its answer ends, or has been quiet for a while."""
    left_s = max(end - time.monotonic(), 0.1)
    with socket.create_connection((HOST, port), timeout=left_s, source_address=(ABUSER, 0)) as sent:
        if is_slow:
            sent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent.sendall(request)
        while time.monotonic() < end:
            if is_slow:
                time.sleep(0.2)
            answer = sent.recv(1 if is_slow else 1 << 20)
            if not answer or (not is_slow and answer.endswith((b"}", b"\n"))):
                return


def good_client(server: Server, prompts: Prompts, end: float) -> list[Answer]:
    """Answers to one request after the other until the clock's `end`."""
    answers = []
    while time.monotonic() < end:
        answers.append(server.ask(prompts(IDLE_PROMPT_TOKENS), 8))
        time.sleep(0.02)
    return answers


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Milliseconds to the first token; answers other than 200 count as refused."""
    times = sorted(1000 * answer.first_s for answer in answers if answer.status == 200)
    return {
        "asked": len(answers),
        "refused": len(answers) - len(times),
        "first_token_ms_p50": statistics.median(times) if times else LONG,
        "first_token_ms_p99": times[min(len(times) - 1, int(0.99 * len(times)))] if times else LONG,
    }


def measure(model_dir: Path, *, seconds: float, clients: int, only: list[str]) -> dict[str, Any]:
    """The good client's times alone and beside each kind."""
    vocab_size = len(load_tokenizer(model_dir))
    prompts, spawn = Prompts(vocab_size), multiprocessing.get_context("spawn")
    beside: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, serve(model_dir, Path(folder)) as server:
        good_client(server, prompts, time.monotonic() + 2)  # warm
        alone = good_client(server, prompts, time.monotonic() + seconds)
        for name in only or KINDS:
            # Two seconds for the process to start and to make its bodies.
            end = time.monotonic() + 2 + seconds
            abuser = spawn.Process(target=abuse, args=(name, server.port, clients, end))
            abuser.start()
            time.sleep(2)
            beside[name] = summary(good_client(server, prompts, end))
            abuser.join(10)
            if abuser.is_alive():
                abuser.kill()
            time.sleep(1)  # until the service has canceled the abusers' last requests
        alone += good_client(server, prompts, time.monotonic() + seconds)
    result: dict[str, Any] = {"alone": summary(alone), "beside": beside}
    for row in beside.values():
        row["ratio"] = row["first_token_ms_p99"] / result["alone"]["first_token_ms_p99"]
    result["machine"] = describe(torch.device("cpu"))
    return result


def table(result: dict[str, Any]) -> str:
    """A row for each kind."""
    rows = [f"{'':18} {'asked':>6} {'refused':>8} {'p50 ms':>8} {'p99 ms':>8} {'ratio':>6}"]
    for name, row in {"alone": {**result["alone"], "ratio": 1.0}, **result["beside"]}.items():
        p50, p99 = row["first_token_ms_p50"], row["first_token_ms_p99"]
        rows.append(f"{name:18} {row['asked']:6} {row['refused']:8} {p50:8.0f} {p99:8.0f} {row['ratio']:6.1f}")
    return "\n".join(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each kind")
    parser.add_argument("--clients", type=int, default=4, help="that abuse the service at once")
    parser.add_argument("--only", nargs="*", default=[], choices=list(KINDS), help="kinds to measure")
    run_bench(parser, save_random_30m, measure, table)


if __name__ == "__main__":
    main()
