"""Preference tuning (DPO): makes a checkpoint prefer the chosen of two answers, with trl's DPOTrainer.

"Direct Preference Optimization" (https://arxiv.org/abs/2305.18290): the loss is -log sigmoid(beta * (the gain of the
chosen answer's log-probability over the initial model's - that of the rejected one)). It starts from
`training.init_from` and writes the same files as a training on text; adapters (`adapters.py`) are merged. A killed run
continues from its last checkpoint.
"""

import copy
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from model.build import build_config, build_model
from model.errors import PipelineError
from model.evaluation import evaluate, scores_of_sources
from model.progress import Log, format_duration, silent
from model.settings import ExperimentSettings, TrainingSettings
from model.system.cpu import limit_threads
from model.system.devices import resolve_device, resolve_precision
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.training.adapters import lora_config, merge_adapters, require
from model.training.checkpoints.local import STATE, is_finished
from model.training.initial.weights import start_from
from model.training.outputs.files import sample_texts, write_outputs
from model.training.outputs.summary import TrainingSummary
from model.training.preference.pairs import PreferenceEncoder, read_preferences
from model.training.run import OnMetrics
from model.training.throughput import flops_per_token, matmul_peak, peak_memory_bytes

_REPORTED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "preference_margin",
}
"""Names of trl's metrics, and ours."""


def tune_preferences(
    settings: ExperimentSettings,
    dataset_dir: Path,
    output_dir: Path,
    scratch_dir: Path,
    *,
    log: Log = silent,
    on_metrics: OnMetrics | None = None,
) -> TrainingSummary:
    """Tune `training.init_from` on `training.preferences`, and write a checkpoint directory to `output_dir`.

    The tokenized dataset gives the tokenizer and the text on which bits per byte are measured. Raises PipelineError
    without trl or initial weights, and for files that do not hold preferences.
    """
    limit_threads()
    training = settings.training
    require("trl", "training.preferences")
    tokenizer = load_tokenizer(dataset_dir / "tokenizer")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build_model(build_config(settings.model, len(tokenizer), **ids), training.seed)
    start_from(model, Path(training.init_from), tokenizer)
    length = settings.tokenizer.sequence_length
    validation = TokenDataset(dataset_dir, "validation", length)
    encoder = PreferenceEncoder(tokenizer, length)
    parts: tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]] = ([], [])
    for pair in read_preferences(training.preferences):
        parts[pair.is_held_out].append(encoder.encode(pair))
    train, held_out = parts
    batch = training.per_device_train_batch_size
    if len(train) < batch:
        raise PipelineError(
            f"training.preferences holds {len(train)} pairs to train on: expected at least one batch ({batch}); add "
            "pairs, or lower training.per_device_train_batch_size"
        )
    log(f"preferences: {len(train):,} pairs to train on, {len(held_out):,} held out, {encoder.cut:,} cut to the window")
    device = resolve_device(training.device)
    precision = resolve_precision(training.precision, device)
    folder = scratch_dir / f"preferences-{checkpoint_key(model, train)}"
    trainer, resume = _trainer(training, model, tokenizer, train, held_out, folder, device, precision, log, on_metrics)
    started = time.monotonic()
    state = TrainerState.load_from_json(str(Path(resume) / STATE)) if resume else None
    if state and is_finished(state):  # with nothing left to train, the Trainer takes one step more
        trainer._load_from_checkpoint(resume)
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=resume)
    seconds = time.monotonic() - started
    found = trainer.evaluate() if held_out else {}
    if training.lora_rank:
        merge_adapters(model)
    model.config.use_cache = True
    model.eval()
    log("validating on the whole validation split")
    result = evaluate(model, validation, batch_size=training.per_device_eval_batch_size, log=log)
    history = [_renamed(entry) | {"step": entry["step"]} for entry in trainer.state.log_history]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = int(trainer.state.num_input_tokens_seen)
    flops = tokens / max(seconds, 1e-9) * flops_per_token(model, length)
    peak = matmul_peak(device, precision)
    summary = TrainingSummary(
        parameters=model.num_parameters(),
        steps=trainer.state.global_step,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        model_flops_per_second=flops,
        model_flops_utilization=flops / peak,
        matmul_peak_flops=peak,
        train_loss=losses[-1],
        validation_loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        best_step=trainer.state.global_step,
        resumed_from_step=int(Path(resume).name.rpartition("-")[2]) if resume else 0,
        peak_memory_bytes=peak_memory_bytes(device),
        precision=precision,
        device=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        warnings=[],
        samples=sample_texts(model, tokenizer, training.sample_prompts, training.sample_tokens),
        sources={name: {"bits_per_byte": each.bits_per_byte} for name, each in scores_of_sources(result).items()},
        preferences={
            "pairs": len(train),
            "held_out_pairs": len(held_out),
            **{f"held_out_{name}": found[f"eval_{key}"] for key, name in _REPORTED.items() if f"eval_{key}" in found},
        },
    )
    write_outputs(settings, model.cpu(), tokenizer, history, summary, dataset_dir, output_dir)
    return summary


