"""Quality at a time: our training against a peer's on the same tokens, both with the schedule that the time allows.

    python -m bench.training quality                                  # stdlib_30m, an hour for each side
    python -m bench.training quality --shape stdlib --minutes 5       # a smaller model and less time
    python -m bench.training quality --gpu --nanogpt DIR              # gpt2_124m on a GPU, a third of nanoGPT's time

The peer is transformers' Trainer with a LlamaForCausalLM of the same sizes and AdamW, or nanoGPT, compiled, from a work
tree that the user clones. Its learning rate is the best of `--learning-rates`, each tried for a quarter of the time;
Llama's batch is the best of `--windows`, each tried with each rate. A single choice is not tried. Ours are the
experiment's own settings, with another number of steps. The text is the Python source of the installed packages, or a
tokenized dataset is given. Times are those of whole processes without the last evaluation; bits per byte are over the
whole validation split, by the same code for both.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from bench.settings import read_settings
from bench.training import nanogpt, speed
from bench.training.datasets import write_dataset
from model.errors import PipelineError
from model.evaluation import evaluate
from model.settings import ExperimentSettings, ModelSettings, TokenizerSettings, TrainingSettings
from model.system.devices import has_fast_bfloat16, resolve_device
from model.text.tokenizer import load_tokenizer, train_tokenizer
from model.text.tokens import TokenDataset

TEXT_BYTES = {"gpt2_124m": 100_000_000}
"""Of the packages' source, by shape: 25 million tokens. Else, a fifth of it."""
VALIDATION_SHARE = 50
"""One document in this many is held out."""
GPU_WINDOWS = 32, 2
"""A batch, and how many of them a step takes: 65,536 tokens. Half a million would leave few steps of this text."""
PROBED_STEPS, PROBE_S, PROBE_SHARE = 4, 15.0, 0.02
"""Steps of the first probe; the least seconds of steps of the second, and their share of the comparison's time."""
TRIES_SHARE = 0.25
"""Time of a try of a learning rate."""
WARMUP_SHARE = 0.05

Side = Callable[[float, float], dict[str, float]]
"""Trains for some seconds with a learning rate: process_s, steps, loss (nats per token) and bits_per_byte."""


def package_texts(most_bytes: int) -> Iterator[str]:
    """Python files of the installed packages, each text once, in an order that their digests give."""
    found: dict[str, Path] = {}
    for path in Path(sysconfig.get_path("purelib")).rglob("*.py"):
        found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    size = 0
    for digest in sorted(found):
        text = found[digest].read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text
            size += len(text.encode())
        if size >= most_bytes:
            return


def make_dataset(directory: Path, shape: str) -> Path:
    """A tokenized dataset of the packages' source with the vocabulary of one of `speed.SHAPES`."""
    _, _, vocab_size, length = speed.SHAPES[shape]
    texts = list(package_texts(TEXT_BYTES.get(shape, 20_000_000)))
    print(f"text: {len(texts):,} files, {sum(map(len, texts)) / 1e6:,.0f} MB", flush=True)
    tokenizer = train_tokenizer(TokenizerSettings(vocab_size=vocab_size, sequence_length=length), texts)
    held_out = texts[::VALIDATION_SHARE]
    del texts[::VALIDATION_SHARE]
    return write_dataset(directory, tokenizer, {"train": texts, "validation": held_out})


