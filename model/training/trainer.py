"""The training loop: transformers' Trainer with this project's optimizer, data order, evaluation and checkpoints.

Differences from the stock Trainer: the window order depends only on the seed (a resumed run skips to its position
without reading data); evaluation gives bits per byte; a checkpoint is complete or absent, and holds the loss sum of the
next log line; a termination signal is deferred to the end of the step, after a save; a non-finite loss stops the run
before anything is saved. docs/architecture.md lists the private methods and attributes of the Trainer that this relies
on, with the tested versions of transformers.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import AutocastKwargs
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from model.errors import PipelineError
from model.evaluation import evaluate, scores_of_sources
from model.kernels.attention import ATTENTION
from model.kernels.norm_rotary import use_cpu_kernels
from model.modeling_rex import RexForCausalLM
from model.progress import format_duration
from model.settings import TrainingSettings
from model.system.allocator import keep_freed_memory
from model.system.devices import set_tf32
from model.text.mixture import mixed_order, shares
from model.text.tokens import TokenDataset
from model.training import failures, health
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints import sharded
from model.training.loss import TrainingLoss
from model.training.optim.optimizer import build_optimizer
from model.training.optim.schedule import muon_momentum, warmup_stable_decay
from model.training.run import TrainingRun
from model.training.self_check import self_check
from model.training.sharding import ShardedPredictor, reshard, shard_model, whole
from model.training.signals import DeferredSignals, deferred_signals
from model.training.throughput import flops_per_token, peak_memory_bytes

_LOG_EVERY_S = 5.0
SCHEDULER = "scheduler.pt"
"""As the Trainer names it."""


class WindowSampler(Sampler[int]):
    """Window indices of a whole training: each epoch is shuffled differently.

    The order depends only on `seed` and the epoch, never on a global generator, so that a resumed run finds its
    position.
    """

    def __init__(self, windows: int, samples: int, seed: int, mixed: Callable[[], Iterator[int]] | None = None) -> None:
        """samples: number of windows of the training, over as many epochs as necessary. mixed: the order of a mixture
        with weights, in which sources have epochs of their own.
        """
        self.windows, self.samples, self.seed, self._mixed = windows, samples, seed, mixed

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        if self._mixed:
            yield from self._mixed()
            return
        for first in range(0, self.samples, self.windows):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first // self.windows)
            order = torch.randperm(self.windows, generator=generator)
            yield from order[: self.samples - first].tolist()


def source_shares(train: TokenDataset, settings: TrainingSettings) -> list[float] | None:
    """Share of the training windows of each source; None if all windows are as frequent.

    Raises PipelineError for weights that do not fit the sources.
    """
    names = train.sources.names if train.sources else ()
    windows = np.bincount(train.window_sources(), minlength=len(names)).tolist() if names else []
    return shares(names, windows, settings.mixture_weights)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack windows to (B, T). No attention_mask and no position_ids: either would disable flash attention."""
    input_ids_BT = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": input_ids_BT, "labels": torch.stack([item["labels"] for item in items])}


