"""nanoGPT as a peer: its published CPU run on a text, and its own GPU benchmark; the user clones it.

The given folder is copied first, so it stays unchanged. nanoGPT evaluates itself on a few random batches; for the
comparison this file scores its final weights on the whole validation part.
"""

import json
import os
import pickle
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import PipelineError

CONTEXT = 64
"""Characters that a window predicts in its published CPU setting."""
# https://github.com/karpathy/nanoGPT, README, "I only have a macbook"; the checkpoint of the last step is kept.
CPU_SETTING = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    f"--block_size={CONTEXT}",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
    "--always_save_checkpoint=True",
]

# As `evaluate` does: every token of the validation part but the first is predicted once, from at most `length` before.
SCORE = """
import json, sys
import numpy as np, torch
from model import GPT, GPTConfig
folder, data, length, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
saved = torch.load(f"{folder}/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()})
model.eval().to(device)
ids = torch.from_numpy(np.fromfile(data, np.uint16).astype(np.int64)).to(device)
nats = count = 0
with torch.no_grad():
    for start in range(0, len(ids) - 1, length):
        part = ids[start : start + length + 1]
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


def work_tree(folder: Path, scratch: Path) -> Path:
    """A copy of nanoGPT in `scratch`. Raises PipelineError if `folder` is not a work tree of it."""
    if not (folder / "train.py").is_file() or not (folder / "data" / "shakespeare_char" / "prepare.py").is_file():
        raise PipelineError(
            f"{folder} is not a work tree of nanoGPT: expected train.py and data/shakespeare_char/prepare.py; clone "
            "https://github.com/karpathy/nanoGPT and name its folder"
        )
    copy = scratch / "nanoGPT"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git"))
    return copy


def prepare(folder: Path, text: Path, scratch: Path) -> Path:
    """Copy nanoGPT to `scratch` and make its dataset from `text` with its own script."""
    copy = work_tree(folder, scratch)
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
    for line in _lines_of_training(copy, CPU_SETTING):
        if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
            last = time.perf_counter()
            first, printed = first or last, float(found[1])
    process_s, cpu_s = time.perf_counter() - started, children_cpu_s() - cpu_before
    loss = _score(copy, "out-shakespeare-char", "data/shakespeare_char/val.bin", CONTEXT, "cpu")
    return Run(process_s, last - first, cpu_s, loss, printed)


@dataclass
class Peer:
    """nanoGPT on a tokenized dataset of this project, whose ids are 16 bits wide.

    copy: of its work tree. length: tokens of a window. shape: layers, heads and hidden size. batch: windows of a batch,
    and batches of a step.
    """

    copy: Path
    dataset_dir: Path
    vocab_size: int
    length: int
    device: str
    shape: tuple[int, int, int]
    batch: tuple[int, int]

    def train(self, steps: int, learning_rate: float) -> dict[str, float]:
        """Train with a warm-up and a cosine, compiled and in bfloat16 on a GPU. process_s: of the whole process;
        step_s: median. loss: nats per token on the whole validation part.
        """
        data = self.copy / "data" / "tokens"
        if not data.exists():
            data.mkdir()
            for split, name in (("train", "train.bin"), ("validation", "val.bin")):
                (data / name).symlink_to((self.dataset_dir / f"{split}.bin").absolute())
            (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": self.vocab_size}))
        layers, heads, hidden = self.shape
        on_gpu = self.device == "cuda"
        values = {
            "dataset": "tokens",
            "out_dir": "out-tokens",
            "device": self.device,
            "compile": on_gpu,
            "dtype": "bfloat16" if on_gpu else "float32",
            "block_size": self.length,
            "batch_size": self.batch[0],
            "gradient_accumulation_steps": self.batch[1],
            "n_layer": layers,
            "n_head": heads,
            "n_embd": hidden,
            "dropout": 0.0,
            "max_iters": steps,
            "lr_decay_iters": steps,
            "warmup_iters": max(1, steps // 20),
            "learning_rate": learning_rate,
            "min_lr": learning_rate / 10,
            "eval_interval": steps,
            "eval_iters": 1,
            "log_interval": 1,
            "always_save_checkpoint": True,
        }
        started, times = time.perf_counter(), []
        for line in _lines_of_training(self.copy, [f"--{name}={value}" for name, value in values.items()]):
            if found := re.match(r"iter \d+: loss \S+, time ([\d.]+)ms", line):
                times.append(float(found[1]) / 1000)
        process_s = time.perf_counter() - started
        loss = _score(self.copy, "out-tokens", "data/tokens/val.bin", self.length - 1, self.device)
        return {"steps": steps, "process_s": process_s, "step_s": statistics.median(times), "loss": loss}


def _lines_of_training(copy: Path, arguments: list[str]) -> Iterator[str]:
    """What its `train.py` prints, as it does. Raises PipelineError if it fails."""
    with subprocess.Popen(
        [sys.executable, "train.py", *arguments],
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
            yield line
    if process.returncode:
        raise PipelineError(f"nanoGPT ended with {process.returncode}: {''.join(tail)[-500:]!r}")


def _score(copy: Path, folder: str, data: str, length: int, device: str) -> float:
    command = [sys.executable, "-c", SCORE, folder, data, str(length), device]
    done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["loss"])


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
