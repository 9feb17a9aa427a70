"""Tokens/s of a training step in each trainer, and its share of the measured matrix-multiplication peak.

`ours` is RexTrainer with the experiment's own settings; `llama` is transformers' Trainer with its defaults and a
LlamaForCausalLM of the same sizes, float32, the same windows and batch; `llama_bf16` is the same with `bf16=True`, if
the device multiplies bfloat16. Data are random ids: reading is not measured. The first step of a run is excluded.
`bench.training` starts each side in a separate process.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench.settings import read_settings
from bench.training import nanogpt
from model.build import build_config, build_model
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings, TrainingSettings
from model.system.devices import has_fast_bfloat16, resolve_device, resolve_precision
from model.text.tokens import TokenDataset
from model.training.run import TrainingRun, prepare_run
from model.training.throughput import flops_per_token, matmul_peak
from model.training.trainer import RexTrainer

SHAPES = {
    # name: model, training, vocabulary, window
    "tiny": ("model/rex_tiny.yaml", "training/cpu_seconds.yaml", 512, 128),
    "stdlib": ("model/rex_2m.yaml", "training/cpu_minutes.yaml", 4096, 256),
    "stdlib_30m": ("model/rex_30m.yaml", "training/cpu_hours.yaml", 16_384, 512),
    "gpt2_124m": ("model/rex_124m.yaml", "training/gpu_124m.yaml", 50_304, 1024),
}

AnyTrainer = TypeVar("AnyTrainer", bound=RexTrainer)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each optimizer step, with device synchronization."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the start of the first step."""
        if not self.marks:
            self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of a step."""
        self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def median_s(self) -> float:
        """Median over all steps but the first."""
        return statistics.median(b - a for a, b in zip(self.marks[1:-1], self.marks[2:], strict=True))


class _Steps(RexTrainer):
    """No evaluation and no saving, as in the Trainer that it is compared with."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": 0.0}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        pass


def prepare(shape: str, scratch: Path, settings: TrainingSettings) -> tuple[TrainingRun, RexForCausalLM]:
    """One of SHAPES on random ids: the run and its initial model."""
    model_file, _, vocabulary, length = SHAPES[shape]
    dataset = _random_dataset(scratch, vocabulary, length, 4096)
    config = build_config(read_settings(ModelSettings, model_file), vocabulary, 0, 0, 1)
    model = build_model(config, 0)
    model.config.use_cache = False
    return prepare_run(settings, config, (dataset, dataset), scratch, shares_batch=True), model


def build_trainer(kind: type[AnyTrainer], shape: str, scratch: Path, settings: TrainingSettings) -> AnyTrainer:
    """The trainer of one of SHAPES on random ids."""
    return kind(*prepare(shape, scratch, settings))


