"""One process against several on the same cores, and what copies of checkpoints in an object store cost.

    python -m bench.training processes [--shape stdlib_30m] [--url s3://BUCKET/PREFIX]

DDP: tokens/s of one process that computes with every core, and of one process for each core, which torchrun starts and
which share the batch. Copies: with `--url`, whose credentials and AWS_ENDPOINT_URL come from the environment, the same
steps with and without copies of the checkpoints; the time that the steps take longer, as a share of the interval
between two checkpoints of the experiment.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from bench.training.speed import side_in_process
from model.errors import PipelineError
from model.system.cpu import usable_cores


def measure(shape: str, rounds: int, steps: int, url: str) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    cores = usable_cores()
    result: dict[str, Any] = {"shape": shape, "cores": cores, "url": url, "rounds": []}
    for number in range(rounds):
        sides = {"one": lambda: side_in_process(f"{shape}:ours", steps), "several": lambda: _ddp(shape, steps, cores)}
        if url:
            sides |= {"plain": lambda: _saving(shape, ""), "copied": lambda: _saving(shape, url)}
        row = {name: sides[name]() for name in (sides if number % 2 == 0 else reversed(sides))}
        result["rounds"].append(row)
        print(f"round {number + 1}: {json.dumps(row)}", flush=True)
    speeds = [row["several"]["tokens_per_second"] / row["one"]["tokens_per_second"] for row in result["rounds"]]
    result["ddp_ratio"] = statistics.median(speeds)
    print(f"{shape}: {cores} processes of one thread train {result['ddp_ratio']:.2f} times as fast as one of {cores}")
    if url:
        stalls = [max(row["copied"]["excess_s"] - row["plain"]["excess_s"], 0.0) for row in result["rounds"]]
        shares = [stall / row["plain"]["interval_s"] for stall, row in zip(stalls, result["rounds"], strict=True)]
        result["stall_s"], result["stall_share"] = statistics.median(stalls), statistics.median(shares)
        print(f"a copy delays the steps by {result['stall_s']:.2f} s, {result['stall_share']:.2%} of their interval")
    return result


def _ddp(shape: str, steps: int, processes: int) -> dict[str, float]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "bench.training", "side", f"{shape}:ours", str(steps)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise PipelineError(f"{processes} processes of {shape} ended with {done.returncode}: {done.stderr[-500:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(min(found, key=lambda one: one["tokens_per_second"]))


def _saving(shape: str, url: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.training", "cost", shape, scratch, "fresh", "--copies", url]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"the training of {shape} ended with {done.returncode}: {done.stderr[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"excess_s": found["excess_s"], "interval_s": found["save_steps"] * found["step_s"]}
