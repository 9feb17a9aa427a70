"""Errors that end a training: one line with step, documents, last checkpoint and the setting to change."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings
from model.text.tokens import TokenDataset
from model.training.checkpoints import local as checkpoints
from model.training.run import TrainingRun

_SHOWN = 8


def documents_of(dataset: TokenDataset, windows: Sequence[int]) -> list[int]:
    """Sorted indices of the documents in these windows; 0 is the split's first document."""
    found: set[int] = set()
    if dataset.responses is not None:
        for window in windows:
            found.update(dataset.documents(window))
        return sorted(found)
    stride = dataset.sequence_length - 1
    for window in windows:
        first, last = window * stride, window * stride + stride
        low, high = np.searchsorted(dataset.document_offsets, [first, last], side="right") - 1
        found.update(range(int(low), min(int(high), len(dataset.document_offsets) - 2) + 1))
    return sorted(found)


def diverged(
    what: str, value: float, step: int, documents: Sequence[int], settings: TrainingSettings, scratch_dir: Path
) -> PipelineError:
    """The error for a loss or gradient that is not finite. documents: those of the batch, if any."""
    rates = f"training.learning_rate ({settings.learning_rate:g})"
    if settings.optim == "muon":
        rates += f" or training.muon_learning_rate ({settings.muon_learning_rate:g})"
    where = ""
    if documents:
        more = f" and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
        numbers = ", ".join(map(str, documents[:_SHOWN]))
        where = f" on documents {numbers}{more} of the train split"
    return PipelineError(
        f"{what} is {value} at step {step}{where}: expected a finite number; "
        f"{checkpoints.last_good(scratch_dir)}; lower {rates}"
    )


def cannot_write(step: int, directory: Path, error: Exception) -> PipelineError:
    """The error for a full disk."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    free_mb = shutil.disk_usage(directory if directory.exists() else directory.parent).free / 1e6
    return PipelineError(
        f"cannot write checkpoint-{step} to {directory}: {reason} ({free_mb:,.0f} MB free); "
        f"{checkpoints.last_good(directory)}; free space and run again"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU PyTorch raises a specific type, on a CPU only a message tells."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)) is not None
    )


def out_of_memory(model: RexForCausalLM, run: TrainingRun) -> PipelineError:
    """The error for a batch that does not fit, with a size that does, found by halving on the same model.

    Of a sharded model without that size.
    """
    size, accumulation = run.settings.per_device_train_batch_size, run.settings.gradient_accumulation_steps
    if run.is_sharded:  # a pass needs all processes, and the others do not know of this
        return PipelineError(
            f"training.per_device_train_batch_size is {size}: out of memory on {model.device.type}; lower it and raise "
            "training.gradient_accumulation_steps, or set training.activation_checkpointing=true"
        )
    fits = size // 2
    while fits and not _fits(model, fits, run):
        fits //= 2
    message = f"training.per_device_train_batch_size is {size}: out of memory on {model.device.type}; "
    if not fits:
        return PipelineError(
            message + "one window does not fit either: lower tokenizer.sequence_length or the model's size, or set "
            "training.activation_checkpointing=true"
        )
    # The run's value, not the experiment's: after a resume with another world size, accumulation differs.
    passes = accumulation * size // fits
    same = "the same batch" if fits * passes == accumulation * size else "nearly as large"
    return PipelineError(
        message + f"{fits} fits: set it to {fits}, and training.gradient_accumulation_steps to {passes} for {same}"
    )


def _fits(model: RexForCausalLM, size: int, run: TrainingRun) -> bool:
    model.zero_grad(set_to_none=True)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        ids_BT = torch.zeros(size, run.sequence_length, dtype=torch.long, device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=run.arguments.bf16):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True
