"""Two replicas of the service behind a gateway against one, and how many replicas many clients need.

    python -m bench.replicas [MODEL_DIR] [--seconds 20] [--clients 16] [--rounds 3] [--simulated 10000]

Each replica is a real `bentoml serve` on one core. The gateway is smg with round robin. Closed-loop clients stream one
answer after the other, each from a new prompt: CLIENTS of them through the gateway to one replica and to both, in turn.
Without a directory the model has the shape of the `stdlib_30m` experiment and random weights.

The simulation knows a replica by the durations of its answers, measured with 1, 2, 4, ... answers at a time without the
gateway. Of n answers at a time each advances by 1 / duration(n) a second; as many as there are slots run, and others
wait in order. It is first compared with the measured replicas (same clients, no pauses), then run with SIMULATED
clients that pause between two answers for a time drawn from an exponential distribution, for more and more replicas,
until 99 % of the answers begin within a second.
"""

import argparse
import heapq
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.hardware import describe
from bench.server import HOST, Answer, Server, free_port, is_ready, run_bench, serve
from bench.serving import Prompts, save_random_30m
from model.errors import PipelineError
from model.text.tokenizer import load_tokenizer

PROMPT_TOKENS, ANSWER_TOKENS = 64, 64
SLOTS = 16
PAUSE_S = 60.0
"""Mean pause of a simulated client between two answers."""
SIMULATED_S = 300.0
FIRST_TOKEN_S = 1.0
"""99 % of the answers shall begin within this time."""


# ---- measured


@contextmanager
def replica(model_dir: Path, folder: Path, core: int) -> Iterator[Server]:
    """A service on one core."""
    folder.mkdir()
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # inherited by the service
    with ExitStack() as stack:
        try:
            server = stack.enter_context(serve(model_dir, folder, REX_MAX_BATCH_SIZE=str(SLOTS)))
        finally:
            os.sched_setaffinity(0, allowed)
        yield server


