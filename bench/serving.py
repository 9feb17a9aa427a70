"""Overhead of the service over the engine, measured with a real server process on the loopback address.

    python -m bench.serving [MODEL_DIR] [--streams 8] [--tokens 128] [--rounds 15] [--seconds 20] [--turns 4]

REX_... variables are options of the service; REX_THREADS also sets the threads of the engine in this process. Without a
directory it makes a model of the shape of the `stdlib_30m` experiment with random weights. In one run, the engine in
this process and the server take turns:

- streams: greedy answers to prompts of 64 tokens, tokens per second in total, and the share lost to HTTP, JSON and
  server-sent events;
- first token: one request while nothing else runs, milliseconds from sending it to its first text;
- overload: Poisson arrivals at the service's capacity and at twice that; milliseconds to the first token of admitted
  requests; the others are answered 429;
- start: seconds from the command to a /readyz of 200;
- memory: anonymous memory of the worker beyond weights and cache after all of the above, MB. Mapped library files are
  reported separately; the kernel can drop their pages.

Ratios of rounds are reliable on an idle machine; on a busy one the client (this process) and other processes compete
for cores, and CPU seconds are the better measure. Prints a table, and a JSON line for machines.
"""

import argparse
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.hardware import describe
from bench.server import Answer, Server, run_bench, serve
from bench.settings import read_settings
from model.build import build_config, build_model
from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from model.settings import ModelSettings, TokenizerSettings
from model.system.cpu import decoding_threads, usable_cores
from model.text.tokenizer import load_tokenizer, train_tokenizer
from model.weights.int8 import count_parameters
from model.weights.loading import load_model

PROMPT_TOKENS = 64
IDLE_PROMPT_TOKENS = 16
MB = 1e6


def save_random_30m(directory: Path) -> Path:
    """A model of the shape of `configs/model/rex_30m.yaml`, with a tokenizer of this Python's own source."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    texts = [path.read_text(errors="replace") for path in library]
    tokenizer = train_tokenizer(TokenizerSettings(vocab_size=16_384), texts)
    shape = read_settings(ModelSettings, "model/rex_30m.yaml")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    build_model(build_config(shape, len(tokenizer), *special), seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Prompts:
    """Random prompts, each new, so that a prefix cache cannot help."""

    def __init__(self, vocab_size: int) -> None:
        self._numbers, self._vocab_size = random.Random(0), vocab_size

    def __call__(self, tokens: int) -> list[int]:
        """Token ids."""
        return [self._numbers.randrange(2, self._vocab_size) for _ in range(tokens)]


def engine_streams(engine: Engine, prompts: Prompts, streams: int, tokens: int) -> float:
    """Tokens per second of streams in this process, each with an answer of `tokens`."""
    requests = [_request(prompts(PROMPT_TOKENS), tokens) for _ in range(streams)]
    started = time.perf_counter()
    generations = [engine.submit(request) for request in requests]
    for generation in generations:
        for _ in generation:
            pass
    return streams * tokens / (time.perf_counter() - started)


def server_streams(server: Server, prompts: Prompts, streams: int, tokens: int) -> float:
    """The same over HTTP."""
    started = time.perf_counter()
    answers = _ask_all(server, [prompts(PROMPT_TOKENS) for _ in range(streams)], tokens)
    seconds = time.perf_counter() - started
    _check(answers)
    return streams * tokens / seconds


def engine_first_token(engine: Engine, prompts: Prompts) -> float:
    """Seconds to the first text in this process."""
    request = _request(prompts(IDLE_PROMPT_TOKENS), 8)
    started, first = time.perf_counter(), 0.0
    for event in engine.submit(request):
        if not first and isinstance(event, TextPiece) and event.text:
            first = time.perf_counter() - started
    return first


def _request(prompt_ids: list[int], answer_tokens: int) -> GenerationRequest:
    return GenerationRequest(prompt_ids, answer_tokens, SamplingParameters(temperature=0), ignore_eos=True)


def _ask_all(server: Server, prompts: list[list[int]], answer_tokens: int) -> list[Answer]:
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: answers.append(server.ask(prompt, answer_tokens)))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _check(answers: list[Answer]) -> None:
    wrong = [answer.status for answer in answers if answer.status != 200 or not answer.events]
    if wrong:
        raise PipelineError(f"the service answered {wrong}: expected 200 and a stream")


def capacity(server: Server, prompts: Prompts, tokens: int, clients: int, seconds: float) -> float:
    """Completed requests of `tokens` per second with `clients` closed-loop clients."""
    end, done = time.perf_counter() + seconds, []

    def ask_again() -> None:
        while time.perf_counter() < end:
            answer = server.ask(prompts(PROMPT_TOKENS), tokens)
            done.append((time.perf_counter(), answer.status))

    started = time.perf_counter()
    threads = [threading.Thread(target=ask_again) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(status == 200 for _, status in done) / (time.perf_counter() - started)


def offered(
    server: Server, prompts: Prompts, tokens: int, per_second: float, seconds: float, seed: int
) -> list[Answer]:
    """Answers to an open-loop Poisson load: requests of `tokens` tokens at `per_second` on average."""
    numbers, answers, threads = random.Random(seed), [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        prompt = prompts(PROMPT_TOKENS)
        thread = threading.Thread(target=lambda prompt=prompt: answers.append(server.ask(prompt, tokens)))
        thread.start()
        threads.append(thread)
        time.sleep(numbers.expovariate(per_second))
    for thread in threads:
        thread.join()
    if len(answers) != len(threads):
        raise PipelineError(f"{len(threads) - len(answers)} of {len(threads)} requests were lost")
    return answers


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Counts, and milliseconds to the first token of those that were admitted."""
    admitted = sorted(1000 * answer.first_s for answer in answers if answer.status == 200)
    refused = [answer for answer in answers if answer.status == 429 and answer.retry_after]
    return {
        "requests": len(answers),
        "admitted": len(admitted),
        "refused_429": len(refused),
        "lost": len(answers) - len(admitted) - len(refused),
        "first_token_ms_p50": statistics.median(admitted),
        "first_token_ms_p99": admitted[min(len(admitted) - 1, int(0.99 * len(admitted)))],
    }


