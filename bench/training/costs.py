"""Overheads of a training: reading data, saving a checkpoint, resuming, each relative to the steps it delays.

    python -m bench.training costs [--shape stdlib]

RexTrainer with the experiment's settings on random ids, first from step 0 and then, in a separate process, from its
checkpoint, whose step is set near the end of a training: the resume skips the whole data order. Saving includes the
flush to disk; evaluation is excluded.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.settings import read_settings
from bench.training.speed import SHAPES, Clock, build_trainer
from model.progress import silent
from model.settings import TrainingSettings
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints.remote import RemoteCheckpoints, copied
from model.training.trainer import RexTrainer

STEPS, SAVED_AT = 12, (4, 8)


class _Timed(RexTrainer):
    """Seconds of each read and each save; no evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reading: list[float] = []
        self.saving: list[float] = []

    def get_batch_samples(self, *args: Any) -> Any:
        return _timed(self.reading, lambda: super(_Timed, self).get_batch_samples(*args))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        _timed(self.saving, lambda: super(_Timed, self)._save_checkpoint(model, trial))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": 0.0}


def _timed(seconds: list[float], call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    seconds.append(time.perf_counter() - started)
    return result


def run(shape: str, scratch: Path, resumed: bool, url: str = "") -> dict[str, float]:
    """Train a few steps; returns the seconds of the steps, reads, saves and start.

    url: where the checkpoints are copied to while the steps go on; empty: nowhere. excess_s: time of the steps and
    saves beyond the median of each, for one save.
    """
    full = read_settings(TrainingSettings, SHAPES[shape][1])
    settings = dataclasses.replace(full, eval_steps=10**6, save_steps=SAVED_AT[0], logging_steps=10**6)
    trainer, clock = build_trainer(_Timed, shape, scratch, settings), Clock()
    trainer.add_callback(clock)
    newest = None
    if resumed:
        newest = checkpoints.checkpoint_dir(scratch, SAVED_AT[-1])
        state = json.loads((newest / checkpoints.STATE).read_text())
        state["global_step"] = full.max_steps - (STEPS - SAVED_AT[-1])
        (newest / checkpoints.STATE).write_text(json.dumps(state))
    else:
        trainer.args.max_steps = STEPS
    remote = RemoteCheckpoints(f"{url}/{uuid.uuid4().hex}", scratch, silent) if url else None
    with copied(remote, scratch, silent):
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if remote:
        remote.remove()
    marks = clock.marks[1:]
    expected_s = (len(marks) - 1) * clock.median_s() + sum(trainer.saving)
    return {
        "excess_s": (marks[-1] - marks[0] - expected_s) / len(trainer.saving),
        "to_first_step_s": clock.marks[0] - started,
        "step_s": clock.median_s(),
        "reading_s": median(trainer.reading[1:]),
        "saving_s": median(trainer.saving),
        "save_steps": full.save_steps,
        "gradient_accumulation_steps": full.gradient_accumulation_steps,
    }


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """Medians over rounds of a new and a resumed run."""
    rows = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            fresh, resumed = (_in_process(shape, scratch, kind) for kind in ("fresh", "resumed"))
        rows.append(
            {
                "step_s": fresh["step_s"],
                "reading_share": fresh["reading_s"] / fresh["step_s"],
                "saving_s": fresh["saving_s"],
                "saving_share": fresh["saving_s"] / (fresh["save_steps"] * fresh["step_s"]),
                "resuming_s": resumed["to_first_step_s"] - fresh["to_first_step_s"],
            }
        )
        print(f"round {number + 1}: {json.dumps(rows[-1])}", flush=True)
    found = {name: median(row[name] for row in rows) for name in rows[0]}
    print(
        f"{shape}: reading a batch takes {found['reading_share']:.2%} of a step of {found['step_s']:.3f} s, saving "
        f"every {fresh['save_steps']} steps {found['saving_share']:.2%} of the time ({found['saving_s']:.2f} s each); "
        f"a resumed run takes {found['resuming_s']:.2f} s more to its first step, its checkpoint's files included"
    )
    return {"shape": shape, "rounds": rows, **found}


def _in_process(shape: str, scratch: str, kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.training", "cost", shape, scratch, kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