@contextmanager
def gateway(replicas: Sequence[Server], folder: Path) -> Iterator[Server]:
    """Smg in front of replicas."""
    with urllib.request.urlopen(f"http://{HOST}:{replicas[0].port}/v1/models", timeout=60) as listed:
        model = json.load(listed)["data"][0]["id"]
    program = shutil.which("smg", path=str(Path(sys.executable).parent))
    if program is None:
        raise PipelineError("the gateway smg is not installed: run `make setup` (it has wheels for x86-64 Linux)")
    port, started = free_port(), time.perf_counter()
    command = [program, "launch", "--host", HOST, "--port", str(port), "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port()), "--worker-urls"]
    command += [f"http://{HOST}:{one.port}" for one in replicas]
    with (folder / f"gateway.{port}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not is_ready(port, "/readiness"):
            if process.poll() is not None or time.perf_counter() - started > 60:
                raise PipelineError(f"the gateway did not start: {Path(log.name).read_text()[-500:]}")
            time.sleep(0.1)
        yield Server(port, process, time.perf_counter() - started, model=model)
    finally:
        process.kill()  # at SIGTERM it keeps its port for 5 s
        process.wait(60)


def load(server: Server, texts: Callable[[], str], clients: int, seconds: float) -> list[Answer]:
    """The answers of closed-loop clients that begin within `seconds`."""
    answers: list[Answer] = []
    end = time.perf_counter() + seconds

    def ask() -> None:
        while time.perf_counter() < end:
            answers.append(server.ask(texts(), ANSWER_TOKENS))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [answer.status for answer in answers if answer.status != 200 or not answer.is_whole]
    if failed:
        raise PipelineError(f"{len(failed)} of {len(answers)} answers failed, the first with {failed[0]}")
    return answers


def speed(answers: Sequence[Answer], clients: int) -> float:
    """Tokens per second of closed-loop clients: each has an answer of the mean duration at all times."""
    return clients * ANSWER_TOKENS / statistics.fmean(answer.total_s for answer in answers)


# ---- simulated


@dataclass
class Durations:
    """Seconds of an answer by the number of answers at a time, and the share of them before its first token."""

    at: dict[int, float]
    first_share: float

    def __call__(self, running: int) -> float:
        """Linear between the measured numbers, and beyond them in proportion to the last two."""
        numbers = sorted(self.at)
        right = next((number for number in numbers if number >= running), numbers[-1])
        left = max((number for number in numbers if number < right), default=right)
        if left == right:
            return self.at[right]
        return self.at[left] + (self.at[right] - self.at[left]) * (running - left) / (right - left)


@dataclass
class _Replica:
    """One simulated replica. progress: of an answer that began at the start, in answers."""

    durations: Durations
    progress: float = 0.0
    updated: float = 0.0
    running: list[tuple[float, int, float]] = field(default_factory=list)
    """(Progress at its end, number, arrival) of each running answer."""
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    version: int = 0

    def advance(self, now: float) -> None:
        """Go on to a time."""
        if self.running:
            self.progress += (now - self.updated) / self.durations(len(self.running))
        self.updated = now

    def next_end(self) -> float:
        """When the next answer ends if none arrives before."""
        return self.updated + (self.running[0][0] - self.progress) * self.durations(len(self.running))


def simulate(
    durations: Durations, replicas: int, clients: int, *, pause_s: float, seconds: float, seed: int = 0
) -> dict[str, float]:
    """Tokens/s and seconds to the first token of closed-loop clients behind round robin, after a third of the time."""
    chosen, number = random.Random(seed), 0
    machines = [_Replica(durations) for _ in range(replicas)]
    first_s: list[float] = []
    ended = 0
    events: list[tuple[float, int, int]] = []  # time, replica or -1 for an arrival, version

    def pause() -> float:
        return chosen.expovariate(1 / pause_s) if pause_s else 0.0

    for _ in range(clients):
        heapq.heappush(events, (pause(), -1, 0))
    began = seconds / 3
    while events and events[0][0] < seconds:
        now, at, version = heapq.heappop(events)
        if at < 0:
            at, number = number % replicas, number + 1
            machine = machines[at]
            machine.advance(now)
            machine.waiting.append((number, now))
        else:
            machine = machines[at]
            if version != machine.version:
                continue  # another answer came or went since
            machine.advance(now)
            heapq.heappop(machine.running)
            ended += now > began
            heapq.heappush(events, (now + pause(), -1, 0))
        while machine.waiting and len(machine.running) < SLOTS:
            one, arrived = machine.waiting.popleft()
            heapq.heappush(machine.running, (machine.progress + 1, one, arrived))
            if now > began:
                first_s.append(now - arrived + durations.first_share * durations(len(machine.running)))
        machine.version += 1
        if machine.running:
            heapq.heappush(events, (machine.next_end(), at, machine.version))
    first_s.sort()
    return {
        "tokens_per_second": ended * ANSWER_TOKENS / (seconds - began),
        "first_p50_s": first_s[len(first_s) // 2],
        "first_p99_s": first_s[int(0.99 * len(first_s))],
    }


def needed(durations: Durations, clients: int) -> list[dict[str, float]]:
    """Simulations with more and more replicas, the last of which answers in time."""
    # As many as full replicas can serve at least; fewer would never catch up.
    replicas = max(1, int(clients / (PAUSE_S + durations(SLOTS)) * durations(SLOTS) / SLOTS))
    rows: list[dict[str, float]] = []
    while not rows or rows[-1]["first_p99_s"] > FIRST_TOKEN_S:
        found = simulate(durations, replicas, clients, pause_s=PAUSE_S, seconds=SIMULATED_S)
        rows.append({"replicas": replicas, **found})
        replicas += max(1, replicas // 20)
    return rows


# ---- both


def measure(model_dir: Path, *, seconds: float, clients: int, rounds: int, simulated: int) -> dict[str, Any]:
    """Medians over interleaved rounds, the simulation of the same load, and that of many clients."""
    tokenizer = load_tokenizer(model_dir)
    prompts = Prompts(len(tokenizer))

    def texts() -> str:  # the gateway takes no token ids
        return str(tokenizer.decode(prompts(PROMPT_TOKENS)))

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise PipelineError("this needs two cores, one for each replica")
    rows = []
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        replicas = [stack.enter_context(replica(model_dir, folder / str(core), core)) for core in cores[:2]]
        sides = {count: stack.enter_context(gateway(replicas[:count], folder)) for count in (1, 2)}
        numbers = [2**power for power in range(SLOTS.bit_length())]
        alone = {count: load(replicas[0], texts, count, seconds / 4) for count in numbers}
        for number in range(rounds):
            row = {}
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                answers = load(sides[count], texts, clients, seconds)
                row[count] = {
                    "tokens_per_second": speed(answers, clients),
                    "first_p50_s": statistics.median(answer.first_s for answer in answers),
                }
            rows.append(row)
            print(f"round {number + 1}: {json.dumps(row)}", file=sys.stderr, flush=True)
    durations = Durations(
        {count: statistics.fmean(answer.total_s for answer in answers) for count, answers in alone.items()},
        statistics.fmean(answer.first_s / answer.total_s for answer in alone[SLOTS]),
    )
    result: dict[str, Any] = {"clients": clients, "rounds": rows, "durations": durations.at, "sides": {}}
    for count in (1, 2):
        model = simulate(durations, count, clients, pause_s=0, seconds=100)
        measured = statistics.median(row[count]["tokens_per_second"] for row in rows)
        result["sides"][count] = {"measured": measured, "simulated": model["tokens_per_second"]}
    result["ratio"] = statistics.median(row[2]["tokens_per_second"] / row[1]["tokens_per_second"] for row in rows)
    result["simulation"] = {"clients": simulated, "pause_s": PAUSE_S, "rows": needed(durations, simulated)}
    result["machine"] = describe(torch.device("cpu"))
    return result


def table(result: dict[str, Any]) -> str:
    """Lines for people."""
    clients = result["clients"]
    lines = [f"two replicas of one core generate {result['ratio']:.2f} times as much as one, {clients} clients"]
    for count, side in result["sides"].items():
        error = side["simulated"] / side["measured"] - 1
        measured, simulated = (f"{side[name]:,.0f} tokens/s {name}" for name in ("measured", "simulated"))
        lines.append(f"replicas: {count}: {measured}, {simulated} ({error:+.0%})")
    simulation = result["simulation"]
    lines.append(f"{simulation['clients']:,} clients that pause for {simulation['pause_s']:.0f} s between two answers:")
    for row in simulation["rows"]:
        first = f"first token after {row['first_p50_s']:.2f} s (median) and {row['first_p99_s']:.2f} s (p99)"
        lines.append(f"replicas: {row['replicas']}: {row['tokens_per_second']:,.0f} tokens/s, {first}")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--clients", type=int, default=SLOTS, help="closed-loop clients that are measured")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--simulated", type=int, default=10_000, help="clients of the simulation")
    run_bench(parser, save_random_30m, measure, table)


if __name__ == "__main__":
    main()
