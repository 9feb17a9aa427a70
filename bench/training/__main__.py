"""Training compared with common trainers: quality in a given time, tokens/s and model FLOPs utilization.

    python -m bench.training shakespeare --nanogpt DIR --text data/tinyshakespeare.txt
    python -m bench.training speed                  # the shape of stdlib_30m against an HF Trainer run of Llama
    python -m bench.training costs                  # reading data, saving and resuming as shares of the steps
    python -m bench.training processes              # one process against one for each core; copies of checkpoints
    python -m bench.training gpu                    # on a GPU: correct gradients in each precision, then speed
    python -m bench.training speed --gpu --nanogpt DIR    # the shape of gpt2_124m against nanoGPT compiled
    python -m bench.training quality                # stdlib_30m in an hour against Llama with AdamW (`quality.py`)
    python -m bench.training quality --gpu --nanogpt DIR  # gpt2_124m in a third of nanoGPT's time

The sides take turns on the same machine, every run in a separate process. The user clones nanoGPT. In the first
comparison both sides have the same text, split (the first 90 % of the characters train) and score: mean nats per
character over the whole validation part. nanoGPT has its published setting, ours the experiment `shakespeare_char`.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.hardware import describe
from bench.settings import read_settings
from bench.training import costs, gpu, nanogpt, processes, quality, speed
from bench.training.datasets import write_dataset
from model.errors import ends_in_one_line
from model.settings import ExperimentSettings, ModelSettings, TokenizerSettings, TrainingSettings
from model.text.tokenizer import train_tokenizer

SIDES = ("short", "nanogpt", "long")
# Steps, and windows per step, that take a fifth of nanoGPT's time and all of it on two cores.
SHORT, LONG = (125, 8), (900, 8)


def character_dataset(text: str, directory: Path) -> Path:
    """Both splits as one document each, cut as nanoGPT does: the first 90 % of the characters train."""
    tokenizer = train_tokenizer(TokenizerSettings(kind="char"), [text])
    cut = int(len(text) * 0.9)
    return write_dataset(directory, tokenizer, {"train": [text[:cut]], "validation": [text[cut:]]})


def shakespeare_settings(steps: int, batch: int) -> ExperimentSettings:
    """The experiment `shakespeare_char` with other steps and batch sizes, and evaluated only at the end."""
    training = read_settings(TrainingSettings, "training/char_minutes.yaml")
    return ExperimentSettings(
        name="shakespeare",
        tokenizer=read_settings(TokenizerSettings, "tokenizer/char.yaml"),
        model=read_settings(ModelSettings, "model/rex_char.yaml"),
        training=dataclasses.replace(
            training,
            max_steps=steps,
            per_device_train_batch_size=batch,
            eval_steps=steps,
            save_steps=steps,
            sample_tokens=0,
        ),
        benchmark=dataclasses.replace(ExperimentSettings("").benchmark, generated_tokens=[1], prefill_tokens=[1]),
    )


def train_ours(steps: int, batch: int, dataset_dir: Path) -> dict[str, float]:
    """Train in a separate process; returns its wall time, the loop's, and the loss on the whole validation part."""
    started, cpu_before = time.perf_counter(), nanogpt.children_cpu_s()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.training", "run", str(steps), str(batch), str(dataset_dir), scratch]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    # Scored after the training, untimed, as nanoGPT's score is.
    process_s, cpu_s = time.perf_counter() - started, nanogpt.children_cpu_s() - cpu_before
    return {**found, "process_s": process_s - found["after_s"], "cpu_s": cpu_s - found["after_cpu_s"]}


def compare_shakespeare(
    folder: Path,
    text: Path,
    rounds: int,
    short: Sequence[int],
    long: Sequence[int],
    named: Sequence[str] = SIDES,
) -> dict[str, Any]:
    """Rounds of nanoGPT, our short and our long run, or of the named sides, in rotating order."""
    result: dict[str, Any] = {"short": short, "long": long, "rounds": []}
    with tempfile.TemporaryDirectory() as scratch:
        copy = nanogpt.prepare(folder, text, Path(scratch))
        dataset_dir = character_dataset(text.read_text(), Path(scratch, "ours"))
        sides = {
            "short": lambda: train_ours(short[0], short[1], dataset_dir),
            "nanogpt": lambda: dataclasses.asdict(nanogpt.train(copy)),
            "long": lambda: train_ours(long[0], long[1], dataset_dir),
        }
        for number in range(rounds):
            order = [name for name in SIDES if name in named]
            if number % 2:
                order.reverse()
            row = {}
            for name in order:
                row[name] = sides[name]()
                print(f"round {number + 1}, {name}: {json.dumps(row[name])}", flush=True)
            result["rounds"].append(row)
    for name in named:
        for value in ("process_s", "loop_s", "cpu_s", "loss"):
            result[f"{name}_{value}"] = statistics.median(row[name][value] for row in result["rounds"])
    for name in {"short", "long"} & set(named) if "nanogpt" in named else ():
        for clock in ("process_s", "loop_s", "cpu_s"):
            share = [row[name][clock] / row["nanogpt"][clock] for row in result["rounds"]]
            result[f"{name}_{clock}_share"] = statistics.median(share)
    return result