def measure(
    model_dir: Path,
    *,
    streams: int,
    tokens: int,
    rounds: int,
    seconds: float,
    turns: int,
    load_tokens: int,
    starts: int,
) -> dict[str, Any]:
    """All figures as a dictionary; names end in their unit."""
    model = load_model(model_dir, device="cpu")
    threads = int(os.environ.get("REX_THREADS") or 0)
    torch.set_num_threads(threads or decoding_threads(count_parameters(model), usable_cores()))
    weights_bytes = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    engine = Engine(model, load_tokenizer(model_dir), max_queue=64, threads=threads or usable_cores())
    engine.warm_up()
    prompts = Prompts(model.config.vocab_size)
    parameters = count_parameters(model)
    result: dict[str, Any] = {"parameters": parameters, "streams": streams, "start_s": [], "start_cpu_s": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(starts - 1):
            with serve(model_dir, Path(folder)) as server:
                _note_start(result, server)
        with serve(model_dir, Path(folder)) as server:
            _note_start(result, server)
            engine_streams(engine, prompts, streams, tokens), server_streams(server, prompts, streams, tokens)  # warm
            result |= _take_turns(engine, server, prompts, streams, tokens, rounds)
            engine.stop()
            result["memory"] = _memory(server, engine, weights_bytes)
            result["overload"] = _overload(server, prompts, load_tokens, seconds, turns)
            result["memory_after_load"] = _memory(server, engine, weights_bytes)
    result["machine"] = describe(torch.device("cpu"))
    return result


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _note_start(result: dict[str, Any], server: Server) -> None:
    result["start_s"].append(round(server.start_s, 2))
    result["start_cpu_s"].append(round(server.start_cpu_s, 2))
    _log(f"ready after {server.start_s:.1f} s and {server.start_cpu_s:.1f} s of CPU time")


def _take_turns(
    engine: Engine, server: Server, prompts: Prompts, streams: int, tokens: int, rounds: int
) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"engine": [], "server": []}
    first: dict[str, list[float]] = {"engine": [], "server": []}
    loop_s = worker_s = 0.0
    for number in range(rounds):
        speeds["engine"].append(engine_streams(engine, prompts, streams, tokens))
        before = server.cpu_s()
        speeds["server"].append(server_streams(server, prompts, streams, tokens))
        after = server.cpu_s()
        loop_s, worker_s = loop_s + after[0] - before[0], worker_s + after[1] - before[1]
        for _ in range(8):
            first["engine"].append(engine_first_token(engine, prompts))
            answer = server.ask(prompts(IDLE_PROMPT_TOKENS), 8)
            _check([answer])
            first["server"].append(answer.first_s)
        _log(f"round {number + 1} of {rounds}: {speeds['engine'][-1]:.0f} and {speeds['server'][-1]:.0f} tokens/s")
    # A ratio per round, because the machine's speed drifts between rounds.
    costs = [1 - over / inside for over, inside in zip(speeds["server"], speeds["engine"], strict=True)]
    return {
        "streams_engine_tokens_per_s": statistics.median(speeds["engine"]),
        "streams_server_tokens_per_s": statistics.median(speeds["server"]),
        "streams_cost": statistics.median(costs),
        "streams_loop_share_of_cpu": loop_s / worker_s,
        "first_token_engine_ms": 1000 * statistics.median(first["engine"]),
        "first_token_server_ms": 1000 * statistics.median(first["server"]),
    }


