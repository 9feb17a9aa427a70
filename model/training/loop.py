"""The training loop: transformers' Trainer with this project's optimizer, data order, evaluation and checkpoints.

What differs from the stock Trainer, and why: windows come in an order that depends on the seed alone (a resumed run
skips to its place without reading data); evaluation gives bits per byte; a checkpoint appears complete or not at all;
a loss that is not finite stops the run before anything is saved.
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from model.errors import PipelineError
from model.evaluation import evaluate
from model.progress import Log, format_duration
from model.settings import TrainingSettings
from model.text.tokens import TokenDataset
from model.training import checkpoints
from model.training.optimizer import build_optimizer, warmup_stable_decay

OnMetrics = Callable[[int, dict[str, float]], None]

_LOG_EVERY_S = 5.0


class WindowSampler(Sampler[int]):
    """Indices of the windows of a whole training: every pass over the data in an order of its own.

    The order depends on `seed` and the pass alone, never on a global generator, so a resumed run finds its place.
    """

    def __init__(self, windows: int, samples: int, seed: int) -> None:
        """samples: how many windows the training takes, over as many passes as that needs."""
        self.windows, self.samples, self.seed = windows, samples, seed

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self.samples, self.windows):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first // self.windows)
            order = torch.randperm(self.windows, generator=generator)
            yield from order[: self.samples - first].tolist()


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack windows to (B, T). No attention_mask and no position_ids: with either, flash attention is lost."""
    input_ids_BT = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": input_ids_BT, "labels": input_ids_BT}


