"""The resolved configuration of one training: data, model shape, device, precision, world size and batch size.

`train` builds it once (`prepare_run`); the Trainer, the self-check and the error messages read it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from model.configuration_rex import RexConfig
from model.errors import PipelineError
from model.progress import Log, silent
from model.settings import TrainingSettings
from model.settings.compute import Sharding
from model.system.devices import Precision, resolve_device, resolve_precision
from model.text.tokens import TokenDataset
from model.training.arguments import share_batch, training_arguments, world_size
from model.training.checkpoints import local as checkpoints

OnMetrics = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingRun:
    """Constants of a training in this process.

    settings.gradient_accumulation_steps and per_device_train_batch_size are the current values per process: where
    processes share the batch, and after a resume with another world size, they differ from the experiment's.
    """

    settings: TrainingSettings
    config: RexConfig
    train: TokenDataset
    validation: TokenDataset
    scratch_dir: Path
    arguments: TrainingArguments
    device: torch.device
    precision: Precision
    initial_world_size: int
    """Number of processes that began this training, each with the batch of the settings; 1 if they share it."""
    log: Log = silent
    on_metrics: OnMetrics | None = None
    is_sharded: bool = False
    """Whether parameters are divided among the processes (sharding.py)."""

    @property
    def world_size(self) -> int:
        """Current number of processes."""
        return int(self.arguments.world_size)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and reports."""
        return bool(self.arguments.process_index == 0)

    @property
    def sequence_length(self) -> int:
        """Tokens per window."""
        return self.train.sequence_length

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimizer step, over all passes and processes."""
        settings = self.settings
        return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all passes and processes."""
        return self.windows_per_step * self.sequence_length


def prepare_run(
    settings: TrainingSettings,
    config: RexConfig,
    datasets: tuple[TokenDataset, TokenDataset],
    scratch_dir: Path,
    *,
    log: Log = silent,
    on_metrics: OnMetrics | None = None,
    shares_batch: bool = False,
    sharding: Sharding = "none",
    shards_on_cpu: bool = False,
) -> TrainingRun:
    """Resolve device, precision and accumulation, and build the TrainingArguments. datasets: training and validation.

    shares_batch, shards_on_cpu: as in `train`. sharding: `compute.sharding`. Raises PipelineError for an unavailable
    device, refused arguments, a world size that cannot continue the training, and sharding where it saves nothing.
    """
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    if sharding != "none":
        expect_sharding_helps(sharding, device, precision, world_size(), shards_on_cpu=shards_on_cpu)
    initial = checkpoints.initial_world_size(scratch_dir) or (1 if shares_batch else world_size())
    settings = share_batch(settings, initial, world_size(), dropout=config.attention_dropout)
    arguments = training_arguments(settings, scratch_dir, device, precision)  # joins the other processes
    is_main_process = arguments.process_index == 0
    return TrainingRun(
        settings=settings,
        config=config,
        train=datasets[0],
        validation=datasets[1],
        scratch_dir=scratch_dir,
        arguments=arguments,
        device=device,
        precision=precision,
        initial_world_size=initial,
        log=log if is_main_process else silent,
        on_metrics=on_metrics if is_main_process else None,
        is_sharded=sharding != "none",
    )


def expect_sharding_helps(
    sharding: Sharding, device: torch.device, precision: Precision, processes: int, *, shards_on_cpu: bool = False
) -> None:
    """Raises PipelineError on a CPU, in a single process, and for float16, whose loss scaling is not sharded."""
    if device.type == "cpu" and not shards_on_cpu:
        raise PipelineError(
            f"compute.sharding is {sharding!r}: expected 'none' on a CPU, as sharding is for the memory of GPUs and "
            "slows training on CPUs down; set compute.sharding=none, or train on GPUs"
        )
    if processes < 2:
        raise PipelineError(
            f"compute.sharding is {sharding!r} and one process trains: expected at least two, which divide the "
            "parameters; raise compute.processes, or set compute.sharding=none, which continues a sharded checkpoint"
        )
    if precision == "float16":
        raise PipelineError(
            f"compute.sharding is {sharding!r} and training.precision is 'float16': expected bfloat16 or float32, as "
            "the scaling of float16's loss is not sharded; set training.precision"
        )