class RexTrainer(Trainer):  # type: ignore[misc]
    """The Trainer of one experiment; `train(resume_from_checkpoint=...)` runs it."""

    def __init__(
        self,
        run: TrainingRun,
        model: RexForCausalLM,
        *,
        teacher: RexForCausalLM | None = None,
        sample: Callable[[RexForCausalLM], str] | None = None,
        peak_flops: float = 1.0,
    ) -> None:
        """teacher: on the run's device. sample: a short text of the model, logged at each evaluation.

        peak_flops: the denominator of `model_flops_utilization`, in FLOP/s of one process.
        """
        self.run, self.settings = run, run.settings
        self._sample, self._network, self._teacher = sample, model, teacher
        model.linear_loss = TrainingLoss(run.settings, teacher)
        if run.device.type == "cpu":
            keep_freed_memory()
            if not run.settings.torch_compile:
                model.config._attn_implementation = ATTENTION
                # They take the weights of norms in float32; sharding in bfloat16 gathers those in bfloat16.
                if not (run.is_sharded and run.precision == "bfloat16"):
                    use_cpu_kernels(model)
        if run.is_sharded:
            shard_model(model, run.device, run.precision)
        callbacks: list[TrainerCallback] = []
        if run.settings.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(run.settings.early_stopping_patience))
        callbacks += [_Schedule(run.settings), _Bookkeeping(self)]
        super().__init__(
            model=model,
            args=run.arguments,
            data_collator=collate,
            train_dataset=run.train,
            eval_dataset=run.validation,
            callbacks=callbacks,
        )
        set_tf32(enabled=bool(run.arguments.tf32))  # accelerate has just switched it on
        # The Trainer's own switch for a model that arrives sharded: it adds autocast, and neither DDP nor FSDP.
        self.is_distributed_loading_by_transformers = run.is_sharded
        self.remove_callback(PrinterCallback)  # it prints every log to stdout
        self._flops_per_token = flops_per_token(model, run.sequence_length)
        self._peak_flops = peak_flops * run.world_size
        self.interrupts = DeferredSignals()
        self.trained_s = 0.0
        """Seconds of optimizer steps in this process: no evaluation, no saving."""
        self._last_line_s = self._last_log_s = self._started_s = time.monotonic()
        self._paused_s = self._earlier_s = 0.0
        self._first_step = self._last_log_step = 0
        self.warnings: list[str] = []
        """Health warnings so far, one line each."""

    # -- data, optimizer, schedule ------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        samples = self.args.max_steps * self.run.windows_per_step
        return WindowSampler(len(self.run.train), samples, self.args.seed, self._mixed_order(samples))

    def _mixed_order(self, samples: int) -> Callable[[], Iterator[int]] | None:
        """The order of windows where a mixture has weights."""
        fractions = source_shares(self.run.train, self.settings)
        if fractions is None:
            return None
        return partial(mixed_order, self.run.train.window_sources(), fractions, samples, self.args.seed)

    def _windows(self, step: int) -> list[int]:
        """Windows in the batch of the 1-based `step`, over all processes."""
        batch = self.run.windows_per_step
        return list(islice(iter(self._get_train_sampler()), (step - 1) * batch, step * batch))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `settings.optim`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self._network, self.settings, self.run.precision)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up, stable, linear decay, unless `arguments` names a schedule of transformers'."""
        if "lr_scheduler_type" in self.settings.arguments:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            warmup_steps, max_steps = self.settings.warmup_steps, num_training_steps
            decay_steps = self._decay_steps(max_steps)
            self.lr_scheduler = LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: warmup_stable_decay(
                    step,
                    warmup_steps=warmup_steps,
                    decay_steps=decay_steps,
                    max_steps=max_steps,
                    floor=self.settings.final_learning_rate,
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _decay_steps(self, max_steps: int) -> int:
        return min(round(self.settings.decay_fraction * max_steps), max_steps - self.settings.warmup_steps)

    def set_momentum(self) -> None:
        """Set Muon's momentum for the next step; it depends only on the step, so a resumed run has the same."""
        settings, max_steps = self.settings, self.args.max_steps
        momentum = muon_momentum(
            self.state.global_step,
            start=settings.muon_momentum_start,
            peak=settings.muon_momentum,
            warmup_steps=settings.muon_momentum_warmup_steps,
            decay_steps=self._decay_steps(max_steps),
            max_steps=max_steps,
        )
        for group in self.create_optimizer().param_groups:
            group["momentum"] = momentum

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and bits per byte on `eval_windows` validation windows, in the training's precision."""
        started = time.monotonic()
        # Autocast's cache would keep a copy of all weights that sharding gathers one layer at a time.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=not self.run.is_sharded)):
            result = evaluate(
                ShardedPredictor(self._network) if self.run.is_sharded else self._network,
                self.run.validation,
                batch_size=self.args.per_device_eval_batch_size,
                max_windows=self.settings.eval_windows,
            )
        step = self.state.global_step
        if not math.isfinite(result.loss):
            raise failures.diverged("validation loss", result.loss, step, [], self.settings, self.run.scratch_dir)
        metrics = {"eval_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        for name, of_source in scores_of_sources(result).items():
            metrics |= {f"eval_loss/{name}": of_source.loss, f"bits_per_byte/{name}": of_source.bits_per_byte}
        text = ""
        if self._sample is not None and step and (self.args.should_save or self.run.is_sharded):
            text = self._sample(self._network)  # all processes together where each layer has to be gathered
            reshard(self._network)
        self.run.log(
            f"step {step:,}: validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte"
            + (f", {text!r}" if text else "")
        )
        self._paused_s += time.monotonic() - started
        self.log(metrics)
        if text:
            self.state.log_history[-1]["sample"] = text  # type: ignore[assignment]  # JSON; typed as numbers
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # Save the early stop in a checkpoint, so that a run killed here does not continue training after a resume.
        self.control.should_save = self.control.should_save or self.control.should_training_stop
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save = self.control.should_save or is_best
        return is_best

    # -- logging ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to completion, from the start or from a complete checkpoint of this run."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / checkpoints.STATE))
            self._first_step = self._last_log_step = state.global_step
            self._earlier_s = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._resumed_from = resume_from_checkpoint
        self._started_s = self._last_log_s = time.monotonic()
        with deferred_signals() as self.interrupts:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_gradients(self) -> None:
        """Compare the training path with plain float32 on the CPU (self_check.py), unless DeepSpeed trains."""
        if not self.settings.self_check:
            return
        if self.is_deepspeed_enabled:
            self.run.log("self-check: skipped, as DeepSpeed holds the parameters")
            return
        started = time.monotonic()
        scaler = self.accelerator.scaler
        self_check(
            self.run,
            self._network,
            self._teacher,
            lambda batch, items: self.training_step(self.model_wrapped, batch, items),
            gradient_scale=scaler.get_scale() if scaler is not None else 1.0,
        )
        self._paused_s += time.monotonic() - started

    def begin_watch(self) -> None:
        """Record the initial parameters and the unigram loss on the evaluation windows."""
        self._motion = health.ParameterMotion(self._network, self.state.global_step)
        self._unigram_loss = health.unigram_loss(self.run)

    def watch(self) -> list[str]:
        """Current health warnings, one line each (health.py); new ones are logged and counted."""
        found = health.find_warnings(
            self.state.log_history, self.settings, self._unigram_loss, self._motion.unmoved(self.state.global_step)
        )
        for line in found:
            if line not in self.warnings:
                self.run.log(f"warning: {line}")
        self.warnings = found
        return found

    def restore_loss_sum(self) -> None:
        """Restore the sum of losses since the last log line from the checkpoint."""
        if isinstance(self._resumed_from, str):
            held = json.loads((Path(self._resumed_from) / checkpoints.LOSS_SUM).read_text())
            sums = held["sums"]
            # A log line reports the mean over processes: after a resume with another world size, each starts from the
            # mean.
            own = sums[self.args.process_index] if len(sums) == self.args.world_size else sum(sums) / len(sums)
            self._tr_loss = torch.tensor(own, device=self.args.device)
            self._globalstep_last_logged = held["last_logged_step"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add one entry to the history, pass it to `on_metrics` and, periodically, to the log."""
        if "train_runtime" in logs:  # the Trainer's final statistics are wrong for a resumed run; ours replace them
            return
        now, step = time.monotonic(), self.state.global_step
        if "loss" in logs:
            busy_s = now - self._last_log_s - self._paused_s
            tokens_per_second = (step - self._last_log_step) * self.run.tokens_per_step / max(busy_s, 1e-9)
            logs["tokens_per_second"] = tokens_per_second
            logs["model_flops_per_second"] = tokens_per_second * self._flops_per_token
            logs["model_flops_utilization"] = logs["model_flops_per_second"] / self._peak_flops
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
            self.trained_s += busy_s
            self._last_log_s, self._paused_s, self._last_log_step = now, 0.0, step
        logs["seconds"] = self._earlier_s + now - self._started_s
        self.state.log_history.append({"step": step, **logs})
        if warnings := self.watch():
            logs["health_warnings"] = float(len(warnings))
            self.state.log_history[-1]["health_warnings"] = logs["health_warnings"]
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if self.run.on_metrics is not None:
            self.run.on_metrics(step, dict(logs))
        if "loss" in logs and (now - self._last_line_s >= _LOG_EVERY_S or step == self.state.max_steps):
            self._last_line_s = now
            left_s = (now - self._started_s) / (step - self._first_step) * (self.state.max_steps - step)
            self.run.log(
                f"step {step:,} of {self.state.max_steps:,} ({100 * step / self.state.max_steps:.0f} %): loss "
                f"{logs['loss']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s, {format_duration(left_s)} left"
            )

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # A NaN stays in the sum of losses since the last log. Reading it synchronizes a GPU: there only when due.
        due = self.control.should_log or self.control.should_evaluate or self.control.should_save
        if due or not tr_loss.is_cuda:
            if not math.isfinite(loss := tr_loss.item()):
                raise self._diverged("training loss", loss)
            # Under fp16 an infinite gradient is normal: the scaler skips the step and lowers its scale.
            if grad_norm is not None and not self.args.fp16 and not math.isfinite(norm := float(grad_norm)):
                raise self._diverged("gradient norm", norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return whole(norm) if isinstance(norm, Tensor) else norm

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        yield  # defers nothing: between the passes of a step each process would hold whole gradients

    def _diverged(self, what: str, value: float) -> PipelineError:
        step = self.state.global_step
        documents = failures.documents_of(self.run.train, self._windows(step))
        return failures.diverged(what, value, step, documents, self.settings, self.run.scratch_dir)

    def stop(self, step: int) -> None:
        """Deliver the deferred termination signal, after the checkpoint of `step` is written."""
        self.run.log(f"stopping after a signal: step {step:,} is saved")
        self.interrupts.deliver()
        raise KeyboardInterrupt(
            f"stopped by a signal after step {step}"
        )  # the signal went to another rank, or its handler returned

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.staging(self.run.scratch_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights, and where they are sharded the optimizer's state, whose parts are beside theirs."""
        if not self.run.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        sharded.save(Path(output_dir), self._network, _plain(self.optimizer))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.run.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if sharded.is_sharded_checkpoint(checkpoint):
            sharded.load_weights(checkpoint, self._network)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and sharded.is_sharded_checkpoint(Path(checkpoint)):
            sharded.load_optimizer(Path(checkpoint), self._network, _plain(self.optimizer))
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started, step = time.monotonic(), self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
            sums = [self._tr_loss.item()]
            if dist.is_initialized():  # also a barrier: each process has added its random state
                sums = [0.0] * self.args.world_size
                dist.all_gather_object(sums, self._tr_loss.item())
            if self.args.should_save:
                held = {"sums": sums, "last_logged_step": self._globalstep_last_logged}
                staged = checkpoints.staging(self.run.scratch_dir) / f"checkpoint-{step}"
                (staged / checkpoints.LOSS_SUM).write_text(json.dumps(held))
                checkpoints.commit(self.run.scratch_dir, step)
                checkpoints.prune(self.run.scratch_dir, self.settings.save_total_limit, self.state.best_global_step)
            # The launcher ends all processes as soon as one ends: none may end before the checkpoint is committed.
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if type(error) is RuntimeError and "PytorchStreamWriter" not in str(error):  # torch.save on a full disk
                raise
            shutil.rmtree(checkpoints.staging(self.run.scratch_dir), ignore_errors=True)
            raise failures.cannot_write(step, self.run.scratch_dir, error) from error
        self._paused_s += time.monotonic() - started


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapper."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


class _Schedule(TrainerCallback):  # type: ignore[misc]
    """Evaluates early and at the last step, and logs at every evaluation and save."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._evaluate_at = {settings.eval_steps // 10, settings.eval_steps // 3, settings.max_steps}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step in self._evaluate_at:
            control.should_evaluate = True
        if control.should_evaluate or control.should_save:
            control.should_log = True
        return control


class _Bookkeeping(TrainerCallback):  # type: ignore[misc]
    """Restores the loss sum of a checkpoint, and saves at the end of the step in which a termination signal arrived."""

    def __init__(self, trainer: RexTrainer) -> None:
        self._trainer = trainer
        self._ends = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_loss_sum()
        self._trainer.check_gradients()
        self._trainer.begin_watch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.settings.muon_momentum_warmup_steps:
            self._trainer.set_momentum()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._ends = self._trainer.interrupts.pending
        # All ranks must save the same step, though only one may have the signal. On GPUs this synchronizes.
        if dist.is_initialized() and (args.device.type == "cpu" or state.global_step % args.logging_steps == 0):
            ends = torch.tensor(int(self._ends), device=args.device)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            self._ends = bool(ends.item())
        elif dist.is_initialized():
            self._ends = False
        # No log entry for this forced save, so the loss curve equals that of an uninterrupted run.
        control.should_save = control.should_save or self._ends
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._ends or (self._trainer.interrupts.pending and not dist.is_initialized()):
            self._trainer.stop(state.global_step)