def settings_of(shape: str, steps: int) -> ExperimentSettings:
    """One of `speed.SHAPES` with another number of steps; evaluated and saved once, at the end."""
    model_file, training_file, vocab_size, length = speed.SHAPES[shape]
    training = read_settings(TrainingSettings, training_file)
    warmup = max(1, min(training.warmup_steps * steps // training.max_steps, steps - 1))
    batch = GPU_WINDOWS if shape in TEXT_BYTES else None
    return ExperimentSettings(
        name=shape,
        tokenizer=TokenizerSettings(vocab_size=vocab_size, sequence_length=length),
        model=read_settings(ModelSettings, model_file),
        training=dataclasses.replace(
            training,
            max_steps=steps,
            warmup_steps=warmup,
            eval_steps=steps,
            save_steps=steps,
            sample_tokens=0,
            per_device_train_batch_size=batch[0] if batch else training.per_device_train_batch_size,
            gradient_accumulation_steps=batch[1] if batch else training.gradient_accumulation_steps,
        ),
        benchmark=dataclasses.replace(ExperimentSettings("").benchmark, generated_tokens=[1], prefill_tokens=[1]),
    )


def windows_per_step(shape: str) -> int:
    """Of ours, and of a peer that no other number is tried with."""
    training = settings_of(shape, 2).training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def train_ours(settings: ExperimentSettings, dataset_dir: Path, scratch: Path) -> dict[str, float]:
    """In this process: the experiment's own training. after_s, after_cpu_s: of the last evaluation, not counted."""
    from model.training.train import train

    trained = time.perf_counter(), time.process_time()

    def mark(line: str) -> None:
        nonlocal trained
        if line.startswith("validating the weights"):
            trained = time.perf_counter(), time.process_time()

    summary = train(settings, dataset_dir, scratch / "output", scratch / "work", log=mark)
    return {
        "loop_s": summary.seconds,
        "steps_s": summary.tokens / summary.tokens_per_second,
        "loss": summary.validation_loss,
        "bits_per_byte": summary.bits_per_byte,
        "after_s": time.perf_counter() - trained[0],
        "after_cpu_s": time.process_time() - trained[1],
        "tokens_per_second": summary.tokens_per_second,
        "model_flops_utilization": summary.model_flops_utilization,
    }


def train_llama(
    shape: str, steps: int, learning_rate: float, dataset_dir: Path, scratch: Path, windows: int
) -> dict[str, float]:
    """In this process: transformers' Trainer with AdamW, a warm-up and a cosine. windows: of a step."""
    length, vocab_size = speed.SHAPES[shape][3], len(load_tokenizer(dataset_dir / "tokenizer"))
    torch.manual_seed(0)
    model, training = speed.build_llama(shape, vocab_size), settings_of(shape, steps).training
    device = resolve_device(training.device)
    passes = training.gradient_accumulation_steps if windows == windows_per_step(shape) else 1
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=windows // passes,
        gradient_accumulation_steps=passes,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, int(WARMUP_SHARE * steps)),
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=has_fast_bfloat16(device),
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    datasets = [TokenDataset(dataset_dir, split, length) for split in ("train", "validation")]
    started = time.perf_counter()
    Trainer(model=model, args=arguments, train_dataset=datasets[0]).train()
    trained = time.perf_counter()
    found = evaluate(model.eval(), datasets[1])
    return {
        "loop_s": trained - started,
        "steps_s": trained - started,
        "after_s": time.perf_counter() - trained,
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
    }


def in_process(
    side: str, shape: str, steps: int, learning_rate: float, dataset_dir: Path, windows: int
) -> dict[str, float]:
    """One side's training in a separate process, whose time it gives without that of the last evaluation."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.training", "train", side, shape, str(steps), str(learning_rate)]
        command += [str(dataset_dir), scratch, str(windows)]
        started = time.perf_counter()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"{side} ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"steps": steps, "process_s": time.perf_counter() - started - found.pop("after_s"), **found}


def _timed(side: str, shape: str, dataset_dir: Path, windows: int, seconds: float) -> Side:
    """A side whose number of steps follows from the time of one, and of a process's start. seconds: of a training.

    Two probes: the first steps of a process are slow, and evaluations, which a probe has as many of as a training, take
    longer than its steps.
    """
    few = in_process(side, shape, PROBED_STEPS, 1e-3, dataset_dir, windows)
    probe_s = max(PROBE_S, PROBE_SHARE * seconds)
    more = max(8, min(int(probe_s * PROBED_STEPS / few["steps_s"]), 300))
    longer = in_process(side, shape, PROBED_STEPS + more, 1e-3, dataset_dir, windows)
    each = (longer["steps_s"] - few["steps_s"]) / more
    before = longer["process_s"] - (PROBED_STEPS + more) * each

    def run(seconds: float, learning_rate: float) -> dict[str, float]:
        return in_process(side, shape, max(10, int((seconds - before) / each)), learning_rate, dataset_dir, windows)

    return run


def _nanogpt(copy: Path, shape: str, dataset_dir: Path, device: str) -> Side:
    """The peer nanoGPT, on the dataset's tokens; the number of steps follows from the time of one."""
    model_file, _, vocab_size, length = speed.SHAPES[shape]
    sizes = read_settings(ModelSettings, model_file)
    training = settings_of(shape, 2).training
    peer = nanogpt.Peer(
        copy, dataset_dir, vocab_size, length, device,
        (sizes.num_hidden_layers, sizes.num_attention_heads, sizes.hidden_size),
        (training.per_device_train_batch_size, training.gradient_accumulation_steps),
    )  # fmt: skip
    probe = peer.train(10, 1e-3)

    def run(seconds: float, learning_rate: float) -> dict[str, float]:
        before = probe["process_s"] - 10 * probe["step_s"]
        found = peer.train(max(10, int((seconds - before) / probe["step_s"])), learning_rate)
        tokens = TokenDataset(dataset_dir, "validation", length)
        text_bytes = int(tokens.byte_counts[np.asarray(tokens.tokens[1:], np.int64)].sum())
        nats = found["loss"] * (len(tokens.tokens) - 1)
        return {**found, "bits_per_byte": nats / math.log(2) / text_bytes}

    return run


def tuned(sides: Mapping[int, Side], seconds: float, learning_rates: Sequence[float]) -> dict[str, Any]:
    """The training with the best of some numbers of windows in a step and of some learning rates, and what each had."""
    if len(sides) == len(learning_rates) == 1:  # nothing to choose from
        [(windows, side)], [rate] = sides.items(), learning_rates
        return {**side(seconds, rate), "windows": windows, "learning_rate": rate, "tries": {}}
    tries = {
        (windows, rate): side(TRIES_SHARE * seconds, rate)["bits_per_byte"]
        for windows, side in sides.items()
        for rate in learning_rates
    }
    named = {f"{windows} windows, {rate:g}": bits for (windows, rate), bits in tries.items()}
    print(f"bits per byte by batch and learning rate: {json.dumps(named)}", flush=True)
    windows, rate = min(tries, key=lambda tried: math.inf if math.isnan(tries[tried]) else tries[tried])
    return {**sides[windows](seconds, rate), "windows": windows, "learning_rate": rate, "tries": named}


def compare(
    shape: str,
    minutes: float,
    share: float,
    learning_rates: list[float],
    *,
    folder: Path | None = None,
    dataset_dir: Path | None = None,
    windows: Sequence[int] = (),
    device: str = "cuda",
) -> dict[str, Any]:
    """A peer in `minutes`, and ours in `share` of the time it took. folder: of nanoGPT; None: the peer is Llama.

    windows: tried in a step of Llama; none: ours.
    """
    own, seconds = windows_per_step(shape), 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        dataset_dir = dataset_dir or make_dataset(Path(scratch, "dataset"), shape)
        name = "llama" if folder is None else "nanogpt"
        if folder is None:
            sides = {count: _timed("llama", shape, dataset_dir, count, seconds) for count in windows or [own]}
        else:
            sides = {own: _nanogpt(nanogpt.work_tree(folder, Path(scratch)), shape, dataset_dir, device)}
        peer = tuned(sides, seconds, learning_rates)
        print(f"{name}: {json.dumps(peer)}", flush=True)
        own_s = share * peer["process_s"]
        ours = _timed("ours", shape, dataset_dir, own, own_s)(own_s, 0.0)
        print(f"ours: {json.dumps(ours)}", flush=True)
    ratio = ours["bits_per_byte"] / peer["bits_per_byte"]
    time_share = ours["process_s"] / peer["process_s"]
    print(
        f"ours {ours['bits_per_byte']:.4f} bits per byte in {ours['process_s']:,.0f} s, {name} "
        f"{peer['bits_per_byte']:.4f} in {peer['process_s']:,.0f} s: {ratio:.3f} times its bits per byte in "
        f"{time_share:.2f} times its time"
    )
    return {"shape": shape, name: peer, "ours": ours, "bits_per_byte_ratio": ratio, "time_ratio": time_share}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `measure`."""
    parser.add_argument("--shape", choices=list(speed.SHAPES), help="default: stdlib_30m, with --gpu gpt2_124m")
    parser.add_argument("--minutes", type=float, help="of the peer (default: 60, with --gpu 5)")
    parser.add_argument("--share", type=float, help="of the peer's time for ours (default: 1, with --gpu a third)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of the peer")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[], help="tried in a step of Llama (default: as many as ours)"
    )
    parser.add_argument("--dataset", type=Path, help="a tokenized dataset (default: made of the installed packages)")
    parser.add_argument("--gpu", action="store_true", help="against nanoGPT, compiled, on a GPU")
    parser.add_argument("--nanogpt", type=Path, help="a work tree of nanoGPT, for --gpu; also a peer on a CPU")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """`compare` as the options say. Raises PipelineError for options that contradict each other."""
    if options.gpu and not torch.cuda.is_available():
        raise PipelineError("--gpu: PyTorch sees no GPU; leave the option out to measure the CPU")
    if options.gpu and options.nanogpt is None:
        raise PipelineError("--gpu needs --nanogpt DIR: a work tree of https://github.com/karpathy/nanoGPT")
    if options.windows and options.nanogpt is not None:
        raise PipelineError("--windows are Llama's: leave them out with --nanogpt, whose batch is ours")
    if any(count < 1 for count in options.windows):
        raise PipelineError(f"--windows {min(options.windows)}: expected numbers greater than 0")
    return compare(
        options.shape or ("gpt2_124m" if options.gpu else "stdlib_30m"),
        options.minutes or (5 if options.gpu else 60),
        options.share or (1 / 3 if options.gpu else 1),
        options.learning_rates,
        folder=options.nanogpt,
        dataset_dir=options.dataset,
        windows=options.windows,
        device="cuda" if options.gpu else "cpu",
    )


def train_side(options: argparse.Namespace) -> dict[str, float]:
    """One training, in this process."""
    steps, dataset_dir, scratch = int(options.steps), Path(options.dataset), Path(options.scratch)
    if options.side == "ours":
        return train_ours(settings_of(options.shape, steps), dataset_dir, scratch)
    rate, windows = float(options.learning_rate), int(options.windows)
    return train_llama(options.shape, steps, rate, dataset_dir, scratch, windows)
