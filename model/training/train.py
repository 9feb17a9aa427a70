"""Trains a model on a tokenized dataset and writes a Hugging Face checkpoint directory.

`train` is the whole stage: it resumes where a killed run stopped, keeps the best weights, evaluates them on the full
validation split, and writes weights, tokenizer, custom code, model card, curves and samples. `trainer.py` has the loop.
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
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from model.build import build_config, build_model
from model.errors import PipelineError
from model.evaluation import evaluate, scores_of_sources
from model.modeling_rex import RexForCausalLM
from model.progress import Log, silent
from model.settings import ExperimentSettings
from model.system.cpu import limit_threads
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset
from model.training.adapters import add_adapters, merge_adapters
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints import sharded
from model.training.failures import is_out_of_memory, out_of_memory
from model.training.health import find_warnings, unigram_loss
from model.training.initial.cooccurrence import cooccurrence_embeddings, set_embeddings
from model.training.initial.weights import load_teacher, start_from
from model.training.outputs.files import sample_texts, write_outputs
from model.training.outputs.summary import TrainingSummary
from model.training.run import OnMetrics, TrainingRun, prepare_run
from model.training.throughput import flops_per_token, matmul_peak, peak_memory_bytes
from model.training.trainer import RexTrainer, source_shares
from model.weights.loading import WEIGHTS, load_weights
from model.weights.stock import weight_files


def train(
    settings: ExperimentSettings,
    dataset_dir: Path,
    output_dir: Path,
    scratch_dir: Path,
    *,
    log: Log = silent,
    on_metrics: OnMetrics | None = None,
    shares_batch: bool = False,
    shards_on_cpu: bool = False,
) -> TrainingSummary:
    """Train the experiment's model; resumes from checkpoints of the same training in `scratch_dir`.

    output_dir: becomes a Hugging Face checkpoint directory. on_metrics: called with (step, metrics) at every log. On
    the CPU a resumed run is bit-identical to an uninterrupted one. The caller deletes `scratch_dir`. SIGTERM and SIGINT
    are deferred to the end of the step, where a checkpoint is saved (signals.py). Several processes: each calls this
    with the same arguments; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT identify them under any launcher (torchrun,
    Ray Train). Rank 0 writes and reports; all share the folders. shares_batch: the settings' batch is that of all
    processes together; else of each that begins. A training can resume with another world size: the batch size stays,
    and results are equal up to rounding. shards_on_cpu: for tests, obeys `compute.sharding` on a CPU too. Raises
    PipelineError for an unavailable device, a dataset smaller than one batch, refused arguments, a non-finite loss,
    insufficient memory, and a full disk; the last complete checkpoint is kept.
    """
    limit_threads()
    tokenizer = load_tokenizer(dataset_dir / "tokenizer")
    length = settings.tokenizer.sequence_length
    config = build_config(
        settings.model,
        len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    datasets = TokenDataset(dataset_dir, "train", length), TokenDataset(dataset_dir, "validation", length)
    run = prepare_run(
        settings.training,
        config,
        datasets,
        scratch_dir,
        log=log,
        on_metrics=on_metrics,
        shares_batch=shares_batch,
        sharding=settings.compute.sharding,
        shards_on_cpu=shards_on_cpu,
    )
    if len(run.train) < run.windows_per_step:
        raise PipelineError(
            f"{dataset_dir} holds {len(run.train)} training windows of {length} tokens: expected at least one batch "
            f"({run.windows_per_step} windows); use a larger corpus, or lower tokenizer.sequence_length or the "
            "batch size"
        )
    source_shares(run.train, run.settings)  # refuses weights that do not fit, before anything is made
    identity = _identity(settings, dataset_dir, run.initial_world_size)
    resume_step = broadcast_from_rank_zero(lambda: checkpoints.open_scratch(scratch_dir, identity))
    peak_flops = matmul_peak(run.device, run.precision)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)  # without the matrices of that
    with _quiet_transformers():
        state, trained_s, warnings = _run_steps(run, tokenizer, resume_step, peak_flops)
        best_step = state.best_global_step or state.global_step
        model = build_model(config, run.settings.seed)
        add_adapters(model, run.settings)
        _load_best(model, checkpoints.checkpoint_dir(scratch_dir, best_step))
        merge_adapters(model)
        _barrier()  # all ranks read the checkpoints before rank 0 returns and its caller deletes them
        model.to(run.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        run.log(f"validating the weights of step {best_step:,} on the whole validation split")
        result = evaluate(model, run.validation, batch_size=run.settings.per_device_eval_batch_size, log=run.log)
        steps_here = state.global_step - (resume_step or 0)
        rates = [entry["tokens_per_second"] for entry in state.log_history if "tokens_per_second" in entry]
        tokens_per_second = steps_here * run.tokens_per_step / trained_s if steps_here and trained_s else rates[-1]
        model_flops = tokens_per_second * flops_per_token(model, length)
        summary = TrainingSummary(
            parameters=model.num_parameters(),
            steps=state.global_step,
            tokens=state.global_step * run.tokens_per_step,
            seconds=max(entry["seconds"] for entry in state.log_history),
            tokens_per_second=tokens_per_second,
            model_flops_per_second=model_flops,
            model_flops_utilization=model_flops / (peak_flops * run.world_size),
            matmul_peak_flops=peak_flops * run.world_size,
            train_loss=[entry["loss"] for entry in state.log_history if "loss" in entry][-1],
            validation_loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            best_step=best_step,
            resumed_from_step=resume_step or 0,
            peak_memory_bytes=peak_memory_bytes(run.device),
            precision=run.precision,
            device=run.device.type if run.device.type == "cpu" else torch.cuda.get_device_name(run.device),
            warnings=warnings,
            samples=sample_texts(model, tokenizer, run.settings.sample_prompts, run.settings.sample_tokens),
            sources={
                name: {"loss": scores.loss, "bits_per_byte": scores.bits_per_byte, "bytes": scores.bytes}
                for name, scores in scores_of_sources(result).items()
            },
        )
        if run.is_main_process:
            write_outputs(settings, model.cpu(), tokenizer, state.log_history, summary, dataset_dir, output_dir)
    return summary


def _run_steps(
    run: TrainingRun, tokenizer: PreTrainedTokenizerBase, resume_step: int | None, peak_flops: float
) -> tuple[TrainerState, float, list[str]]:
    """The state after the last step, the seconds of optimizer steps in this process, and the health warnings."""
    settings = run.settings
    newest = checkpoints.checkpoint_dir(run.scratch_dir, resume_step) if resume_step is not None else None
    if newest is not None:
        state = TrainerState.load_from_json(str(newest / checkpoints.STATE))
        run.log(f"continuing from step {resume_step:,} of {state.max_steps:,}")
        if checkpoints.is_finished(state):
            return state, 0.0, find_warnings(state.log_history, settings, unigram_loss(run), [])
        if run.is_sharded and not sharded.is_sharded_checkpoint(newest):
            raise PipelineError(
                f"{newest} was written without compute.sharding: expected a sharded checkpoint; set "
                f"compute.sharding=none to continue it, or delete {run.scratch_dir} to start over"
            )
    model = build_model(run.config, settings.seed)
    if settings.init_from:
        start_from(model, Path(settings.init_from), tokenizer)
    elif settings.initial_embeddings == "cooccurrence" and newest is None:
        set_embeddings(model, broadcast_from_rank_zero(lambda: _cooccurrence_embeddings(run)))
    add_adapters(model, settings)
    teacher = None
    if settings.distill_from:
        teacher = load_teacher(Path(settings.distill_from), tokenizer, run.sequence_length, run.device)
    model.config.use_cache = False  # each step would fill a KV cache and discard it
    run.arguments.eval_on_start = newest is None
    run.log(
        f"training {model.num_parameters():,} parameters for {settings.max_steps:,} steps "
        f"on {run.device.type} in {run.arguments.mixed_precision or 'no'} mixed precision"
    )

    def sample(model: RexForCausalLM) -> str:
        texts = sample_texts(model, tokenizer, settings.sample_prompts[:1], min(settings.sample_tokens, 24))
        return "".join(prompt + text for prompt, text in texts.items())

    trainer = RexTrainer(run, model, teacher=teacher, sample=sample, peak_flops=peak_flops)
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
        return trainer.state, trainer.trained_s, trainer.warnings
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Raised outside the except block: the live traceback would keep the activations allocated while smaller batches are
    # tried.
    raise out_of_memory(model, run)


def _cooccurrence_embeddings(run: TrainingRun) -> torch.Tensor:
    config = run.config
    return cooccurrence_embeddings(run.train.tokens, config.vocab_size, config.hidden_size, run.settings.seed)


def broadcast_from_rank_zero(decide: Callable[[], Any]) -> Any:
    """Rank 0's result of `decide`, broadcast to all processes, as is its PipelineError."""
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


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and its warnings about options that the loop fixes, inside the block."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _load_best(model: RexForCausalLM, checkpoint: Path) -> None:
    if sharded.is_sharded_checkpoint(checkpoint):
        sharded.load_weights(checkpoint, model, alone=True)
        return
    try:
        load_weights(model, checkpoint / WEIGHTS)
    except PipelineError as error:
        raise PipelineError(f"the best step's {error}, after deleting {checkpoint.parent}") from None


