"""The generation engine against what people would use instead, in one interleaved run.

    python -m bench.engine [MODEL_DIR] [--rounds 5]

Without a directory it takes the shape of the `stdlib_30m` experiment with random weights, which do not change the
speed. Four workloads, greedy, no end of text:

- one stream: the engine against a plain greedy loop over transformers' DynamicCache;
- eight streams: the engine's tokens per second against those of its one stream;
- sixteen ragged streams, prompts of 448 to 576 tokens, each asking again once it is answered, 48 requests in all: the
  engine against transformers' continuous batching and against padded batches of `generate()`, sixteen requests each, by
  answer tokens per second, prompts included. Answers are long-tailed, as people's are (exponential, 80 tokens on
  average, 365 at most), or even (uniform, 32 to 128), where padding costs least.

Each contender has a process of its own, as its users would run it: OpenMP lets waiting threads sleep at once where all
pools of a process together have more threads than there are cores. Prints a table of medians and ratios and a JSON line
for machines.
"""

import argparse
import json
import logging
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.decode import decode
from bench.hardware import describe
from bench.settings import read_settings
from model.build import build_config, build_model
from model.errors import PipelineError, ends_in_one_line
from model.generation.engine import Engine
from model.generation.requests import GenerationRequest, SamplingParameters
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings, TokenizerSettings
from model.system.cpu import usable_cores
from model.text.tokenizer import train_tokenizer
from model.weights.int8 import quantize
from model.weights.loading import load_model

GREEDY = SamplingParameters(temperature=0)
STREAM_PROMPT, STREAM_TOKENS = 64, 128
RAGGED_STREAMS, RAGGED_REQUESTS = 16, 48


def model_of_30m() -> RexForCausalLM:
    """The shape of `configs/model/rex_30m.yaml` with a vocabulary of 16,384 and random weights."""
    shape = read_settings(ModelSettings, "model/rex_30m.yaml")
    return build_model(build_config(shape, 16_384, 0, 0, 1), seed=0).eval().requires_grad_(False)


def _prompt(tokens: int, vocab_size: int, seed: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(2, vocab_size) for _ in range(tokens)]


class Contender:
    """One way to generate; each workload is a method that runs it once and returns tokens per second."""

    def __init__(self, model: RexForCausalLM) -> None:
        self._model, self._vocab_size = model, model.config.vocab_size
        self._round = 0
        self.requests = RAGGED_REQUESTS
        """Of the ragged workloads."""
        numbers = random.Random(0)
        self._prompt_tokens = [numbers.randint(448, 576) for _ in range(RAGGED_REQUESTS)]
        # Quantiles of the distributions rather than draws from them: no seed decides how ragged they are.
        quantiles = [(i + 0.5) / RAGGED_REQUESTS for i in range(RAGGED_REQUESTS)]
        self._even_answers = [round(32 + 96 * quantile) for quantile in quantiles]
        numbers.shuffle(self._even_answers)
        self._long_tailed_answers = [max(8, round(-80 * math.log(1 - quantile))) for quantile in quantiles]
        numbers.shuffle(self._long_tailed_answers)

    def _prompts(self, lengths: list[int]) -> list[list[int]]:
        """Prompts that no earlier round had: a cache of prompts must not help."""
        self._round += 1
        return [_prompt(length, self._vocab_size, 1000 * self._round + i) for i, length in enumerate(lengths)]

    def one_stream(self) -> float:
        """A single stream."""
        raise NotImplementedError

    def eight_streams(self) -> float:
        """Eight equal streams."""
        raise NotImplementedError

    def ragged_even(self) -> float:
        """Sixteen ragged streams with even answers."""
        return self._ragged(self._even_answers[: self.requests])

    def ragged_long_tailed(self) -> float:
        """Sixteen ragged streams with long-tailed answers."""
        return self._ragged(self._long_tailed_answers[: self.requests])

    def _ragged(self, answer_tokens: list[int]) -> float:
        raise NotImplementedError


