"""Speculative decoding against one token at a time, on real text, and what more tokens in a step cost.

    python -m bench.engine.speculation MODEL_DIR [--rounds 8] [--streams 1 4 8] [--tokens 128]
    python -m bench.engine.speculation MODEL_DIR --draft DRAFT_DIR [--rounds 8] [--tokens 128]
    python -m bench.engine.speculation --shape 2m 30m [--rounds 8]

With a directory: answers to prompts from the source of the running Python's standard library, greedy and at temperature
0.7, with `speculative_tokens` at its default and at 0: both engines get the same prompts, one after the other, new ones
in each round, and must give the same tokens. Tokens per second count the time from the requests to the last token.
With --draft: what a smaller model with the same tokenizer would give as the source of proposals. Its tokens after each
token of the model's own answers say how many would be right, the measured steps of both what they cost.
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
from typing import TypeVar

import numpy as np
import torch

from bench.engine.workloads import SHAPES, model_of
from model.errors import PipelineError, ends_in_one_line
from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from model.generation.sampler import Sampler
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
PROPOSED = (1, 2, 3, 4, 6)
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


def compare(model_dir: Path, kind: str, rounds: int, streams: list[int], tokens: int) -> None:
    """Print tokens/s with and without proposals, their ratio in each round, and how many proposals were right."""
    model, tokenizer = KINDS[kind](load_model(model_dir)), load_tokenizer(model_dir)
    torch.set_num_threads(decoding_threads(count_parameters(model), usable_cores()))
    engines = [
        Engine(model, tokenizer, end_of_text_ids=frozenset(), speculative_tokens=count, threads=usable_cores())
        for count in (0, ServingSettings.speculative_tokens or MOST)
    ]
    for engine in engines:
        engine.warm_up()
    print(f"\n{count_parameters(model):,} parameters, {engines[0].precision}, up to {usable_cores()} threads\n")
    print(
        "| streams | temperature | tokens/s | with proposals | ratio: median, range | of CPU time | right | per step |"
    )
    print("|---:|---:|---:|---:|---|---|---:|---:|")
    for count in streams:
        for temperature in (0.0, 0.7):
            before = engines[1].stats()
            times = [_round(engines, count, temperature, tokens, number) for number in range(rounds + 1)][1:]
            after = engines[1].stats()
            proposed = after.proposed_tokens_total - before.proposed_tokens_total
            accepted = after.accepted_tokens_total - before.accepted_tokens_total
            generated = after.generated_tokens_total - before.generated_tokens_total
            plain, fast = (count * tokens / statistics.median(found) for found in list(zip(*times, strict=True))[:2])
            print(
                f"| {count} | {temperature} | {plain:,.0f} | {fast:,.0f} "
                f"| {_ratios([(a, b) for a, b, _, _ in times])} | {_ratios([(c, d) for _, _, c, d in times])} "
                f"| {accepted / max(proposed, 1):.0%} of {proposed:,} | {generated / (generated - accepted):.2f} |",
                flush=True,
            )
    for engine in engines:
        engine.stop()


def _round(
    engines: list[Engine], streams: int, temperature: float, tokens: int, number: int
) -> tuple[float, float, float, float]:
    """Seconds of both engines, and CPU seconds of both. Raises PipelineError if their tokens differ."""
    sampling = SamplingParameters(temperature=temperature, seed=number)
    texts = prompts(engines[0], streams, 1_000 * streams + number)
    requests = [GenerationRequest(ids, tokens, sampling) for ids in texts]
    found = {which: answer(engines[which], requests) for which in ((0, 1) if number % 2 else (1, 0))}
    if found[0][0] != found[1][0]:
        raise PipelineError("with proposals the tokens differ: this is an error of the engine")
    return found[0][1], found[1][1], found[0][2], found[1][2]


def _ratios(pairs: list[tuple[float, float]]) -> str:
    found = sorted(a / b for a, b in pairs)
    return f"{statistics.median(found):.2f}, {found[0]:.2f} to {found[-1]:.2f}"


def draft(model_dir: Path, draft_dir: Path, kind: str, rounds: int, tokens: int) -> None:
    """Print the share of a draft model's tokens that are the model's, and for each number of proposed tokens the tokens
    of a step and the speed over that of one token at a time: steps of both models alone, one stream.
    """
    model, smaller = (KINDS[kind](load_model(directory)) for directory in (model_dir, draft_dir))
    tokenizer = load_tokenizer(model_dir)
    if tokenizer.get_vocab() != load_tokenizer(draft_dir).get_vocab():
        raise PipelineError(f"{draft_dir} has another tokenizer than {model_dir}: expected the same")
    engine = Engine(model, tokenizer, end_of_text_ids=frozenset(), speculative_tokens=0, threads=usable_cores())
    own, drafts = NativeStep.create(model, 1), NativeStep.create(smaller, 1)
    own_s, draft_s = _step_times(own, rounds), _step_times(drafts, rounds)
    print(
        f"\n{count_parameters(model):,} parameters, a draft of {count_parameters(smaller):,}, {engine.precision}: "
        f"a step of one token {own_s[1] * 1e6:,.0f} and {draft_s[1] * 1e6:,.0f} us\n"
    )
    print(
        "| temperature | right | " + " | ".join(f"{count} proposed: tokens a step; speed" for count in PROPOSED) + " |"
    )
    print("|---:|---:|" + "---|" * len(PROPOSED))
    for temperature in (0.0, 0.7):
        found = [
            _right(engine, drafts, ids, SamplingParameters(temperature=temperature, seed=number), tokens)
            for number, ids in enumerate(prompts(engine, rounds, seed=0))
        ]
        cells = []
        for count in PROPOSED:
            each = sum(map(len, found)) / sum(steps_of(right, count) for right in found)
            cells.append(f"{each:.2f}; {each * own_s[1] / (count * draft_s[1] + own_s[count + 1]):.2f}")
        share = sum(map(sum, found)) / sum(map(len, found))
        print(f"| {temperature} | {share:.0%} | " + " | ".join(cells) + " |", flush=True)
    engine.stop()


def _right(engine: Engine, drafts: NativeStep, ids: list[int], sampling: SamplingParameters, tokens: int) -> list[bool]:
    """For each token of the model's answer, whether the draft model chooses it after the same text."""
    ((text,), *_) = answer(engine, [GenerationRequest(ids, tokens, sampling)])
    sampler = Sampler(sampling, ids, drafts.vocab_size, drafts.logits_device)
    draws = () if sampler.is_greedy else sampler.draws(len(text))
    segment = Segment(0, 0, np.array([*ids, *text[:-1]]), "token", draws, len(text))
    (output,) = drafts.compute([segment])
    return [one == other for one, other in zip(output.tokens, text, strict=True)]


