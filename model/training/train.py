"""Trains a model on a tokenized dataset and leaves a Hugging Face checkpoint directory.

`train` is the whole stage: it resumes where a killed run stopped, keeps the best weights, evaluates them on the full
validation split, and writes weights, tokenizer, custom code, model card, curves and samples. The loop is in `trainer.py`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from model.build import build_config, build_model
from model.configuration_rex import RexConfig
from model.errors import PipelineError
from model.evaluation import evaluate
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import ExperimentSettings
from model.system.devices import resolve_device, resolve_precision
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.training import checkpoints
from model.training.arguments import accumulation_steps, processes, training_arguments
from model.training.failures import is_out_of_memory, out_of_memory
from model.training.initial_weights import load_teacher, start_from
from model.training.outputs import sample_texts, write_outputs
from model.training.summary import TrainingSummary
from model.training.throughput import flops_per_token, matmul_peak, peak_memory_bytes
from model.training.trainer import OnMetrics, RexTrainer


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
    SIGTERM and SIGINT wait for the end of the step, save, and then do what they did before (signals.py).
    Several processes: each calls this with the same arguments; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which it
    is, whoever started it (torchrun, Ray Train). The first one writes and reports; the folders are shared by all. Another
    number of processes than began a training can go on with it: the batch stays, and results are equal up to rounding.
    Raises PipelineError for a device that is not there, a dataset smaller than one batch, refused arguments, a loss
    that is not finite, memory that does not suffice, and a full disk; the last complete checkpoint then stays.
    """
    device = resolve_device(settings.training.device)
    precision = resolve_precision(settings.training.precision, device)
    first = checkpoints.first_processes(scratch_dir) or processes()
    passes = accumulation_steps(settings, first, processes())
    stepwise = dataclasses.replace(settings.training, gradient_accumulation_steps=passes)
    arguments = training_arguments(stepwise, scratch_dir, device, precision)
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
    writes = arguments.process_index == 0
    if not writes:
        log, on_metrics = silent, None
    resume_step = _agreed(lambda: checkpoints.open_scratch(scratch_dir, _identity(settings, dataset_dir, first)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def sample(model: RexForCausalLM) -> str:
        prompts = settings.training.sample_prompts[:1]
        return "".join(
            k + v for k, v in sample_texts(model, tokenizer, prompts, min(settings.training.sample_tokens, 24)).items()
        )

    peak_flops = matmul_peak(device, precision)
    with _quiet_transformers():
        state, trained_s = _run(
            settings,
            arguments,
            config,
            tokenizer,
            datasets,
            scratch_dir,
            resume_step,
            log,
            on_metrics,
            sample,
            peak_flops,
        )
        best_step = state.best_global_step or state.global_step
        model = build_model(config, settings.training.seed)
        _load_weights(model, checkpoints.checkpoint_dir(scratch_dir, best_step))
        _agreed(lambda: None)  # nobody deletes what another still reads
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
            model_flops_utilization=tokens_per_second
            * flops_per_token(model, length)
            / (peak_flops * arguments.world_size),
            matmul_peak_flops=peak_flops * arguments.world_size,
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
        if writes:
            write_outputs(settings, model.cpu(), tokenizer, state.log_history, summary, dataset_dir, output_dir)
    return summary


def _run(
    settings: ExperimentSettings,
    arguments: transformers.TrainingArguments,
    config: RexConfig,
    tokenizer: PreTrainedTokenizerBase,
    datasets: tuple[TokenDataset, TokenDataset],
    scratch_dir: Path,
    resume_step: int | None,
    log: Log,
    on_metrics: OnMetrics | None,
    sample: Any,
    peak_flops: float,
) -> tuple[TrainerState, float]:
    """The state after the last step, and the seconds of optimizer steps in this process."""
    newest = checkpoints.checkpoint_dir(scratch_dir, resume_step) if resume_step is not None else None
    if newest is not None:
        state = TrainerState.load_from_json(str(newest / checkpoints.STATE))
        log(f"continuing from step {resume_step:,} of {state.max_steps:,}")
        if checkpoints.is_finished(state):
            return state, 0.0
    model = build_model(config, settings.training.seed)
    if settings.training.init_from:
        start_from(model, Path(settings.training.init_from), tokenizer)
    teacher = None
    if settings.training.distill_from:
        teacher = load_teacher(
            Path(settings.training.distill_from), tokenizer, datasets[0].sequence_length, arguments.device
        )
    model.config.use_cache = False  # a cache per step would be filled and thrown away
    arguments.eval_on_start = newest is None
    log(
        f"training {model.num_parameters():,} parameters for {settings.training.max_steps:,} steps "
        f"on {arguments.device.type} in {arguments.mixed_precision or 'no'} mixed precision"
    )
    trainer = RexTrainer(
        model,
        arguments,
        settings.training,
        datasets,
        scratch_dir,
        log=log,
        on_metrics=on_metrics,
        sample=sample,
        peak_flops=peak_flops,
        teacher=teacher,
    )
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
        return trainer.state, trainer.trained_s
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here and not in the handler: the traceback keeps the activations that did not fit.
    raise out_of_memory(model, settings.training, datasets[0].sequence_length, bfloat16=arguments.bf16)


def _agreed(decide: Callable[[], Any]) -> Any:
    """What the first process decides, for all; a PipelineError of it is raised in all."""
    if not dist.is_initialized():
        return decide()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [decide()]
        except PipelineError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], PipelineError):
        raise outcome[0]
    return outcome[0]


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


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(settings: ExperimentSettings, dataset_dir: Path, first_processes: int) -> dict[str, Any]:
    """Everything that decides the result of the training; the token files by their size and document boundaries."""

    def digest(*names: str) -> str:
        found = hashlib.sha256()
        for name in names:
            found.update((dataset_dir / name).read_bytes())
        return found.hexdigest()

    return {
        "model": dataclasses.asdict(settings.model),
        "training": dataclasses.asdict(settings.training),
        "sequence_length": settings.tokenizer.sequence_length,
        "dataset": digest("train.documents.npy", "validation.documents.npy"),
        "dataset_bytes": (dataset_dir / "train.bin").stat().st_size,
        "tokenizer": digest("tokenizer/tokenizer.json"),
        "init_from": _file_digest(Path(settings.training.init_from) / "model.safetensors"),
        "distill_from": _file_digest(Path(settings.training.distill_from) / "model.safetensors"),
        # The number that began it: with the settings it says how large a batch is (arguments.accumulation_steps).
        "processes": first_processes,
    }
