"""What a long mixed load does to the service's memory, on a real server process.

    python -m bench.soak [MODEL_DIR] [--seconds 300] [--clients 8]

Without a directory it makes a model of the shape of the `stdlib_30m` experiment with random weights. First, prompts
as long as the context fill every slot of the KV cache, so that what grows later is not the cache. Then clients ask for
texts of all kinds and lengths, and send the requests of `bench.abuse` that are costly to read, in turn. The table has
the worker's memory at start, with the full cache, and after each tenth of the time, by its parts:

- cache: keys and values, by the service's metric, up to `REX_MAX_BATCH_SIZE` contexts or `REX_KV_CACHE_MIB`; slots keep
  the last texts for later prompts, and the allocator keeps the memory of those that give way;
- files: mapped files (libraries), which the system can drop;
- rest: weights, imported libraries, and what glibc and Python hold: the allocator keeps freed blocks for the next step.

One request in twenty is always the same, and so must be its answer. Ends with status 1 if memory grew by more than
MAX_GROWTH_MB in the second half of the time, or if an answer was lost, wrong or a server error. Less than JUDGED_FROM_S
of load do not show whether memory grows: it takes some ten minutes until each kind of request has been there.
"""

import argparse
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig

from bench.abuse.kinds import KINDS
from bench.hardware import describe
from bench.server import HOST, Server, run_bench, serve
from bench.serving import save_random_30m
from model.generation.steps.cache import bytes_per_token

MB = 1e6
MAX_GROWTH_MB = 16.0
JUDGED_FROM_S = 1_200.0
TIMEOUT_S = 300.0
SAME = {"prompt": "def main():", "max_tokens": 32, "temperature": 0, "ignore_eos": True}
JSON = {"content-type": "application/json"}
FAILURES = ("lost", "wrong", "server errors")
PARTS = ("resident", "cache", "files", "rest")
COSTLY = [name for name, kind in KINDS.items() if kind.clients == 1 and name not in ("pipelined", "unknown paths")]


