"""Converts TrainingSettings to transformers.TrainingArguments: arguments that settings fix, pass through or refuse.

Optimizer options are not among them: the optimizer reads them from TrainingSettings (optim/optimizer.py).
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from model.errors import PipelineError
from model.settings import TrainingSettings
from model.system.devices import Precision, set_tf32

# The training loop fixes these for resume, evaluation and logging: another value would break it silently.
_FIXED = frozenset(
    {
        "output_dir",
        "eval_strategy",
        "eval_on_start",
        "save_strategy",
        "logging_strategy",
        "load_best_model_at_end",
        "save_only_model",
        "metric_for_best_model",
        "greater_is_better",
        "logging_nan_inf_filter",
        "disable_tqdm",
        "report_to",
        "use_cpu",
        "bf16",
        "fp16",
        "num_train_epochs",
        "ignore_data_skip",
        "push_to_hub",
        "resume_from_checkpoint",
    }
)


def world_size() -> int:
    """Number of training processes (world size), from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(
    settings: TrainingSettings, initial_world_size: int, world_size: int, *, dropout: float = 0.0
) -> int:
    """Gradient accumulation steps per process with which `world_size` processes keep the batch of `initial_world_size`.

    dropout: the model's. Raises PipelineError if that is not an integer, and for a model with dropout, since each
    process has its own random state.
    """
    if initial_world_size == world_size:
        return settings.gradient_accumulation_steps
    total = settings.gradient_accumulation_steps * initial_world_size
    accumulation, remainder = divmod(total, world_size)
    began = f"{initial_world_size} processes began this training and {world_size} would continue it"
    if dropout:
        raise PipelineError(
            f"{began}, with model.attention_dropout {dropout:g} and a random state for each of {initial_world_size}: "
            f"start {initial_world_size} processes, or delete the scratch folder to start over"
        )
    if remainder:
        raise PipelineError(
            f"{began}: {total} passes a step (training.gradient_accumulation_steps times {initial_world_size}) cannot "
            f"be divided among {world_size}; start {initial_world_size} processes, or a number that divides them"
        )
    return accumulation


def share_batch(
    settings: TrainingSettings, initial_world_size: int, world_size: int, *, dropout: float = 0.0
) -> TrainingSettings:
    """The settings of each of `world_size` processes, which together take the batch of `initial_world_size`.

    Passes are divided among them; if their number does not divide, the windows are, in the largest passes that divide
    them.
    Raises PipelineError as `accumulation_steps` does, if the windows do not divide either.
    """
    size, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps * initial_world_size
    windows, remainder = divmod(size * passes, world_size)
    if passes % world_size == 0 or remainder or dropout:
        accumulation = accumulation_steps(settings, initial_world_size, world_size, dropout=dropout)
        return dataclasses.replace(settings, gradient_accumulation_steps=accumulation)
    size = max(fewer for fewer in range(1, size + 1) if windows % fewer == 0)
    return dataclasses.replace(settings, per_device_train_batch_size=size, gradient_accumulation_steps=windows // size)


_SHARDING = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
"""Arguments that divide the parameters among processes."""
_FSDP = ("fsdp", "fsdp_config")


def _distributed(device: torch.device) -> dict[str, Any]:
    """Options for several processes; transformers refuses `ddp_backend` in a single process."""
    if world_size() < 2:
        return {}
    return {"ddp_backend": "nccl" if device.type == "cuda" else "gloo", "ddp_find_unused_parameters": False}


def training_arguments(
    settings: TrainingSettings, scratch_dir: Path, device: torch.device, precision: Precision
) -> TrainingArguments:
    """The TrainingArguments of a run; `settings.arguments` are passed through unchanged.

    Raises PipelineError for an unknown name, a name that a setting or the loop already fixes, or a refused value.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    ours = {field.name for field in dataclasses.fields(TrainingSettings)}
    for name in settings.arguments:
        if name in ours:
            raise PipelineError(f"training.arguments names {name!r}: set training.{name} itself")
        if name in _FIXED:
            raise PipelineError(f"training.arguments names {name!r}: the training loop fixes it; remove it")
        if name not in known:
            raise PipelineError(
                f"training.arguments names {name!r}: expected a name of transformers.TrainingArguments; correct it"
            )
        if name in _FSDP and settings.arguments[name] and device.type != "cpu":
            raise PipelineError(
                f"training.arguments names {name!r}: accelerate's FSDP does not fit this project's optimizer and "
                "checkpoints; remove it, and set compute.sharding=fsdp2"
            )
        if name in _SHARDING and settings.arguments[name] and device.type == "cpu":
            raise PipelineError(
                f"training.arguments names {name!r}: on a CPU it would shard nothing and each process would hold the "
                "whole model; remove it, or train on GPUs"
            )
    values: dict[str, Any] = {
        "output_dir": str(scratch_dir),
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "max_grad_norm": settings.max_grad_norm,
        "warmup_steps": settings.warmup_steps,
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "use_cpu": device.type == "cpu",
        "torch_compile": settings.torch_compile,
        "activation_checkpointing": settings.activation_checkpointing,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_steps,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": settings.save_total_limit,
        "logging_strategy": "steps",
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # it would hide a non-finite loss in the average
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "seed": settings.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "accelerator_config": {"non_blocking": device.type == "cuda"},
        **_distributed(device),
        **settings.arguments,
    }
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"training.arguments {settings.arguments} refused by TrainingArguments: {reason}"
        ) from error
    set_tf32(enabled=bool(arguments.tf32))
    if device.type == "cuda" and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process would mean DataParallel; here each GPU has its own process
    return arguments
