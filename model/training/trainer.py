"""Trains a model on a tokenized dataset and leaves a Hugging Face checkpoint directory.

`train` is the whole stage: it resumes where a killed run stopped, keeps the best weights, evaluates them on the full
validation split, and writes weights, tokenizer, custom code, model card, curves and samples. The loop is in `loop.py`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

from model.build import build_config, build_model
from model.configuration_rex import RexConfig
from model.devices import resolve_device, resolve_precision
from model.errors import PipelineError
from model.evaluation import evaluate
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import ExperimentSettings
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.training import checkpoints
from model.training.arguments import training_arguments
from model.training.loop import OnMetrics, RexTrainer, peak_memory_bytes
from model.training.outputs import sample_texts, write_outputs


@dataclass
class TrainingSummary:
    """What a training made and what it cost."""

    parameters: int
    steps: int
    tokens: int
    """Tokens trained on, repeated ones counted each time."""
    seconds: float
    """Wall time of the training loop, evaluations included, over all attempts of a resumed run."""
    tokens_per_second: float
    """In optimizer steps: without evaluating and saving."""
    model_flops_per_second: float
    """tokens_per_second times `flops_per_token`."""
    train_loss: float
    """Mean over the last logged steps, nats per token."""
    validation_loss: float
    """Of the weights that are kept, on the whole validation split, nats per token."""
    bits_per_byte: float
    best_step: int
    resumed_from_step: int
    """0 for a run in one go."""
    peak_memory_bytes: int
    precision: str
    device: str
    samples: dict[str, str]
    """Prompt to the model's continuation."""


