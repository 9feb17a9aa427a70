"""nanoGPT as a peer: its published CPU run on a text, and its own GPU benchmark; the user clones it.

The given folder is copied first, so it stays unchanged. nanoGPT evaluates itself on a few random batches; for the
comparison this file scores its final weights on the whole validation part.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from model.errors import PipelineError

CONTEXT = 64
# https://github.com/karpathy/nanoGPT, README, "I only have a macbook"; the checkpoint of the last step is kept.
CPU_SETTING = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
    "--always_save_checkpoint=True",
]

# As `evaluate` does: every character of the validation part but the first is predicted once, from at most 64 before it.
SCORE = """
import json, sys
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
nats = count = 0
with torch.no_grad():
    for start in range(0, len(ids) - 1, 64):
        part = ids[start : start + 65]
        loss = model(part[None, :-1], part[None, 1:])[1].item()
        nats, count = nats + loss * (len(part) - 1), count + len(part) - 1
print(json.dumps({"loss": nats / count, "iterations": saved["iter_num"]}))
"""


@dataclass
class Run:
    """process_s: wall time from start to end of the process; loop_s: from the first evaluation to the last.

    cpu_s: CPU time of the process, which other work on the machine does not lengthen; with OMP_NUM_THREADS=1 it is the
    wall time on an idle core.
    loss: nats per character on the whole validation part.
    printed: nanoGPT's own estimate at its last step.
    """

    process_s: float
    loop_s: float
    cpu_s: float
    loss: float
    printed: float


def children_cpu_s() -> float:
    """CPU seconds of all ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepare(folder: Path, text: Path, scratch: Path) -> Path:
    """Copy nanoGPT to `scratch` and make its dataset from `text` with its own script.

    Raises PipelineError if `folder` is not a work tree of nanoGPT.
    """
    if not (folder / "train.py").is_file() or not (folder / "data" / "shakespeare_char" / "prepare.py").is_file():
        raise PipelineError(
            f"{folder} is not a work tree of nanoGPT: expected train.py and data/shakespeare_char/prepare.py; clone "
            "https://github.com/karpathy/nanoGPT and name its folder"
        )
    copy = scratch / "nanoGPT"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git"))
    shutil.copyfile(text, copy / "data" / "shakespeare_char" / "input.txt")
    subprocess.run(
        [sys.executable, "prepare.py"], cwd=copy / "data" / "shakespeare_char", check=True, capture_output=True
    )
    return copy


def train(copy: Path) -> Run:
    """Run the published CPU setting to completion and score the weights."""
    started, cpu_before = time.perf_counter(), children_cpu_s()
    first = last = 0.0
    printed = float("nan")
    with subprocess.Popen(
        [sys.executable, "train.py", *CPU_SETTING],
        cwd=copy,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-20:], line]
            if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                last = time.perf_counter()
                first, printed = first or last, float(found[1])
    if process.returncode:
        raise PipelineError(f"nanoGPT ended with {process.returncode}: {''.join(tail)[-500:]!r}")
    process_s, cpu_s = time.perf_counter() - started, children_cpu_s() - cpu_before
    scored = subprocess.run([sys.executable, "-c", SCORE], cwd=copy, check=True, capture_output=True, text=True)
    return Run(process_s, last - first, cpu_s, json.loads(scored.stdout.splitlines()[-1])["loss"], printed)


def gpu_tokens_per_second(copy: Path, batch_size: int) -> float:
    """Tokens/s of nanoGPT's own `bench.py`: GPT-2 124M, compiled, bfloat16, synthetic data, 1,024 tokens a window."""
    done = subprocess.run(
        [sys.executable, "bench.py", "--real_data=False", f"--batch_size={batch_size}"],
        cwd=copy, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = re.search(r"time per iteration: ([\d.]+)ms", done.stdout)
    if found is None:
        raise PipelineError(f"nanoGPT's bench.py printed no time per iteration: {done.stdout[-300:]!r}")
    return batch_size * 1024 / (float(found[1]) / 1000)