def steps_of(right: list[bool], count: int) -> int:
    """Steps of a text that takes the right ones of up to `count` proposed tokens, and one more, in each."""
    place = steps = 0
    while place < len(right):
        accepted = 0
        while accepted < count and place + accepted < len(right) and right[place + accepted]:
            accepted += 1
        place, steps = place + accepted + 1, steps + 1
    return steps


def _step_times(step: NativeStep, rounds: int) -> dict[int, float]:
    """Seconds of a step over each number of tokens of one text."""
    ids = np.arange(2, 2 + CACHED + max(PROPOSED) + 1)
    cached = min(CACHED, step.context_length - max(PROPOSED) - 1)
    step.compute([Segment(0, 0, ids[:cached], "none")])
    steps = {
        rows: [Segment(0, cached, ids[cached : cached + rows], "token", rows=rows)]
        for rows in (1, *(count + 1 for count in PROPOSED))
    }
    return _low_times(step, steps, 20 * rounds)


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
    parser.add_argument("--draft", type=Path, help="of a smaller model with the same tokenizer, in full precision")
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
            if arguments.draft:
                draft(model_dir, arguments.draft, kind, arguments.rounds, arguments.tokens)
                continue
            compare(model_dir, kind, arguments.rounds, arguments.streams, arguments.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
