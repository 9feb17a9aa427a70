"""Seconds of decoding, prefill and batches, in interleaved rounds, so that a busy moment hits all configurations alike.

One run to the longest length times every token; the seconds for a shorter length are the sum of its first tokens,
because a shorter run does exactly the same work. Everything is kept: a report quotes medians, `rounds` has the rest.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from bench.decode import decode, generate, llama_of_equal_shape, prefill, prompt
from model.progress import Log, Progress, silent
from model.settings import BenchmarkSettings

FULL, LLAMA = "full precision", "Llama of equal shape"


def measure_speed(
    models: Mapping[str, PreTrainedModel], settings: BenchmarkSettings, *, log: Log = silent
) -> dict[str, Any]:
    """All timings of `models`, the first of which is full precision, and of the peers.

    The longest length without a cache is run once, by the first model, because it recomputes everything for every
    token; all else `settings.repeats` times. Returns the keys decode, prefill, batch, peers and latency.
    """
    lengths = sorted(set(settings.generated_tokens))
    longest = lengths[-1]
    common = common_length(settings)
    reference = next(iter(models.values()))
    llama = llama_of_equal_shape(reference.config, reference.device)
    work: list[tuple[tuple[Any, ...], int, Callable[[], float | list[float]]]] = []
    for name, model in models.items():
        work.append((("decode", name, True), longest, _decode(model, longest, True)))
        work.append((("decode", name, False), common, _decode(model, common, False)))
        for tokens in sorted(set(settings.prefill_tokens)):
            work.append((("prefill", name, tokens), tokens // 8, _prefill(model, tokens)))
        for batch in sorted(set(settings.batch_sizes)):
            work.append(
                (("batch", name, batch), settings.batch_tokens, _decode(model, settings.batch_tokens, True, batch))
            )
    work.append((("peers", LLAMA, "the same loop"), common, _decode(llama, common, True)))
    work.append((("peers", LLAMA, "generate()"), common, _generate(llama, common)))
    work.append((("peers", "REX, " + FULL, "generate()"), common, _generate(reference, common)))

    progress = Progress(log, "benchmark", settings.repeats * sum(amount for _, amount, _ in work), "units of work")
    rounds: dict[tuple[Any, ...], list[Any]] = {}
    for model in [*models.values(), llama]:  # packs int8 weights, starts threads
        for use_cache in (True, False):
            decode(model, prompt(model), 2, use_cache=use_cache)
    for number in range(settings.repeats):
        for key, amount, run in work[number % len(work) :] + work[: number % len(work)]:
            rounds.setdefault(key, []).append(run())
            progress.advance(amount)
    name = next(iter(models))
    long_s: list[float] = []
    if longest > common:
        progress = Progress(log, f"decoding {longest:,} tokens without cache", longest * (longest + 1) / 2, "positions")
        _, long_s = decode(reference, prompt(reference), longest, use_cache=False, on_token=progress.advance)
    return _rows(rounds, long_s, lengths, name, settings)


def common_length(settings: BenchmarkSettings) -> int:
    """The generated length at which configurations are compared: the longest but one, or the only one."""
    lengths = sorted(set(settings.generated_tokens))
    return lengths[-2] if len(lengths) > 1 else lengths[0]


def _rows(
    rounds: dict[tuple[Any, ...], list[Any]],
    long_s: list[float],
    lengths: list[int],
    full: str,
    settings: BenchmarkSettings,
) -> dict[str, Any]:
    result: dict[str, Any] = {"decode": [], "prefill": [], "batch": [], "peers": [], "latency": []}
    for (kind, name, detail), values in rounds.items():
        if kind == "decode":
            per_token = [long_s] if detail is False and name == full and long_s else values
            result["latency"].append({"model": name, "cache": detail, "rounds_ms": _milliseconds(per_token)})
            for tokens in lengths:
                seconds = [sum(run[:tokens]) for run in values if len(run) >= tokens]
                if not seconds and name == full and not detail:
                    seconds = [sum(long_s)]
                if seconds:
                    result["decode"].append({"model": name, "cache": detail, **_row(tokens, tokens, seconds)})
        elif kind == "prefill":
            result["prefill"].append({"model": name, **_row(detail, detail, values)})
        elif kind == "batch":
            seconds = [sum(run) for run in values]
            row = _row(settings.batch_tokens, settings.batch_tokens * detail, seconds)
            result["batch"].append({"model": name, "batch_size": detail, **row})
        else:
            seconds = [sum(run) if isinstance(run, list) else run for run in values]
            tokens = common_length(settings)
            result["peers"].append({"model": name, "loop": detail, **_row(tokens, tokens, seconds)})
    return result


def _row(tokens: int, produced: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens per sequence, tokens per second over all sequences, milliseconds per step (or pass, for one token)."""
    median = statistics.median(seconds)
    return {
        "tokens": tokens,
        "tokens_per_second": produced / median,
        "ms_per_token": 1000 * median / tokens,
        "repeats": len(seconds),
        "rounds_s": [round(value, 6) for value in seconds],
    }


def _milliseconds(runs: list[list[float]]) -> list[list[float]]:
    return [[round(1000 * value, 4) for value in run] for run in runs]


def _decode(model: PreTrainedModel, tokens: int, use_cache: bool, batch: int = 1) -> Callable[[], list[float]]:
    return lambda: decode(model, prompt(model, batch=batch), tokens, use_cache=use_cache)[1]


def _prefill(model: PreTrainedModel, tokens: int) -> Callable[[], float]:
    return lambda: prefill(model, prompt(model, tokens))


def _generate(model: PreTrainedModel, tokens: int) -> Callable[[], float]:
    return lambda: generate(model, prompt(model), tokens)