class RexTrainer(Trainer):  # type: ignore[misc]
    """The Trainer of one experiment; `train(resume_from_checkpoint=...)` runs it."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        settings: TrainingSettings,
        datasets: tuple[TokenDataset, TokenDataset],
        scratch_dir: Path,
        *,
        log: Log,
        on_metrics: OnMetrics | None,
        sample: Callable[[PreTrainedModel], str] | None,
    ) -> None:
        """datasets: training and validation. sample: a short text of the model, logged at each evaluation."""
        self.settings, self.scratch_dir = settings, scratch_dir
        self._log_line, self._on_metrics, self._sample = log, on_metrics, sample
        train_dataset, self.validation = datasets
        self._network, self._train_windows = model, len(train_dataset)
        callbacks: list[TrainerCallback] = []
        if settings.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
        callbacks.append(_Schedule(settings))
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=self.validation,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # it prints every log to stdout
        self._tokens_per_step = self.get_total_train_batch_size(arguments) * train_dataset.sequence_length
        self.trained_s = 0.0
        """Seconds of optimizer steps in this process: no evaluation, no saving."""
        self._last_line_s = self._last_log_s = self._started_s = time.monotonic()
        self._paused_s = self._earlier_s = 0.0
        self._first_step = self._last_log_step = 0

    # -- data, optimizer, schedule ------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        samples = self.args.max_steps * self.get_total_train_batch_size(self.args)
        return WindowSampler(self._train_windows, samples, self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `settings.optim`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self._network, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up, stable, linear decay, unless `arguments` names a schedule of transformers'."""
        if "lr_scheduler_type" in self.settings.arguments:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            warmup_steps, max_steps = self.settings.warmup_steps, num_training_steps
            decay_steps = min(round(self.settings.decay_fraction * max_steps), max_steps - warmup_steps)
            self.lr_scheduler = LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: warmup_stable_decay(
                    step, warmup_steps=warmup_steps, decay_steps=decay_steps, max_steps=max_steps
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and bits per byte on `eval_windows` validation windows, in the precision of the training."""
        started = time.monotonic()
        result = evaluate(
            self._network,
            self.validation,
            batch_size=self.args.per_device_eval_batch_size,
            max_windows=self.settings.eval_windows,
        )
        step = self.state.global_step
        if not math.isfinite(result.loss):
            raise self._diverged("validation loss", result.loss)
        metrics = {"eval_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        text = f", {self._sample(self._network)!r}" if self._sample is not None and step else ""
        self._log_line(
            f"step {step:,}: validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte{text}"
        )
        self._paused_s += time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # A run that stops early ends with a checkpoint that says so: continued after a kill, it stays stopped.
        self.control.should_save = self.control.should_save or self.control.should_training_stop
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or is_best
        return is_best

    # -- logging ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to the end, from the start or from a complete checkpoint of this run."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / checkpoints.STATE))
            self._first_step = self._last_log_step = state.global_step
            self._earlier_s = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._started_s = self._last_log_s = time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add one entry to the history, and pass it to `on_metrics` and, now and then, to the log."""
        if "train_runtime" in logs:  # the Trainer's closing statistics count a resumed run wrongly; ours replace them
            return
        now, step = time.monotonic(), self.state.global_step
        if "loss" in logs:
            busy_s = now - self._last_log_s - self._paused_s
            logs["tokens_per_second"] = (step - self._last_log_step) * self._tokens_per_step / max(busy_s, 1e-9)
            self.trained_s += busy_s
            self._last_log_s, self._paused_s, self._last_log_step = now, 0.0, step
        logs["seconds"] = self._earlier_s + now - self._started_s
        self.state.log_history.append({"step": step, **logs})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if self._on_metrics is not None:
            self._on_metrics(step, dict(logs))
        if "loss" in logs and (now - self._last_line_s >= _LOG_EVERY_S or step == self.state.max_steps):
            self._last_line_s = now
            left_s = (now - self._started_s) / (step - self._first_step) * (self.state.max_steps - step)
            self._log_line(
                f"step {step:,} of {self.state.max_steps:,} ({100 * step / self.state.max_steps:.0f} %): loss "
                f"{logs['loss']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s, {format_duration(left_s)} left"
            )

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # The sum of losses since the last log keeps a NaN. Reading it waits for a GPU, so there only when due anyway.
        due = self.control.should_log or self.control.should_evaluate or self.control.should_save
        if due or not tr_loss.is_cuda:
            if not math.isfinite(loss := tr_loss.item()):
                raise self._diverged("training loss", loss)
            # Under fp16 an infinite gradient is normal: the scaler skips the step and lowers its scale.
            if grad_norm is not None and not self.args.fp16 and not math.isfinite(norm := float(grad_norm)):
                raise self._diverged("gradient norm", norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _diverged(self, what: str, value: float) -> PipelineError:
        settings = self.settings
        rates = f"training.learning_rate ({settings.learning_rate:g})"
        if settings.optim == "muon":
            rates += f" or training.muon_learning_rate ({settings.muon_learning_rate:g})"
        return PipelineError(
            f"{what} is {value} at step {self.state.global_step}: expected a finite number; "
            f"{checkpoints.last_good(self.scratch_dir)}; lower {rates}"
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.staging(self.scratch_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started, step = time.monotonic(), self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process of a distributed run adds its random state
            if self.args.should_save:
                checkpoints.commit(self.scratch_dir, step)
                checkpoints.prune(self.scratch_dir, self.settings.save_total_limit, self.state.best_global_step)
        except (OSError, RuntimeError, SafetensorError) as error:
            if type(error) is RuntimeError and "PytorchStreamWriter" not in str(error):  # torch.save on a full disk
                raise
            shutil.rmtree(checkpoints.staging(self.scratch_dir), ignore_errors=True)
            raise _cannot_write(
                f"checkpoint-{step}", self.scratch_dir, error, checkpoints.last_good(self.scratch_dir)
            ) from error
        self._paused_s += time.monotonic() - started


class _Schedule(TrainerCallback):  # type: ignore[misc]
    """When to evaluate and log beyond the regular steps: early numbers, the last step, and wherever a save is due."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._evaluate_at = {settings.eval_steps // 10, settings.eval_steps // 3, settings.max_steps}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step in self._evaluate_at:
            control.should_evaluate = True
        # Logging empties the sum of losses, which a checkpoint does not hold: a resumed run must start with an empty one.
        if control.should_evaluate or control.should_save:
            control.should_log = True
        return control


def _cannot_write(what: str, directory: Path, error: Exception, state: str) -> PipelineError:
    """The one-line error for a disk that takes no more; `state` says what is left."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    free_mb = shutil.disk_usage(directory if directory.exists() else directory.parent).free / 1e6
    return PipelineError(
        f"cannot write {what} to {directory}: {reason} ({free_mb:,.0f} MB free); {state}; free space and run again"
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: by PyTorch on the GPU, or by this process (its resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
