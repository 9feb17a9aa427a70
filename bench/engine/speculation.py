"""Speculative decoding against one token at a time, on real text, and what more tokens in a step cost.

    python -m bench.engine.speculation MODEL_DIR [--rounds 8] [--streams 1 4 8] [--tokens 128]
    python -m bench.engine.speculation MODEL_DIR --draft DRAFT_DIR [--rounds 8] [--streams 1 4 8] [--tokens 128]
    python -m bench.engine.speculation --shape 2m 30m [--rounds 8]

With a directory: answers to prompts from the source of the running Python's standard library, greedy and at temperature
0.7, with `speculative_tokens` at its default and at 0, and with --draft with proposals of a smaller model, too: the
engines get the same prompts, one after the other, new ones in each round, and must give the same tokens. Tokens per
second count the time from the requests to the last token.
With --shape: a step over 1 to 8 tokens of one text, and of as many texts, over one token, with random weights.
"""

import argparse
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from bench.engine.workloads import SHAPES, model_of
from model.errors import PipelineError, ends_in_one_line
from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from model.generation.speculation.draft import load_draft
from model.generation.steps.native import NativeStep
from model.generation.steps.step import Segment
from model.settings import ServingSettings
from model.system.cpu import decoding_threads, usable_cores
from model.text.tokenizer import load_tokenizer
from model.weights import int4, int8
from model.weights.int8 import count_parameters
from model.weights.loading import load_model

Key = TypeVar("Key")
KINDS = {"float32": lambda model: model, "int8": int8.quantize, "int4": int4.quantize}
ROWS = (1, 2, 4, 8)
MOST = 8
"""Tokens proposed where the default is none."""
CACHED = 512
"""Tokens before those of a measured step."""
PROMPT_TOKENS = (32, 64, 128, 256)