class OurEngine(Contender):
    """`model.generation`."""

    def __init__(self, model: RexForCausalLM) -> None:
        super().__init__(model)
        # The engine wants a tokenizer only to turn tokens into text; this one knows fewer tokens than the model.
        tokenizer = train_tokenizer(TokenizerSettings(vocab_size=260), ["def main():\n    return 0\n"] * 4)
        self._engine = Engine(
            model, tokenizer, end_of_text_ids=frozenset(), max_batch_size=RAGGED_STREAMS, max_queue=64
        )

    def one_stream(self) -> float:
        """A single stream."""
        return self._run([STREAM_PROMPT], [STREAM_TOKENS])

    def eight_streams(self) -> float:
        """Eight equal streams."""
        return self._run([STREAM_PROMPT] * 8, [STREAM_TOKENS] * 8)

    def _ragged(self, answer_tokens: list[int]) -> float:
        return self._run(self._prompt_tokens[: len(answer_tokens)], answer_tokens)

    def _run(self, prompt_tokens: list[int], answer_tokens: list[int]) -> float:
        prompts = self._prompts(prompt_tokens)
        started = time.perf_counter()
        generations = [
            self._engine.submit(GenerationRequest(prompt, count, GREEDY))
            for prompt, count in zip(prompts, answer_tokens, strict=True)
        ]
        for generation in generations:
            for _ in generation:
                pass
        return sum(answer_tokens) / (time.perf_counter() - started)


class OurEngineInt8(OurEngine):
    """The same with int8 weights."""

    def __init__(self, model: RexForCausalLM) -> None:
        super().__init__(quantize(model))


class GreedyLoop(Contender):
    """A plain loop over transformers' DynamicCache."""

    def one_stream(self) -> float:
        """A single stream."""
        (prompt,) = self._prompts([STREAM_PROMPT])
        started = time.perf_counter()
        decode(self._model, torch.tensor([prompt]), STREAM_TOKENS, use_cache=True)
        return STREAM_TOKENS / (time.perf_counter() - started)


class PaddedBatch(Contender):
    """Padded batches of `generate()`, one after the other; each ends when its longest answer ends."""

    def _ragged(self, answer_tokens: list[int]) -> float:
        prompts = self._prompts(self._prompt_tokens[: len(answer_tokens)])
        started = time.perf_counter()
        for first in range(0, len(prompts), RAGGED_STREAMS):
            batch = slice(first, first + RAGGED_STREAMS)
            self._generate(prompts[batch], max(answer_tokens[batch]))
        return sum(answer_tokens) / (time.perf_counter() - started)

    def _generate(self, prompts: list[list[int]], tokens: int) -> None:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            self._model.generate(  # type: ignore[misc]
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=1
            )


class TransformersContinuousBatching(Contender):
    """transformers' own continuous batching."""

    def _ragged(self, answer_tokens: list[int]) -> float:
        config = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=512, max_requests_per_batch=RAGGED_STREAMS)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=1, max_new_tokens=512)
        prompts = self._prompts(self._prompt_tokens[: len(answer_tokens)])
        manager = self._model.init_continuous_batching(  # type: ignore[operator]
            generation_config=generation, continuous_batching_config=config
        )
        manager.start()
        try:
            started = time.perf_counter()
            for prompt, count in zip(prompts, answer_tokens, strict=True):
                manager.add_request(prompt, max_new_tokens=count)
            done = made = 0
            while done < len(prompts):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise PipelineError("transformers' continuous batching stopped: see its log")
                if result is not None and result.is_finished():
                    done, made = done + 1, made + len(result.generated_tokens)
            seconds = time.perf_counter() - started
        finally:
            manager.stop(block=True)
        assert made == sum(answer_tokens), f"{made} tokens instead of {sum(answer_tokens)}"
        return made / seconds