def describe_shakespeare(result: dict[str, Any]) -> str:
    """Print a line for each side that ran."""
    lines = []
    for name in SIDES:
        if f"{name}_loss" in result:
            line = f"{name}: {result[f'{name}_loss']:.3f} nats per character after {result[f'{name}_process_s']:.1f} s"
            line += f" ({result[f'{name}_loop_s']:.1f} s in the loop, "
            line += f"{result[f'{name}_cpu_s']:.1f} s of CPU time)"
            if f"{name}_loop_s_share" in result:
                shares = [f"{result[f'{name}_{clock}_share']:.2f}" for clock in ("process_s", "loop_s", "cpu_s")]
                line += f", {shares[0]} of nanoGPT's ({shares[1]}, {shares[2]})"
            lines.append(line)
    return "\n".join(lines)


@ends_in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; `--json FILE` also writes it."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    characters = commands.add_parser("shakespeare", help="quality in nanoGPT's time, characters of one text")
    characters.add_argument("--nanogpt", type=Path, required=True, help="a work tree of nanoGPT")
    characters.add_argument("--text", type=Path, default=Path("data/tinyshakespeare.txt"), help="Tiny Shakespeare")
    characters.add_argument("--rounds", type=int, default=3, help="interleaved rounds, four minutes each (default 3)")
    characters.add_argument("--short", type=int, nargs=2, default=SHORT, help=f"steps and windows (default {SHORT})")
    characters.add_argument("--long", type=int, nargs=2, default=LONG, help=f"steps and windows (default {LONG})")
    characters.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="only these (default: all)")
    quality_command = commands.add_parser("quality", help="quality in a peer's time, tokens of Python source")
    quality.add_options(quality_command)
    speed_command = commands.add_parser("speed", help="tokens/s and MFU")
    speed_command.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    speed_command.add_argument("--steps", type=int, default=4, help="timed optimizer steps a round (default 4)")
    speed_command.add_argument("--gpu", action="store_true", help="gpt2_124m on a GPU against nanoGPT compiled")
    speed_command.add_argument("--nanogpt", type=Path, help="a work tree of nanoGPT, for --gpu")
    gpu_command = commands.add_parser("gpu", help="correctness of gradients on this device, and speed of steps")
    gpu_command.add_argument("--shape", choices=list(speed.SHAPES), default="gpt2_124m", help="default: gpt2_124m")
    gpu_command.add_argument("--nanogpt", type=Path, help="a work tree of nanoGPT to compare the speed with")
    gpu_command.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    gpu_command.add_argument("--steps", type=int, default=4, help="timed optimizer steps a round (default 4)")
    costs_command = commands.add_parser("costs", help="time of reading, saving and resuming as shares of the steps")
    costs_command.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    costs_command.add_argument("--shape", choices=list(speed.SHAPES), default="stdlib", help="default: stdlib")
    processes_command = commands.add_parser("processes", help="several processes, and copies of checkpoints on S3")
    processes_command.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    processes_command.add_argument("--steps", type=int, default=4, help="timed optimizer steps a round (default 4)")
    processes_command.add_argument(
        "--shape", choices=list(speed.SHAPES), default="stdlib_30m", help="default: stdlib_30m"
    )
    processes_command.add_argument(
        "--url", default="", help="of an object store for copies, such as s3://BUCKET/PREFIX"
    )
    for command in (characters, quality_command, speed_command, gpu_command, costs_command, processes_command):
        command.add_argument("--json", type=Path, help="also write the figures to this file")
    for name, names in (
        ("run", ["steps", "batch", "dataset", "scratch"]),
        ("side", ["name", "steps"]),
        ("train", ["side", "shape", "steps", "learning_rate", "dataset", "scratch", "windows"]),
        ("cost", ["shape", "scratch", "kind"]),
    ):
        hidden = commands.add_parser(name)
        for argument in names:
            hidden.add_argument(argument)
    commands.choices["cost"].add_argument("--copies", default="")
    options = parser.parse_args(arguments)
    if options.command == "run":
        settings = shakespeare_settings(int(options.steps), int(options.batch))
        print(json.dumps(quality.train_ours(settings, Path(options.dataset), Path(options.scratch))))
        return 0
    if options.command == "side":
        print(json.dumps(speed.measure_side(options.name, int(options.steps))))
        return 0
    if options.command == "train":
        print(json.dumps(quality.train_side(options)))
        return 0
    if options.command == "cost":
        found = costs.run(options.shape, Path(options.scratch), resumed=options.kind == "resumed", url=options.copies)
        print(json.dumps(found))
        return 0
    if options.command == "costs":
        result = costs.measure(options.shape, options.rounds)
    elif options.command == "processes":
        result = processes.measure(options.shape, options.rounds, options.steps, options.url)
    elif options.command == "quality":
        result = quality.measure(options)
    elif options.command == "gpu":
        result = gpu.measure(options.shape, options.nanogpt, options.rounds, options.steps)
    elif options.command == "shakespeare":
        result = compare_shakespeare(
            options.nanogpt, options.text, options.rounds, options.short, options.long, options.sides
        )
        print(describe_shakespeare(result))
    elif options.gpu:
        result = speed.compare_gpu(options.nanogpt, options.rounds, options.steps)
    else:
        result = speed.compare_cpu(options.rounds, options.steps)
    result["machine"] = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