def _weights_digest(folder: str) -> str:
    """The digests of a model's files, concatenated; empty if no folder is named."""
    found = ""
    for path in weight_files(Path(folder)) if folder else ():
        with path.open("rb") as file:
            found += hashlib.file_digest(file, "sha256").hexdigest()
    return found


_NOT_OF_THE_RESULT = frozenset({"self_check", "self_check_tolerance", "watch_after", "watch_repeats"})
"""Options without effect on the weights: a training can resume with other values."""


def _identity(settings: ExperimentSettings, dataset_dir: Path, initial_world_size: int) -> dict[str, Any]:
    """All settings and data that determine the result; token files by their size and document boundaries."""

    def digest(*names: str) -> str:
        found = hashlib.sha256()
        for name in names:
            found.update((dataset_dir / name).read_bytes())
        return found.hexdigest()

    return {
        "model": dataclasses.asdict(settings.model),
        "training": {k: v for k, v in dataclasses.asdict(settings.training).items() if k not in _NOT_OF_THE_RESULT},
        "sequence_length": settings.tokenizer.sequence_length,
        "dataset": digest("train.documents.npy", "validation.documents.npy"),
        "dataset_bytes": (dataset_dir / "train.bin").stat().st_size,
        "tokenizer": digest("tokenizer/tokenizer.json"),
        "init_from": _weights_digest(settings.training.init_from),
        "distill_from": _weights_digest(settings.training.distill_from),
        # The initial world size and the settings determine the batch size (arguments.accumulation_steps).
        "processes": initial_world_size,
    }