def checkpoint_key(model: torch.nn.Module, train: list[dict[str, list[int]]]) -> str:
    """A hash of initial weights and pairs, by which a run finds the checkpoints of an earlier attempt at the same."""
    found = hashlib.sha256(json.dumps(train).encode())
    for weight in model.state_dict().values():
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _trainer(
    training: TrainingSettings,
    model: Any,
    tokenizer: Any,
    train: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    folder: Path,
    device: torch.device,
    precision: str,
    log: Log,
    on_metrics: OnMetrics | None,
) -> tuple[Any, str | None]:
    """The trainer of trl, and the checkpoint that it continues from."""
    import datasets
    import trl

    logging.getLogger("trl").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="linear",
        beta=training.preference_beta,
        seed=training.seed,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        gradient_checkpointing=training.activation_checkpointing,
        use_cpu=device.type == "cpu",
        logging_steps=training.logging_steps,
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        include_num_input_tokens_seen=True,
        max_length=None,
        report_to=[],
        disable_tqdm=True,
    )

    class Tuning(trl.DPOTrainer):  # type: ignore[misc]
        """trl's trainer on pairs that are encoded already: texts cannot spell the marks of roles."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    trainer = Tuning(
        model=model,
        ref_model=None if training.lora_rank else copy.deepcopy(model).requires_grad_(False),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(train),
        eval_dataset=datasets.Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora_config(training) if training.lora_rank else None,
        callbacks=[_Report(log, on_metrics)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # The Trainer writes its state last: a folder without it is a checkpoint that a kill interrupted.
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is not None:
        log(f"continuing from {newest.name}")
    return trainer, str(newest) if newest is not None else None


def _renamed(entry: dict[str, Any]) -> dict[str, float]:
    return {ours: float(entry[theirs]) for theirs, ours in _REPORTED.items() if theirs in entry}


class _Report(TrainerCallback):  # type: ignore[misc]
    """Passes trl's metrics to the log and to `on_metrics`, of the last step and of each checkpoint too."""

    def __init__(self, log: Log, on_metrics: OnMetrics | None) -> None:
        self._log, self._on_metrics, self._started = log, on_metrics, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # as after the last step, which need not be one of every `logging_steps`
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        found = _renamed(logs or {})
        if "loss" not in found:
            return
        left_s = (time.monotonic() - self._started) / max(state.global_step, 1) * (state.max_steps - state.global_step)
        self._log(
            f"step {state.global_step:,} of {state.max_steps:,}: loss {found['loss']:.4f}, prefers the chosen "
            f"answer in {found.get('preference_accuracy', 0.0):.0%}, {format_duration(left_s)} left"
        )
        if self._on_metrics is not None:
            self._on_metrics(state.global_step, found)