def measure_side(side: str, steps: int) -> dict[str, float]:
    """Tokens/s, FLOPs per token and the peak of `SHAPE:TRAINER`; trainers: "ours", "llama", "llama_bf16"."""
    shape, trainer = side.split(":")
    model_file, training_file, vocabulary, length = SHAPES[shape]
    settings = dataclasses.replace(
        read_settings(TrainingSettings, training_file),
        max_steps=steps + 1,
        warmup_steps=0,
        eval_steps=10**6,
        save_steps=10**6,
        logging_steps=10**6,
        eval_windows=1,
    )
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    config = build_config(read_settings(ModelSettings, model_file), vocabulary, 0, 0, 1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        model = build_model(config, 0)
        flops = flops_per_token(model, length)
        batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        if trainer == "ours":
            ours = build_trainer(_Steps, shape, Path(scratch), settings)
            ours.add_callback(clock)
            ours.train()
        else:
            llama = build_llama(shape, vocabulary)
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=steps + 1,
                per_device_train_batch_size=settings.per_device_train_batch_size,
                gradient_accumulation_steps=settings.gradient_accumulation_steps,
                bf16=trainer == "llama_bf16",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            dataset = _random_dataset(Path(scratch), vocabulary, length, 4096)
            Trainer(model=llama, args=arguments, train_dataset=dataset, callbacks=[clock]).train()
    return {
        "tokens_per_second": batch * length / clock.median_s(),
        "flops_per_token": flops,
        "matmul_peak_flops": matmul_peak(device, "float32" if trainer == "llama" else precision),
        "parameters": model.num_parameters() if trainer == "ours" else llama.num_parameters(),
    }


def build_llama(shape: str, vocab_size: int) -> LlamaForCausalLM:
    """Transformers' Llama of the same sizes as one of SHAPES, with random weights."""
    config = build_config(read_settings(ModelSettings, SHAPES[shape][0]), vocab_size, 0, 0, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )


def compare_cpu(rounds: int, steps: int) -> dict[str, Any]:
    """`stdlib_30m` against transformers' Trainer with its defaults, in float32 and, if the CPU multiplies it,
    bfloat16.
    """
    sides = ["ours", "llama"]
    if has_fast_bfloat16(torch.device("cpu")):
        sides.append("llama_bf16")
    result: dict[str, Any] = {"rounds": []}
    for number in range(rounds):
        order = sides if number % 2 == 0 else sides[::-1]
        row = {side: side_in_process(f"stdlib_30m:{side}", steps) for side in order}
        result["rounds"].append(row)
        print(f"round {number + 1}: {json.dumps(row)}", flush=True)
    for side in sides:
        share = statistics.median(_mfu(row[side]) for row in result["rounds"])
        speed = statistics.median(row[side]["tokens_per_second"] for row in result["rounds"])
        ratio = statistics.median(
            row["ours"]["tokens_per_second"] / row[side]["tokens_per_second"] for row in result["rounds"]
        )
        result[side] = {"tokens_per_second": speed, "model_flops_utilization": share, "ours_against_it": ratio}
        print(f"{side}: {speed:,.0f} tokens/s, {share:.0%} of the measured peak; ours {ratio:.2f} times as fast")
    return result


def compare_gpu(folder: Path | None, rounds: int, steps: int) -> dict[str, Any]:
    """`gpt2_124m` (bfloat16, compiled) against nanoGPT's own benchmark, compiled, on the same GPU."""
    if not torch.cuda.is_available():
        raise PipelineError("--gpu: PyTorch sees no GPU; leave the option out to measure the CPU")
    if folder is None:
        raise PipelineError("--gpu needs --nanogpt DIR: a work tree of https://github.com/karpathy/nanoGPT")
    batch = read_settings(TrainingSettings, SHAPES["gpt2_124m"][1]).per_device_train_batch_size
    result: dict[str, Any] = {"rounds": []}
    for number in range(rounds):
        row: dict[str, Any] = {"ours": side_in_process("gpt2_124m:ours", steps)}
        row["nanogpt_tokens_per_second"] = nanogpt.gpu_tokens_per_second(folder, batch)
        result["rounds"].append(row)
        print(f"round {number + 1}: {json.dumps(row)}", flush=True)
    result["median_ratio"] = statistics.median(
        row["ours"]["tokens_per_second"] / row["nanogpt_tokens_per_second"] for row in result["rounds"]
    )
    result["median_mfu"] = statistics.median(_mfu(row["ours"]) for row in result["rounds"])
    print(f"tokens/s {result['median_ratio']:.2f} times nanoGPT's; {result['median_mfu']:.0%} of the measured peak")
    return result


def _mfu(side: dict[str, float]) -> float:
    return side["tokens_per_second"] * side["flops_per_token"] / side["matmul_peak_flops"]


def side_in_process(side: str, steps: int) -> dict[str, float]:
    """`measure_side` in a separate process. Raises PipelineError if it fails."""
    command = [sys.executable, "-m", "bench.training", "side", side, str(steps)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"{side} ended with {done.returncode}: {done.stderr[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _random_dataset(directory: Path, vocabulary: int, length: int, windows: int) -> TokenDataset:
    ids = np.random.default_rng(0).integers(2, vocabulary, windows * length).astype(np.uint16)
    ids.tofile(directory / "train.bin")
    np.save(directory / "train.documents.npy", np.array([0, len(ids)]))
    np.save(directory / "byte_counts.npy", np.ones(vocabulary, np.int64))
    np.save(directory / "token_bytes.npy", np.zeros(vocabulary, np.uint8))
    return TokenDataset(directory, "train", length)
