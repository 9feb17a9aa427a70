"""The graphs step on a GPU: the engine's tokens per second over those of its CUDA graph alone, in one interleaved run.

    python -m bench.engine.graphs [--shape 125m] [--streams 1 8 64] [--rounds 5] [--pass-us 600]

The bare graph is replayed without a host in between, on texts as long as the engine's: what the device could do.
Streams have prompts of 64 tokens and answers of 128, whose tokens count while all streams generate; sampled ones have a
temperature of 0.8, top-k 40 and top-p 0.95, penalized ones also a repetition penalty, a presence penalty and a bias.
Also measured: the reference step, int8 weights over bfloat16, the time to the first token of a prompt of 900 tokens,
and the time from loaded weights to a step that is ready.

Without a GPU only the host's part is measured: an engine whose passes compute nothing. The host works beside the
device, so a step takes the longer of the two. With --pass-us each pass takes that long on a pretended device, on any
machine, and the figure is the engine's share of what such a device could do.

Prints a table, and a JSON line for machines.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedModel

from bench.engine.ours import GREEDY, arrival_times
from bench.engine.workloads import SAMPLED, SHAPES, model_of, small_tokenizer
from bench.hardware import describe
from model.errors import ends_in_one_line
from model.generation.engine import Engine
from model.generation.requests import SamplingParameters
from model.generation.steps.choose import STEPS, step_class
from model.generation.steps.graphs.passes import Row, Wanted
from model.generation.steps.graphs.step import GraphStep
from model.weights import int8

PROMPT, ANSWER, LONG_PROMPT = 64, 128, 900
WAKE_S = 1e-4
"""Time that a sleeping thread may take to wake."""
BARE_S = 1.0
"""The bare graph is replayed for at least so long."""
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "penalized": replace(SAMPLED, repetition_penalty=1.1, presence_penalty=0.5, logit_bias={5: -1.0}),
}


class HostStep(GraphStep):
    """A step whose passes compute nothing and take `pass_s` seconds each, one after the other."""

    pass_s: ClassVar[float] = 0.0
    operations: ClassVar[str] = "model.generation.steps.graphs.plain"

    @classmethod
    def unavailable(cls, model: PreTrainedModel) -> str | None:
        """None: it has nothing to compute."""
        return None

    @classmethod
    def create(
        cls, model: PreTrainedModel, slots: int, cache_tokens: int | None = None, threads: int | None = None
    ) -> Self:
        """The step, whose tokens are all 0."""
        step, device = cls(model, slots, cache_tokens), _Device()
        step._passes._launches = dict.fromkeys((1 << power for power in range(9)), partial(device.launch, cls.pass_s))
        for staging in step._passes._staging:
            staging._event = _PassEnd(device)  # type: ignore[assignment]
        return step


class _Device:
    """ends: when all that was launched has been computed, seconds of `time.perf_counter`."""

    ends = 0.0

    def launch(self, seconds: float) -> None:
        self.ends = max(self.ends, time.perf_counter()) + seconds


class _PassEnd:
    """Takes the place of a `torch.cuda.Event`."""

    def __init__(self, device: _Device) -> None:
        self._device, self._at = device, 0.0

    def record(self) -> None:
        self._at = self._device.ends

    def query(self) -> bool:
        return time.perf_counter() >= self._at

    def synchronize(self) -> None:
        while (left := self._at - time.perf_counter()) > 0:
            time.sleep(max(left - WAKE_S, 0.0))


class Measured:
    """An engine and its figures."""

    def __init__(self, model: PreTrainedModel, step: str, streams: int) -> None:
        started = time.perf_counter()
        self.engine = Engine(
            model, small_tokenizer(), end_of_text_ids=frozenset(), max_batch_size=streams, max_queue=streams, step=step
        )
        self.engine.warm_up()
        self.start_s = time.perf_counter() - started
        self._vocab_size = model.config.vocab_size

    def tokens_per_second(self, streams: int, sampling: SamplingParameters) -> float:
        """Over all streams, while all of them generate: from the last one's first token to the first one's last."""
        arrivals, _ = self._run(streams, PROMPT, ANSWER, sampling)
        start, end = max(of_one[0][0] for of_one in arrivals), min(of_one[-1][0] for of_one in arrivals)
        tokens = sum(count for of_one in arrivals for at, count in of_one if start < at <= end)
        return tokens / (end - start)

    def first_token_ms(self) -> float:
        """From a prompt of LONG_PROMPT tokens to the first token of its answer."""
        arrivals, started = self._run(1, LONG_PROMPT, 1, GREEDY)
        return 1e3 * (arrivals[0][0][0] - started)

    def _run(
        self, streams: int, prompt: int, answer: int, sampling: SamplingParameters
    ) -> tuple[list[list[tuple[float, int]]], float]:
        """As `arrival_times`."""
        prompts = [[random.randrange(2, self._vocab_size) for _ in range(prompt)] for _ in range(streams)]
        return arrival_times(self.engine, prompts, [answer] * streams, sampling)


def bare_tokens_per_second(model: PreTrainedModel, streams: int) -> float:
    """Of the CUDA graph of a pass, replayed without a host: each replay reads texts of the same length."""
    step: Any = step_class("graphs")
    step = step(model, streams)
    position = PROMPT + ANSWER // 2
    with torch.inference_mode():
        for slot in range(streams):
            step._cache.hold(slot, 0, position + 1)
        rows = [Row(slot, position, 2) for slot in range(streams)]
        step._passes.launch(rows, [Wanted(row) for row in range(streams)]).tokens()
        started, replays, seconds = time.perf_counter(), 0, 0.0
        while seconds < BARE_S:
            for _ in range(ANSWER):
                step._passes.replay(streams)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            replays, seconds = replays + ANSWER, time.perf_counter() - started
    return streams * replays / seconds


def host_figures(shape: str, streams: list[int], rounds: int, pass_us: float = 0.0) -> dict[str, float]:
    """Microseconds of the host in a step, without a GPU. pass_us: the share of a device whose passes take that long."""
    found = {}
    STEPS["host"] = "bench.engine.graphs:HostStep"
    step: Any = step_class("host")  # not this module's, if this runs as a program
    step.pass_s = 1e-6 * pass_us
    try:
        for count in streams:
            measured = Measured(model_of(shape), "host", count)
            for name, sampling in SAMPLINGS.items():
                speeds = [measured.tokens_per_second(count, sampling) for _ in range(rounds + 1)][1:]
                step_us = 1e6 * count / statistics.median(speeds)
                if pass_us:
                    found[f"share of a device of {pass_us:g} us a pass, {count} streams, {name}"] = pass_us / step_us
                else:
                    found[f"host's part of a step, {count} streams, {name}, us"] = step_us
            measured.engine.stop()
    finally:
        del STEPS["host"]  # no engine may choose it
    return found


def gpu_figures(shape: str, streams: list[int], rounds: int, device: str = "cuda") -> dict[str, float]:
    """Tokens per second and ratios on the GPU. Another device computes in float32, for tests."""

    def load() -> Any:
        return model_of(shape).to(device, torch.bfloat16 if device == "cuda" else torch.float32)  # type: ignore

    most, model = max(streams), load()
    engines = {"graphs": Measured(model, "graphs", most), "reference": Measured(model, "reference", most)}
    engines["graphs, int8"] = Measured(int8.quantize(load()), "graphs", most)
    speeds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for count in streams:
            runs = {"bare graph": partial(bare_tokens_per_second, model, count)}
            for name, measured in engines.items():
                for how, sampling in SAMPLINGS.items():
                    runs[f"{name}, {how}"] = partial(measured.tokens_per_second, count, sampling)
            for name, run in runs.items():
                speed = run()
                if number:
                    speeds.setdefault(f"{name}, {count} streams, tokens/s", []).append(speed)
    found = {name: statistics.median(values) for name, values in speeds.items()}
    for count in streams:
        own = found[f"graphs, greedy, {count} streams, tokens/s"]
        found[f"graphs / bare graph, {count} streams"] = own / found[f"bare graph, {count} streams, tokens/s"]
        for how in ("sampled", "penalized"):
            found[f"{how} / greedy, {count} streams"] = found[f"graphs, {how}, {count} streams, tokens/s"] / own
        found[f"int8 / bfloat16, {count} streams"] = found[f"graphs, int8, greedy, {count} streams, tokens/s"] / own
        slow = found[f"reference, greedy, {count} streams, tokens/s"]
        found[f"graphs / reference, {count} streams"] = own / slow
    firsts = [engines["graphs"].first_token_ms() for _ in range(rounds + 1)][1:]
    for measured in engines.values():
        measured.engine.stop()
    found[f"first token of {LONG_PROMPT} tokens, ms"] = statistics.median(firsts)
    found["start to ready, s"] = engines["graphs"].start_s
    return found


@ends_in_one_line
def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine.graphs", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("--shape", choices=list(SHAPES), default="125m", help="of random weights (default: 125m)")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that count (default: 5)")
    parser.add_argument(
        "--pass-us", type=float, default=0.0, help="microseconds of a pass on a pretended device, instead of a GPU"
    )
    arguments = parser.parse_args()
    if arguments.pass_us < 0:
        parser.error(f"argument --pass-us: found {arguments.pass_us:g}, expected 0 or more")
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.pass_us else "cpu")
    if device.type == "cpu" and not arguments.pass_us:
        print("no GPU: only the host's part is measured", file=sys.stderr)
    measure = gpu_figures if device.type == "cuda" else partial(host_figures, pass_us=arguments.pass_us)
    found = measure(arguments.shape, arguments.streams, arguments.rounds)
    print("| figure | |\n|---|---:|")
    for name, value in found.items():
        print(f"| {name} | {value:,.3g} |" if value < 100 else f"| {name} | {value:,.0f} |")
    print("\n" + json.dumps({"shape": arguments.shape, **found, "hardware": describe(device)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
