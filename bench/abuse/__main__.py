"""The effect of abusive clients on a good client's time to first token, by kind of abuse, on a real server process.

    python -m bench.abuse [MODEL_DIR] [--seconds 8] [--samples 200] [--clients 4] [--only NAME ...]

Without a directory it makes a model of the shape of the `stdlib_30m` experiment with random weights. A good client
requests 8 tokens repeatedly, alone and beside CLIENTS that abuse the service from another process and another address,
for SECONDS and until it has SAMPLES answers (at most a minute). The table has the good client's milliseconds to its
first token, and the ratio of its p99 to its p99 alone, which should be at most 2. The client alone is measured before
each kind, a quarter as long, and its times are pooled: a shared machine has slow minutes. `bench/abuse/kinds.py` has
the kinds. On a machine with few cores the abusers' own CPU time counts too, so their bodies are made once and they read
answers with almost no work; the table has it, in cores.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.abuse.kinds import KINDS, abuse
from bench.hardware import describe
from bench.server import Answer, Server, run_bench, serve
from bench.serving import IDLE_PROMPT_TOKENS, Prompts, save_random_30m
from model.errors import PipelineError
from model.text.tokenizer import load_tokenizer

LONG = 3000.0
TIMEOUT_S = 60.0
"""Maximum seconds per kind, since the good client may be too slow to reach its number of samples."""
START_S = 60.0
"""Most time for the abusers' process to start and to make its bodies."""
SLACK_S = 60.0
"""The last answer may take this long after it."""


def good_client(server: Server, prompts: Prompts, seconds: float, samples: int = 0) -> list[Answer]:
    """Answers to one request after the other, for `seconds` and until there are `samples`."""
    answers: list[Answer] = []
    started = time.monotonic()
    while (spent := time.monotonic() - started) < seconds or (len(answers) < samples and spent < TIMEOUT_S):
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
        "first_token_ms_p99": times[math.ceil(0.99 * len(times)) - 1] if times else LONG,  # nearest rank
    }


def measure(model_dir: Path, *, seconds: float, samples: int, clients: int, only: list[str]) -> dict[str, Any]:
    """The good client's times alone and beside each kind."""
    vocab_size = len(load_tokenizer(model_dir))
    prompts, spawn = Prompts(vocab_size), multiprocessing.get_context("spawn")
    beside: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, serve(model_dir, Path(folder)) as server:
        good_client(server, prompts, 2)  # warm
        alone: list[Answer] = []
        for name in only or KINDS:
            alone += good_client(server, prompts, seconds / 4, samples // 4)
            end = time.monotonic() + START_S + TIMEOUT_S + SLACK_S
            has_begun = spawn.Event()
            abuser = spawn.Process(target=abuse, args=(name, server.port, clients, end, has_begun))
            abuser.start()
            # Its start takes a core for seconds, beside the service's.
            if not has_begun.wait(START_S):
                raise PipelineError(
                    f"the abusers of {name!r} have not begun within {START_S:.0f} s: see their traceback"
                )
            began, used_s = time.monotonic(), _cpu_s(abuser)
            beside[name] = summary(good_client(server, prompts, seconds, samples))
            if not abuser.is_alive():
                raise PipelineError(f"the abusers of {name!r} have ended: see their traceback above")
            beside[name]["abusers_cores"] = (_cpu_s(abuser) - used_s) / (time.monotonic() - began)
            abuser.kill()
            abuser.join()
            row = beside[name]
            times = f"p50 {row['first_token_ms_p50']:.1f} ms, p99 {row['first_token_ms_p99']:.1f} ms"
            print(f"{name}: {times}, {row['asked']} asked, {row['refused']} refused", file=sys.stderr, flush=True)
            time.sleep(1)  # until the service has canceled the abusers' last requests
    result: dict[str, Any] = {"alone": summary(alone), "beside": beside}
    for row in beside.values():
        row["ratio"] = row["first_token_ms_p99"] / result["alone"]["first_token_ms_p99"]
    result["machine"] = describe(torch.device("cpu"))
    return result


def _cpu_s(process: SpawnProcess) -> float:
    used = psutil.Process(process.pid).cpu_times()
    return float(used.user + used.system)


def table(result: dict[str, Any]) -> str:
    """A row for each kind."""
    rows = [f"{'':18} {'asked':>6} {'refused':>8} {'p50 ms':>8} {'p99 ms':>8} {'ratio':>6} {'cores':>6}"]
    alone = {**result["alone"], "ratio": 1.0, "abusers_cores": 0.0}
    for name, row in {"alone": alone, **result["beside"]}.items():
        p50, p99 = row["first_token_ms_p50"], row["first_token_ms_p99"]
        shown = f"{name:18} {row['asked']:6} {row['refused']:8} {p50:8.0f} {p99:8.0f} {row['ratio']:6.1f}"
        rows.append(f"{shown} {row['abusers_cores']:6.2f}")
    return "\n".join(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each kind")
    parser.add_argument("--samples", type=int, default=200, help="answers of each kind, at least")
    parser.add_argument("--clients", type=int, default=4, help="that abuse the service at once")
    parser.add_argument("--only", nargs="*", default=[], choices=list(KINDS), help="kinds to measure")
    run_bench(parser, save_random_30m, measure, table)


if __name__ == "__main__":
    main()