def _overload(server: Server, prompts: Prompts, tokens: int, seconds: float, turns: int) -> dict[str, Any]:
    per_second = capacity(server, prompts, tokens, 16, seconds)
    _log(f"capacity: {per_second:.2f} requests/s of {PROMPT_TOKENS} + {tokens} tokens")
    at: dict[int, list[Answer]] = {1: [], 2: []}
    for turn in range(turns):
        for load, answers in at.items():
            answers += offered(server, prompts, tokens, load * per_second, seconds, seed=turn)
            _log(f"turn {turn + 1} of {turns} at {load} times the capacity: {summary(answers)}")
    once, twice = summary(at[1]), summary(at[2])
    return {
        "capacity_per_s": per_second,
        "at_capacity": once,
        "at_twice_capacity": twice,
        "p99_ratio": twice["first_token_ms_p99"] / once["first_token_ms_p99"],
    }


def _memory(server: Server, engine: Engine, weights_bytes: int) -> dict[str, float]:
    cache_bytes = engine.stats().cache_capacity_tokens * engine.cache_bytes_per_token
    held = server.worker().memory_info()
    weights_and_cache = weights_bytes + cache_bytes
    return {
        "resident_mb": held.rss / MB,
        "weights_mb": weights_bytes / MB,
        "cache_mb": cache_bytes / MB,
        "over_weights_and_cache_mb": (held.rss - held.shared - weights_and_cache) / MB,
        "with_mapped_files_mb": (held.rss - weights_and_cache) / MB,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a table with their targets."""
    load, memory = result["overload"], result["memory_after_load"]
    extra_ms = result["first_token_server_ms"] - result["first_token_engine_ms"]
    streams = f"{result['streams']} streams"
    rows = [
        (f"{streams}, engine in this process", f"{result['streams_engine_tokens_per_s']:.0f} tokens/s", ""),
        (f"{streams}, over HTTP", f"{result['streams_server_tokens_per_s']:.0f} tokens/s", ""),
        ("cost of HTTP, SSE and JSON", f"{100 * result['streams_cost']:.1f} %", "at most 8 %"),
        ("event loop's share of worker's CPU time", f"{100 * result['streams_loop_share_of_cpu']:.1f} %", ""),
        ("first token when idle, engine", f"{result['first_token_engine_ms']:.1f} ms", ""),
        ("first token when idle, added by HTTP", f"{extra_ms:.1f} ms", "at most 5 ms"),
        ("capacity", f"{load['capacity_per_s']:.2f} requests/s", ""),
        ("first token at capacity, p99", f"{load['at_capacity']['first_token_ms_p99']:.0f} ms", ""),
        ("first token at twice the capacity, p99", f"{load['at_twice_capacity']['first_token_ms_p99']:.0f} ms", ""),
        ("ratio of the two", f"{load['p99_ratio']:.2f}", "under 3"),
        ("lost at twice the capacity", f"{load['at_twice_capacity']['lost']}", "0"),
        ("start to ready", f"{statistics.median(result['start_s']):.1f} s", "at most 10 s"),
        ("start to ready, CPU seconds", f"{statistics.median(result['start_cpu_s']):.1f} s", ""),
        ("worker beyond weights and cache", f"{memory['over_weights_and_cache_mb']:.0f} MB", "at most 500 MB"),
        ("the same with mapped files", f"{memory['with_mapped_files_mb']:.0f} MB", ""),
    ]
    return "\n".join(f"{what:42} {value:>18}   {goal}" for what, value, goal in rows)


def main() -> None:
    """Measure and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8, help="answers at once")
    parser.add_argument("--tokens", type=int, default=128, help="of each of these answers")
    parser.add_argument("--rounds", type=int, default=15, help="of streams and first tokens")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of each load")
    parser.add_argument("--turns", type=int, default=4, help="of the load at the capacity and at twice it")
    parser.add_argument("--load-tokens", type=int, default=64, help="tokens of each answer under load")
    parser.add_argument("--starts", type=int, default=3, help="of the service")
    run_bench(parser, save_random_30m, measure, table)


if __name__ == "__main__":
    main()