def body(chosen: random.Random, context: int) -> tuple[str, dict[str, Any]]:
    """A route and a request that people send."""
    ids = [chosen.randrange(2, 4000) for _ in range(chosen.choice([4, 16, 64, 256, context // 2, context - 80]))]
    asked: dict[str, Any] = {"prompt": ids, "max_tokens": chosen.choice([1, 8, 32, 64])}
    asked |= chosen.choice(
        [
            {"temperature": 0},
            {"temperature": 1.0, "top_p": 0.95},
            {"stream": True},
            {"n": 4, "logprobs": 5, "max_tokens": 8},
            {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2},
            {"prompt_logprobs": 5, "max_tokens": 1},
            {"echo": True, "logprobs": 20, "max_tokens": 1},
            {"guided_regex": f"[a-z]{{1,{chosen.randrange(5, 500)}}}"},
            {"prompt": "def main(): " * chosen.randrange(1, 40)},
            {"stop": ["\n", "return"], "min_tokens": 2},
        ]
    )
    if chosen.random() < 0.1:
        return "/v1/embeddings", {"input": [ids] * 4}
    return "/v1/completions", asked


def load(port: int, context: int, end: float, seed: int, tally: Counter[str]) -> None:
    """Ask until the clock's `end`; some leave early, and some send what is costly to read."""
    chosen = random.Random(seed)
    with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=TIMEOUT_S) as client:
        expected = client.post("/v1/completions", json=SAME).json()["choices"][0]["text"]
        while time.monotonic() < end:
            draw, leaves, same = chosen.random(), False, False
            try:
                if draw < 0.05:
                    same = True
                    answer = client.post("/v1/completions", json=SAME)
                elif draw < 0.15:
                    content = _body_of(KINDS[chosen.choice(COSTLY)].make())
                    answer = client.post("/v1/completions", content=content, headers=JSON)
                else:
                    leaves = chosen.random() < 0.1
                    path, asked = body(chosen, context)
                    answer = client.post(path, json=asked, timeout=0.05 if leaves else TIMEOUT_S)
            except httpx.HTTPError as error:
                tally["left" if leaves else f"lost ({type(error).__name__})"] += 1
                continue
            failed = f"server errors ({answer.status_code})"
            tally["refused" if answer.is_client_error else failed if answer.is_server_error else "answered"] += 1
            if same and answer.is_success and answer.json()["choices"][0]["text"] != expected:
                tally["wrong"] += 1


def fill(port: int, context: int, slots: int) -> None:
    """Fill every slot's part of the KV cache, with one prompt each."""

    def ask(seed: int) -> None:
        chosen = random.Random(f"fill {seed}")
        ids = [chosen.randrange(2, 4000) for _ in range(context - 2)]
        asked = {"prompt": ids, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        httpx.post(f"http://{HOST}:{port}/v1/completions", json=asked, timeout=TIMEOUT_S).raise_for_status()

    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(ask, range(slots)))


def _body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


def parts(server: Server) -> dict[str, float]:
    """Megabytes that the worker holds, by part."""
    held = server.worker().memory_info()
    metrics = httpx.get(f"http://{HOST}:{server.port}/metrics", timeout=60).text
    cache = re.search(r"^rex_kv_cache_bytes (\S+)$", metrics, re.MULTILINE)
    assert cache
    found = {"resident": held.rss / MB, "cache": float(cache[1]) / MB, "files": held.shared / MB}
    return {**found, "rest": found["resident"] - found["cache"] - found["files"]}


def measure(model_dir: Path, *, seconds: float, clients: int) -> dict[str, Any]:
    """Memory at start, with a full cache, and after each tenth of the time."""
    config = AutoConfig.from_pretrained(model_dir)
    context = config.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder, serve(model_dir, Path(folder)) as server:
        said = re.search(r"cache_tokens=(\d+)", (Path(folder) / "serve.log").read_text())
        assert said
        cache_tokens = int(said[1])
        rows = [{"requests": 0.0, **parts(server)}]
        fill(server.port, context, cache_tokens // context)
        rows.append({"requests": 0.0, **parts(server)})
        started, tally = time.monotonic(), Counter[str]()
        threads = [
            threading.Thread(target=load, args=(server.port, context, started + seconds, seed, tally), daemon=True)
            for seed in range(clients)
        ]
        for thread in threads:
            thread.start()
        for tenth in range(1, 11):
            time.sleep(max(started + tenth * seconds / 10 - time.monotonic(), 0))
            rows.append({"requests": float(tally.total()), **parts(server)})
            print(rows[-1], file=sys.stderr, flush=True)
        for thread in threads:
            thread.join(TIMEOUT_S)
    grown = max(row["resident"] for row in rows[7:]) - max(row["resident"] for row in rows[:7])
    return {
        "memory": rows,
        "grown_mb": grown,
        "is_flat": grown <= MAX_GROWTH_MB if seconds >= JUDGED_FROM_S else None,
        "answers": dict(tally),
        "failures": sum(count for name, count in tally.items() if name.startswith(FAILURES)),
        "cache_mb": cache_tokens * bytes_per_token(config, torch.float32) / MB,
        "machine": describe(torch.device("cpu")),
    }


def table(result: dict[str, Any]) -> str:
    """A row for each look."""
    columns = ("requests", *PARTS)
    rows = [" ".join(f"{name:>9}" for name in columns)]
    rows += [" ".join(f"{row[name]:9.0f}" for name in columns) for row in result["memory"]]
    verdict = {
        True: "flat",
        False: f"not flat: expected at most {MAX_GROWTH_MB:.0f}",
        None: f"not judged: a load of at least {JUDGED_FROM_S:,.0f} s shows it",
    }[result["is_flat"]]
    last = f"MB; in the second half {result['grown_mb']:+.0f} MB ({verdict}); the cache takes {result['cache_mb']:.0f}"
    answers = ", ".join(f"{count:,} {name}" for name, count in result["answers"].items())
    return "\n".join([*rows, f"{last} at most", f"answers: {answers}"])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of load")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once")
    result = run_bench(parser, save_random_30m, measure, table)
    if result["failures"] or result["is_flat"] is False:
        sys.exit(1)


if __name__ == "__main__":
    main()