def prompts(engine: Engine, count: int, seed: int) -> list[list[int]]:
    """Tokens of `count` parts of the standard library."""
    numbers = random.Random(seed)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found: list[list[int]] = []
    while len(found) < count:
        text = numbers.choice(files).read_text()
        start = numbers.randrange(max(1, len(text) - 2_000))
        ids = engine.encode(text[start : start + 2_000])
        length = min(PROMPT_TOKENS[len(found) % len(PROMPT_TOKENS)], engine.context_length // 2)
        if len(ids) >= length:
            found.append(ids[:length])
    return found


def answer(engine: Engine, requests: Iterable[GenerationRequest]) -> tuple[list[list[int]], float, float]:
    """The tokens of all answers, the seconds and the CPU seconds that they took."""
    started, cpu = time.perf_counter(), time.process_time()
    generations = [engine.submit(request) for request in requests]
    texts = [[t for event in one if isinstance(event, TextPiece) for t in event.token_ids] for one in generations]
    return texts, time.perf_counter() - started, time.process_time() - cpu


def compare(model_dir: Path, kind: str, rounds: int, streams: list[int], tokens: int, draft_dir: Path | None) -> None:
    """Print tokens/s with and without proposals, their ratio in each round, and how many proposals were right."""
    model, tokenizer = KINDS[kind](load_model(model_dir)), load_tokenizer(model_dir)
    torch.set_num_threads(decoding_threads(count_parameters(model), usable_cores()))
    most = ServingSettings.speculative_tokens or MOST
    options: dict[str, dict[str, Any]] = {"none": {"speculative_tokens": 0}, "the text": {"speculative_tokens": most}}
    if draft_dir:
        draft = load_draft(draft_dir, model, tokenizer)
        options["the text, a draft"] = {"speculative_tokens": most, "draft": draft}
    engines = {
        name: Engine(model, tokenizer, end_of_text_ids=frozenset(), threads=usable_cores(), **one)
        for name, one in options.items()
    }
    for engine in engines.values():
        engine.warm_up()
    drafted = f"a draft of {count_parameters(draft):,}, " if draft_dir else ""
    print(f"\n{count_parameters(model):,} parameters, {drafted}{engines['none'].precision}")
    print(f"up to {usable_cores()} threads\n")
    print(
        "| streams | temperature | proposals from | tokens/s | ratio: median, range | of CPU time | right | per step |"
    )
    print("|---:|---:|---|---:|---|---|---:|---:|")
    for count in streams:
        for temperature in (0.0, 0.7):
            before = {name: engine.stats() for name, engine in engines.items()}
            times = [_round(engines, count, temperature, tokens, number) for number in range(rounds + 1)][1:]
            for name, engine in engines.items():
                after = engine.stats()
                proposed = after.proposed_tokens_total - before[name].proposed_tokens_total
                accepted = after.accepted_tokens_total - before[name].accepted_tokens_total
                generated = after.generated_tokens_total - before[name].generated_tokens_total
                speed = count * tokens / statistics.median(found[name][0] for found in times)
                print(
                    f"| {count} | {temperature} | {name} | {speed:,.0f} | {_ratios(times, name, 0)} "
                    f"| {_ratios(times, name, 1)} | {accepted / max(proposed, 1):.0%} of {proposed:,} "
                    f"| {generated / (generated - accepted):.2f} |",
                    flush=True,
                )
    for engine in engines.values():
        engine.stop()


def _round(
    engines: Mapping[str, Engine], streams: int, temperature: float, tokens: int, number: int
) -> dict[str, tuple[float, float]]:
    """Seconds and CPU seconds of each engine. Raises PipelineError if their tokens differ."""
    sampling = SamplingParameters(temperature=temperature, seed=number)
    texts = prompts(engines["none"], streams, 1_000 * streams + number)
    requests = [GenerationRequest(ids, tokens, sampling) for ids in texts]
    order = list(engines)[:: 1 if number % 2 else -1]
    found = {name: answer(engines[name], requests) for name in order}
    if any(texts != found["none"][0] for texts, *_ in found.values()):
        raise PipelineError("with proposals the tokens differ: this is an error of the engine")
    return {name: (wall, cpu) for name, (_, wall, cpu) in found.items()}


def _ratios(times: Sequence[Mapping[str, tuple[float, float]]], name: str, which: int) -> str:
    """The time without proposals over that with them: of the clock (0) or of the processor (1)."""
    found = sorted(one["none"][which] / one[name][which] for one in times)
    return f"{statistics.median(found):.2f}, {found[0]:.2f} to {found[-1]:.2f}"


def _low_times(step: NativeStep, steps: Mapping[Key, Sequence[Segment]], repeats: int) -> dict[Key, float]:
    """Seconds of each of these steps, the lower quartile of as many repeats in turn."""
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    for _ in range(repeats):
        for key, segments in steps.items():
            started = time.perf_counter()
            step.compute(segments)
            seconds[key].append(time.perf_counter() - started)
    return {key: statistics.quantiles(found, n=4)[0] for key, found in seconds.items()}


def costs(shape: str, rounds: int) -> None:
    """Print the time of steps over several tokens, of one text and of as many texts, over that of one token."""
    model = model_of(shape)
    threads = decoding_threads(count_parameters(model), usable_cores())
    torch.set_num_threads(threads)
    print(f"\n{shape}: {count_parameters(model):,} parameters, {threads} threads\n")
    print("| weights | one token | " + " | ".join(f"{rows} of one text; of {rows}" for rows in ROWS[1:]) + " |")
    print("|---|---:|" + "---|" * (len(ROWS) - 1))
    ids = np.arange(2, 2 + CACHED + ROWS[-1])
    for name, quantized in KINDS.items():
        step = NativeStep.create(quantized(model), ROWS[-1])
        step.compute([Segment(slot, 0, ids[:CACHED], "none") for slot in range(ROWS[-1])])
        steps = {}
        for rows in ROWS:
            steps[rows, 1] = [Segment(0, CACHED, ids[CACHED : CACHED + rows], "token", rows=rows)]
            steps[rows, rows] = [Segment(slot, CACHED, ids[CACHED : CACHED + 1], "token") for slot in range(rows)]
        low = _low_times(step, steps, 10 * rounds)
        ratios = [f"{low[rows, 1] / low[1, 1]:.2f}; {low[rows, rows] / low[1, 1]:.2f}" for rows in ROWS[1:]]
        print(f"| {name} | {low[1, 1] * 1e6:,.0f} us | " + " | ".join(ratios) + " |", flush=True)


@ends_in_one_line
def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine.speculation", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("model_dir", type=Path, nargs="*", help="checkpoints in full precision")
    parser.add_argument(
        "--precision", nargs="+", choices=list(KINDS), default=["float32", "int8"], help="of their weights"
    )
    parser.add_argument("--draft", type=Path, help="of a smaller model with the same tokenizer")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=[], help="of random weights")
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds that count (default: 8)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8], help="texts at once (default: 1 4 8)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    arguments = parser.parse_args()
    if not arguments.model_dir and not arguments.shape:
        raise PipelineError("nothing to measure: give the directory of a model, or --shape")
    for shape in arguments.shape:
        costs(shape, arguments.rounds)
    for model_dir in arguments.model_dir:
        for kind in arguments.precision:
            compare(model_dir, kind, arguments.rounds, arguments.streams, arguments.tokens, arguments.draft)
    return 0


if __name__ == "__main__":
    sys.exit(main())
