"""Checkpoints of a running training: complete or absent, so that a kill at any moment loses nothing.

A checkpoint is written under `incomplete/`, flushed to disk, marked `committed`, and moved into place with one rename;
removing one starts with a rename back. Folders in `incomplete/` or without the marker are never read. `run.json`
identifies the training.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from model.errors import PipelineError

RECORD = "run.json"
STATE = "trainer_state.json"
LOSS_SUM = "loss_sum.json"
"""Loss sums per process since the last log line, and that line's step, which the Trainer keeps only in memory.
"""
COMMITTED = "committed"
_NAME = re.compile(r"checkpoint-(\d+)")


def staging(scratch_dir: Path) -> Path:
    """Where a checkpoint is written before it is committed."""
    return scratch_dir / "incomplete"


def checkpoint_dir(scratch_dir: Path, step: int) -> Path:
    """Folder of the complete checkpoint after `step` optimizer steps."""
    return scratch_dir / f"checkpoint-{step}"


def steps_saved(scratch_dir: Path) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    names = (_NAME.fullmatch(path.name) for path in scratch_dir.glob("checkpoint-*") if (path / COMMITTED).is_file())
    return sorted(int(name[1]) for name in names if name)


def last_good(scratch_dir: Path) -> str:
    """Description of the newest complete checkpoint, for an error message."""
    steps = steps_saved(scratch_dir)
    if not steps:
        return "no checkpoint was written yet"
    return f"the last good checkpoint is {checkpoint_dir(scratch_dir, steps[-1])}"


def commit(scratch_dir: Path, step: int) -> None:
    """Publish the staged checkpoint of `step`: flush its files, then rename the folder into place."""
    staged = staging(scratch_dir) / f"checkpoint-{step}"
    for path in staged.iterdir():
        _flush(path)
    # The marker is written last: on storage without atomic rename (an object store) it marks completeness.
    (staged / COMMITTED).touch()
    _flush(staged / COMMITTED)
    _flush(staged)
    final = checkpoint_dir(scratch_dir, step)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _flush(scratch_dir)  # the rename itself


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(scratch_dir: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for step in steps_saved(scratch_dir)[:-keep]:
        if step != best_step:
            staging(scratch_dir).mkdir(exist_ok=True)
            checkpoint_dir(scratch_dir, step).rename(staging(scratch_dir) / f"removed-{step}")
    shutil.rmtree(staging(scratch_dir), ignore_errors=True)


def open_scratch(scratch_dir: Path, identity: dict[str, Any]) -> int | None:
    """Step to resume from, None for a new training; removes incomplete files of a killed run.

    identity: all settings and data that determine the result. Raises PipelineError if `scratch_dir` holds another
    training: continuing would mix the two.
    """
    scratch_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging(scratch_dir), ignore_errors=True)
    record = scratch_dir / RECORD
    if record.is_file():
        found = json.loads(record.read_text())
        if different := _differences(found, identity):
            raise PipelineError(
                f"{scratch_dir} holds checkpoints of another training ({', '.join(different)} differ): "
                "delete the folder to start over, or restore the settings to continue"
            )
    else:
        partial = record.with_suffix(".tmp")
        partial.write_text(json.dumps(identity, indent=2, sort_keys=True))
        partial.rename(record)
    steps = steps_saved(scratch_dir)
    return steps[-1] if steps else None


def initial_world_size(scratch_dir: Path) -> int | None:
    """Number of processes that began the training in `scratch_dir`; None if there is no training."""
    record = scratch_dir / RECORD
    return json.loads(record.read_text())["processes"] if record.is_file() else None


def _differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted({*found, *expected}):
        old, new = found.get(key), expected.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(prefix + key)
    return names


def is_finished(state: TrainerState) -> bool:
    """Whether a training with this state is finished: all steps done, or stopped early."""
    saved: Any = state.stateful_callbacks  # as JSON: the Trainer's control flags are among them
    return saved["TrainerControl"]["args"]["should_training_stop"] or state.global_step >= state.max_steps