RUNS: dict[str, tuple[type[Contender], str]] = {
    "loop_1": (GreedyLoop, "one_stream"),
    "engine_1": (OurEngine, "one_stream"),
    "engine_8": (OurEngine, "eight_streams"),
    "engine_16_long_tailed": (OurEngine, "ragged_long_tailed"),
    "transformers_16_long_tailed": (TransformersContinuousBatching, "ragged_long_tailed"),
    "padded_16_long_tailed": (PaddedBatch, "ragged_long_tailed"),
    "engine_16_even": (OurEngine, "ragged_even"),
    "transformers_16_even": (TransformersContinuousBatching, "ragged_even"),
    "padded_16_even": (PaddedBatch, "ragged_even"),
    "engine_int8_1": (OurEngineInt8, "one_stream"),
    "engine_int8_8": (OurEngineInt8, "eight_streams"),
    "engine_int8_16_even": (OurEngineInt8, "ragged_even"),
}
PAIRS = {
    "one stream / greedy loop": ("engine_1", "loop_1"),
    "eight streams / one stream": ("engine_8", "engine_1"),
    "sixteen ragged, long-tailed / transformers' continuous batching": (
        "engine_16_long_tailed",
        "transformers_16_long_tailed",
    ),
    "sixteen ragged, long-tailed / padded batches": ("engine_16_long_tailed", "padded_16_long_tailed"),
    "sixteen ragged, even / transformers' continuous batching": ("engine_16_even", "transformers_16_even"),
    "sixteen ragged, even / padded batches": ("engine_16_even", "padded_16_even"),
    "int8 / float32, one stream": ("engine_int8_1", "engine_1"),
    "int8 / float32, eight streams": ("engine_int8_8", "engine_8"),
    "int8 / float32, sixteen ragged, even": ("engine_int8_16_even", "engine_16_even"),
}

_contender: Contender


def _set_up(kind: type[Contender], model_dir: Path | None, threads: int) -> None:
    """In a contender's process, once."""
    global _contender  # what a pool's process keeps between its tasks
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _contender = kind(load_model(model_dir) if model_dir else model_of_30m())


def _run(workload: str, requests: int = RAGGED_REQUESTS) -> float:
    _contender.requests = requests
    speed: float = getattr(_contender, workload)()
    return speed


def measure(model_dir: Path | None, rounds: int, threads: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of every workload in every round, and the ratios of each round's pairs."""
    speeds: dict[str, list[float]] = {name: [] for name in RUNS}
    fresh = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {
            kind: stack.enter_context(ProcessPoolExecutor(1, fresh, _set_up, (kind, model_dir, threads)))
            for kind in {kind for kind, _ in RUNS.values()}
        }
        for number in range(rounds + 1):
            for name, (kind, workload) in RUNS.items():
                if not number:
                    processes[kind].submit(_run, workload, RAGGED_STREAMS).result()  # warms up
                else:
                    speeds[name].append(processes[kind].submit(_run, workload).result())
            log(f"round {number} of {rounds}: " + ", ".join(f"{n} {s[-1]:.0f}" for n, s in speeds.items() if s))
    ratios = {
        name: statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True))
        for name, (a, b) in PAIRS.items()
    }
    return {"tokens_per_second": {n: statistics.median(s) for n, s in speeds.items()}, "ratios": ratios}


@ends_in_one_line
def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("model_dir", type=Path, nargs="?", help="a checkpoint; default: 30 M parameters, random")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that count (default: 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads (default: usable cores)")
    arguments = parser.parse_args()
    if arguments.model_dir:
        load_model(arguments.model_dir)  # says here what is wrong with it, not in five processes
    found = measure(
        arguments.model_dir, arguments.rounds, arguments.threads, lambda line: print(line, file=sys.stderr, flush=True)
    )
    print("\n| workload | tokens/s |\n|---|---:|")
    for name, speed in found["tokens_per_second"].items():
        print(f"| {name} | {speed:.0f} |")
    print("\n| median of the rounds' ratios | |\n|---|---:|")
    for name, ratio in found["ratios"].items():
        print(f"| {name} | {ratio:.2f} |")
    print("\n" + json.dumps({**found, "hardware": describe(torch.device("cpu"))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