def train(
    settings: ExperimentSettings,
    dataset_dir: Path,
    output_dir: Path,
    scratch_dir: Path,
    *,
    log: Log = silent,
    on_metrics: OnMetrics | None = None,
) -> TrainingSummary:
    """Train the experiment's model; continue from `scratch_dir` where that holds checkpoints of the same training.

    output_dir: becomes a Hugging Face checkpoint directory. on_metrics: called with (step, metrics) at every log.
    On the CPU a resumed run ends with the same bits as one in one go. `scratch_dir` is left for the caller to delete.
    Raises PipelineError for a device that is not there, a dataset smaller than one batch, refused arguments, a loss
    that is not finite, and a full disk; the last complete checkpoint then stays.
    """
    device = resolve_device(settings.training.device)
    precision = resolve_precision(settings.training.precision, device)
    arguments = training_arguments(settings.training, scratch_dir, device, precision)
    tokenizer = load_tokenizer(dataset_dir / "tokenizer")
    length = settings.tokenizer.sequence_length
    datasets = TokenDataset(dataset_dir, "train", length), TokenDataset(dataset_dir, "validation", length)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if len(datasets[0]) < batch:
        raise PipelineError(
            f"{dataset_dir} holds {len(datasets[0])} training windows of {length} tokens: expected at least one batch "
            f"({batch} windows); use a larger corpus, or lower tokenizer.sequence_length or the batch size"
        )
    config = build_config(
        settings.model,
        len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    resume_step = checkpoints.open_scratch(scratch_dir, _identity(settings, dataset_dir))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def sample(model: RexForCausalLM) -> str:
        prompts = settings.training.sample_prompts[:1]
        return "".join(
            k + v for k, v in sample_texts(model, tokenizer, prompts, min(settings.training.sample_tokens, 24)).items()
        )

    with _quiet_transformers():
        state, trained_s = _run(
            settings, arguments, config, datasets, scratch_dir, resume_step, log, on_metrics, sample
        )
        best_step = state.best_global_step or state.global_step
        model = build_model(config, settings.training.seed)
        _load_weights(model, checkpoints.checkpoint_dir(scratch_dir, best_step))
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        log(f"validating the weights of step {best_step:,} on the whole validation split")
        result = evaluate(model, datasets[1], batch_size=settings.training.per_device_eval_batch_size, log=log)
        steps_here = state.global_step - (resume_step or 0)
        rates = [entry["tokens_per_second"] for entry in state.log_history if "tokens_per_second" in entry]
        tokens_per_second = steps_here * batch * length / trained_s if steps_here and trained_s else rates[-1]
        summary = TrainingSummary(
            parameters=model.num_parameters(),
            steps=state.global_step,
            tokens=state.global_step * batch * length,
            seconds=max(entry["seconds"] for entry in state.log_history),
            tokens_per_second=tokens_per_second,
            model_flops_per_second=tokens_per_second * flops_per_token(model, length),
            train_loss=[entry["loss"] for entry in state.log_history if "loss" in entry][-1],
            validation_loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            best_step=best_step,
            resumed_from_step=resume_step or 0,
            peak_memory_bytes=peak_memory_bytes(device),
            precision=precision,
            device=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            samples=sample_texts(model, tokenizer, settings.training.sample_prompts, settings.training.sample_tokens),
        )
        write_outputs(settings, model.cpu(), tokenizer, state.log_history, summary, dataset_dir, output_dir)
    return summary


def flops_per_token(model: RexForCausalLM, sequence_length: int) -> int:
    """Floating point operations of forward and backward per token: 6 N + 6 L T H K.

    N: parameters that are multiplied with (all but an untied input embedding); L layers, T tokens, H heads of size K.
    The attention term counts the causal half of 12 L T H K (PaLM, appendix B).
    """
    config = model.config
    assert config.head_dim is not None
    multiplied = model.num_parameters()
    if not config.tie_word_embeddings:
        multiplied -= model.model.embed_tokens.weight.numel()
    attention = config.num_hidden_layers * sequence_length * config.num_attention_heads * config.head_dim
    return 6 * multiplied + 6 * attention


def _run(
    settings: ExperimentSettings,
    arguments: transformers.TrainingArguments,
    config: RexConfig,
    datasets: tuple[TokenDataset, TokenDataset],
    scratch_dir: Path,
    resume_step: int | None,
    log: Log,
    on_metrics: OnMetrics | None,
    sample: Any,
) -> tuple[TrainerState, float]:
    """The state after the last step, and the seconds of optimizer steps in this process."""
    newest = checkpoints.checkpoint_dir(scratch_dir, resume_step) if resume_step is not None else None
    if newest is not None:
        state = TrainerState.load_from_json(str(newest / checkpoints.STATE))
        log(f"continuing from step {resume_step:,} of {state.max_steps:,}")
        if checkpoints.is_finished(state):
            return state, 0.0
    model = build_model(config, settings.training.seed)
    model.config.use_cache = False  # a cache per step would be filled and thrown away
    arguments.eval_on_start = newest is None
    log(
        f"training {model.num_parameters():,} parameters for {settings.training.max_steps:,} steps "
        f"on {arguments.device.type} in {arguments.mixed_precision or 'no'} mixed precision"
    )
    trainer = RexTrainer(
        model, arguments, settings.training, datasets, scratch_dir, log=log, on_metrics=on_metrics, sample=sample
    )
    trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    return trainer.state, trainer.trained_s


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, and no warnings: they speak of options that the loop fixes. Restored afterwards."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _load_weights(model: RexForCausalLM, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    if not weights.is_file():
        raise PipelineError(f"{weights} is missing: expected the weights of the best step; delete {checkpoint.parent}")
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise PipelineError(f"{weights} does not fit the model ({[*missing, *unexpected]}): delete {checkpoint.parent}")


def _identity(settings: ExperimentSettings, dataset_dir: Path) -> dict[str, Any]:
    """Everything that decides the result of the training; the token files by their size and document boundaries."""
    digest = hashlib.sha256()
    for name in ("train.documents.npy", "validation.documents.npy", "token_bytes.npy"):
        digest.update((dataset_dir / name).read_bytes())
    digest.update(str((dataset_dir / "train.bin").stat().st_size).encode())
    return {
        "model": dataclasses.asdict(settings.model),
        "training": dataclasses.asdict(settings.training),
        "sequence_length": settings.tokenizer.sequence_length,
        "dataset": digest.hexdigest(),
    }
