"""The first benchmark to run on a GPU: correctness of the gradients, then speed of the steps.

    python -m bench.training gpu [--nanogpt DIR]            # gpt2_124m, compiled, bfloat16
    python -m bench.training gpu --shape tiny               # the same on any machine, in seconds

Each mode (eager and compiled, float32 and bfloat16) runs the self-check that starts every training
(`model/training/self_check.py`); a failing mode is reported and the others continue. Then the experiment's own mode is
timed, and compared with compiled nanoGPT if its folder is given.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.settings import read_settings
from bench.training import speed
from model.errors import PipelineError
from model.settings import TrainingSettings
from model.training.trainer import RexTrainer

MODES: dict[str, dict[str, Any]] = {
    "eager, float32": {"precision": "float32", "torch_compile": False},
    "eager, bfloat16": {"precision": "bfloat16", "torch_compile": False},
    "compiled, float32": {"precision": "float32", "torch_compile": True},
    "compiled, bfloat16": {"precision": "bfloat16", "torch_compile": True},
}


def check(shape: str, mode: str) -> tuple[bool, str]:
    """Whether the gradients of one of MODES are correct, and the line to print."""
    lines: list[str] = []
    settings = dataclasses.replace(
        read_settings(TrainingSettings, speed.SHAPES[shape][1]), device="auto", **MODES[mode]
    )
    with tempfile.TemporaryDirectory() as scratch:
        run, model = speed.prepare(shape, Path(scratch), settings)
        trainer = RexTrainer(dataclasses.replace(run, log=lines.append), model)
        trainer.model_wrapped = trainer.accelerator.prepare(model)
        try:
            trainer.check_gradients()
        except PipelineError as error:
            return False, str(error)
        finally:
            torch._dynamo.reset()
    return True, lines[-1]


def measure(
    shape: str, nanogpt: Path | None, rounds: int, steps: int, modes: list[str] | None = None
) -> dict[str, Any]:
    """The self-check of each mode, then the speed of the experiment's settings."""
    result: dict[str, Any] = {"shape": shape, "gradients": {}}
    for mode in modes or list(MODES):
        passed, line = check(shape, mode)
        result["gradients"][mode] = {"passed": passed, "message": line}
        print(f"{mode}: {line}", flush=True)
    if nanogpt is not None:
        return result | speed.compare_gpu(nanogpt, rounds, steps)
    side = speed.measure_side(f"{shape}:ours", steps)
    share = side["tokens_per_second"] * side["flops_per_token"] / side["matmul_peak_flops"]
    print(f"{side['tokens_per_second']:,.0f} tokens/s, {share:.0%} of the measured peak")
    return result | side
