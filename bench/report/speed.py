"""Timings of the engine that serves, of plain loops over the model and of peers, in interleaved rounds, so that a busy
moment affects all configurations equally.

`engines.py` has the engines; the loops show what the KV cache saves, and prefill. One run to the longest length times
every token; the seconds for a shorter length are the sum of its first tokens, because a shorter run does exactly the
same work. Without a cache a token's work depends only on the number of tokens before it, so a sample of positions is
timed, each representing the block around it: timing all of them would take longer than everything else together
(`bench/decode.py` does that). A report quotes medians; `rounds_s` keeps every round.
"""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bench.decode import decode, generate, llama_of_equal_shape, prefill, prompt
from bench.report.engines import LLAMA_CPP, Work, engine_work, llama_cpp_work
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.progress import Log, Progress, silent
from model.settings import BenchmarkSettings

FULL, LLAMA = "full precision", "Llama of equal shape"


def measure_speed(
    models: Mapping[str, RexForCausalLM],
    settings: BenchmarkSettings,
    checkpoint_dir: Path,
    tokenizer_dir: Path,
    threads: int,
    *,
    log: Log = silent,
) -> dict[str, Any]:
    """All timings of `models`, the first of which is the checkpoint's, and of the peers.

    threads: most that an engine takes; the loops take torch's. Without a cache only the first model goes to the longest
    length. Returns the keys engines, step, llama_cpp_left_out, decode, prefill, batch, peers and latency.
    """
    lengths = sorted(set(settings.generated_tokens))
    longest = lengths[-1]
    common, every = common_length(settings), uncached_every(settings)
    reference = next(iter(models.values()))
    llama = llama_of_equal_shape(reference.config, reference.device)
    work: list[Work] = []
    for name, model in models.items():
        work.append((("decode", name, True), longest, _decode(model, longest)))
        uncached = longest if model is reference else common
        work.append((("decode", name, False), uncached, _recompute(model, uncached, every)))
        for tokens in sorted(set(settings.prefill_tokens)):
            work.append((("prefill", name, tokens), tokens // 8, _prefill(model, tokens)))
    for batch in sorted(set(settings.batch_sizes)):
        work.append((("batch", FULL, batch), settings.batch_tokens, _decode(reference, settings.batch_tokens, batch)))
    work.append((("peers", LLAMA, "the same loop"), common, _decode(llama, common)))
    work.append((("peers", LLAMA, "generate()"), common, _generate(llama, common)))
    work.append((("peers", "REX, " + FULL, "generate()"), common, _generate(reference, common)))

    rounds: dict[tuple[Any, ...], list[Any]] = {}
    loops: list[PreTrainedModel] = [*models.values(), llama]
    for one in loops:  # packs int8 weights, starts threads
        for use_cache in (True, False):
            decode(one, prompt(one), 2, use_cache=use_cache)
    workloads = list(dict.fromkeys([(1, common), *((size, settings.batch_tokens) for size in settings.batch_sizes)]))
    log("benchmark: each engine tries its settings")
    with ExitStack() as stack:
        ours, step = engine_work(stack, models, tokenizer_dir, workloads, threads)
        peers, reason = llama_cpp_work(stack, reference, checkpoint_dir, tokenizer_dir, workloads, threads)
        work = [*ours, *peers, *work]
        progress = Progress(log, "benchmark", settings.repeats * sum(amount for _, amount, _ in work), "units of work")
        for number in range(settings.repeats):
            for key, amount, run in work[number % len(work) :] + work[: number % len(work)]:
                progress.advance(amount)
                if reason and key[1] == LLAMA_CPP:
                    continue
                try:
                    rounds.setdefault(key, []).append(run())
                except PipelineError as error:
                    if key[1] != LLAMA_CPP:
                        raise
                    reason = str(error)  # its process has ended: the report does without it
    if reason:
        rounds = {key: values for key, values in rounds.items() if key[1] != LLAMA_CPP}
    return {"step": step, "llama_cpp_left_out": reason, **_rows(rounds, lengths, every, settings)}


def common_length(settings: BenchmarkSettings) -> int:
    """The generated length at which configurations are compared: the longest but one, or the only one."""
    lengths = sorted(set(settings.generated_tokens))
    return lengths[-2] if len(lengths) > 1 else lengths[0]


def uncached_every(settings: BenchmarkSettings) -> int:
    """Without a cache, one of this many positions is timed: four at the shortest length."""
    return max(1, min(settings.generated_tokens) // 4)


def _middles(tokens: int, every: int) -> list[int]:
    """Number of tokens before the middle of each block of `every` positions."""
    return [min(start + (every + 1) // 2, tokens) for start in range(0, tokens, every)]


def _total(seconds: list[float], tokens: int, every: int) -> float:
    """Seconds of the first `tokens` tokens, each timed position representing its block."""
    starts = range(0, tokens, every)
    return sum(value * (min(start + every, tokens) - start) for start, value in zip(starts, seconds, strict=False))


def _rows(
    rounds: dict[tuple[Any, ...], list[Any]], lengths: list[int], every: int, settings: BenchmarkSettings
) -> dict[str, Any]:
    result: dict[str, Any] = {"engines": [], "decode": [], "prefill": [], "batch": [], "peers": [], "latency": []}
    for (kind, name, detail, *workload), values in rounds.items():
        if kind == "engines":
            streams, tokens = workload
            seconds = [streams * tokens / speed for speed in values]
            row = {"engine": name, "model": detail, "sequences": streams, **_row(tokens, streams * tokens, seconds)}
            result["engines"].append(row)
        elif kind == "decode":
            step = 1 if detail else every
            positions = _middles(lengths[-1], step)[: len(values[0])]
            row = {"model": name, "cache": detail, "positions": positions, "rounds_ms": _milliseconds(values)}
            result["latency"].append(row)
            for tokens in lengths:
                if tokens <= len(values[0]) * step:
                    seconds = [_total(run, tokens, step) for run in values]
                    row = {"model": name, "cache": detail, "timed_every": step, **_row(tokens, tokens, seconds)}
                    result["decode"].append(row)
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


def _decode(model: PreTrainedModel, tokens: int, batch: int = 1) -> Callable[[], list[float]]:
    return lambda: decode(model, prompt(model, batch=batch), tokens, use_cache=True)[1]


def _recompute(model: PreTrainedModel, tokens: int, every: int) -> Callable[[], list[float]]:
    """The same loop without its cache, at the middle of each block."""
    return lambda: [
        decode(model, prompt(model, position), 1, use_cache=False)[1][0] for position in _middles(tokens, every)
    ]


def _prefill(model: PreTrainedModel, tokens: int) -> Callable[[], float]:
    return lambda: prefill(model, prompt(model, tokens))


def _generate(model: PreTrainedModel, tokens: int) -> Callable[[], float]:
    return lambda: generate(model, prompt(model), tokens)
