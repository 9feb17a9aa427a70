"""Runs contenders in interleaved rounds: the pairs compared, medians and ratios."""

import logging
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.engine import llama_cpp, vllm
from bench.engine.llama_cpp import LlamaCpp, LlamaCppFloat32, LlamaCppInt4
from bench.engine.ours import OurEngine, OurEngineInt4, OurEngineInt8, ReferenceEngine
from bench.engine.pytorch import GreedyLoop, PaddedBatch, TransformersContinuousBatching
from bench.engine.vllm import Vllm
from bench.engine.workloads import RAGGED_REQUESTS, RAGGED_STREAMS, Contender, model_of
from model.errors import PipelineError
from model.weights.loading import load_model

KINDS: dict[str, type[Contender]] = {
    "engine float32": OurEngine,
    "engine int8": OurEngineInt8,
    "engine int4": OurEngineInt4,
    "reference float32": ReferenceEngine,
    "greedy loop": GreedyLoop,
    "padded batches": PaddedBatch,
    "transformers' continuous batching": TransformersContinuousBatching,
    "llama.cpp Q8_0": LlamaCpp,
    "llama.cpp F32": LlamaCppFloat32,
    "llama.cpp Q4_0": LlamaCppInt4,
    "vLLM float32": Vllm,
}
Run = tuple[str, str]
"""A contender (a key of KINDS) and a workload."""
WORKLOADS = {
    "one_stream": "one stream at 128",
    "one_long_stream": "one stream at 1,024",
    "eight_streams": "eight streams at 128",
    "one_sampled_stream": "one sampled stream at 128",
    "eight_sampled_streams": "eight sampled streams at 128",
    "ragged_even": "sixteen ragged, even",
    "ragged_long_tailed": "sixteen ragged, long-tailed",
    "prefill": "prefill of 900",
}
_FULL, _INT8, _INT4 = "engine float32", "engine int8", "engine int4"
_SAMPLED = ("one_sampled_stream", "eight_sampled_streams")
_PEER_WORKLOADS = ("one_stream", "one_long_stream", "eight_streams", *_SAMPLED, "ragged_even", "prefill")
_INT8_PAIRS = [((_INT8, name), (_FULL, name)) for name in ("one_stream", "eight_streams", "ragged_even")]
PAIRS: dict[str, list[tuple[Run, Run]]] = {
    "transformers": [
        ((_FULL, "one_stream"), ("greedy loop", "one_stream")),
        ((_FULL, "eight_streams"), (_FULL, "one_stream")),
        ((_FULL, "one_sampled_stream"), (_FULL, "one_stream")),
        ((_FULL, "eight_sampled_streams"), (_FULL, "eight_streams")),
        ((_FULL, "ragged_long_tailed"), ("transformers' continuous batching", "ragged_long_tailed")),
        ((_FULL, "ragged_long_tailed"), ("padded batches", "ragged_long_tailed")),
        ((_FULL, "ragged_even"), ("transformers' continuous batching", "ragged_even")),
        ((_FULL, "ragged_even"), ("padded batches", "ragged_even")),
        *_INT8_PAIRS,
    ],
    "reference": [((_FULL, name), ("reference float32", name)) for name in ("one_stream", "eight_streams")],
    "llama.cpp": [
        *(((_INT8, name), ("llama.cpp Q8_0", name)) for name in _PEER_WORKLOADS),
        *(((_FULL, name), ("llama.cpp F32", name)) for name in _PEER_WORKLOADS),
        *(((_INT4, name), ("llama.cpp Q4_0", name)) for name in _PEER_WORKLOADS),
        *_INT8_PAIRS,
    ],
    "vllm": [((_FULL, name), ("vLLM float32", name)) for name in _PEER_WORKLOADS],
}
"""Which runs are compared, by opponent."""

_contender: Contender


def _set_up(kind: str, model: Path | str, threads: int) -> None:
    """Create the contender, once, in its process."""
    global _contender  # kept by the pool's process between tasks
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _contender = KINDS[kind](load_model(model) if isinstance(model, Path) else model_of(model))


def _run(workload: str, requests: int = RAGGED_REQUESTS) -> float:
    _contender.requests = requests
    speed: float = getattr(_contender, workload)()
    return speed


def _note() -> str:
    """How this process's contender computes, if it has a choice."""
    if isinstance(_contender, OurEngine):
        return f"step {_contender.name}"
    if isinstance(_contender, LlamaCpp):
        best = "; ".join(f"{work}: {setting}" for work, setting in _contender.best.items())
        return f"{llama_cpp.describe()}; {best}"
    return ""


def measure(
    model: Path | str,
    pairs: list[tuple[Run, Run]],
    rounds: int,
    threads: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Tokens per second of every run in every round, and the ratios of each round's pairs, by name."""
    runs = list(dict.fromkeys(run for pair in pairs for run in pair))
    speeds: dict[Run, list[float]] = {run: [] for run in runs}
    fresh = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {
            kind: stack.enter_context(ProcessPoolExecutor(1, fresh, _set_up, (kind, model, threads)))
            for kind in dict.fromkeys(kind for kind, _ in runs)
        }
        for number in range(rounds + 1):
            for kind, workload in runs:
                if not number:
                    processes[kind].submit(_run, workload, RAGGED_STREAMS).result()  # warms up
                else:
                    speeds[kind, workload].append(processes[kind].submit(_run, workload).result())
            log(f"round {number} of {rounds}: " + ", ".join(f"{_name(r)} {s[-1]:.0f}" for r, s in speeds.items() if s))
        notes = {kind: note for kind in processes if (note := processes[kind].submit(_note).result())}
    ratios = {
        f"{_name(a)} / {_name(b) if a[1] != b[1] else b[0]}": sorted(
            x / y for x, y in zip(speeds[a], speeds[b], strict=True)
        )
        for a, b in pairs
    }
    return {
        "notes": notes,
        "tokens_per_second": {_name(run): statistics.median(found) for run, found in speeds.items()},
        "ratios": {name: statistics.median(found) for name, found in ratios.items()},
        "ratio_ranges": {name: (found[0], found[-1]) for name, found in ratios.items()},
    }


def _name(run: Run) -> str:
    return f"{run[0]}, {WORKLOADS[run[1]]}"


def choose_pairs(
    against: list[str] | None, precision: str | None, workloads: list[str] | None
) -> list[tuple[Run, Run]]:
    """The requested pairs of PAIRS; None selects all that are installed, except the reference step."""
    if against is None:
        peers = {"llama.cpp": llama_cpp.installed(), "vllm": vllm.installed()}
        against = ["transformers", *(name for name, is_here in peers.items() if is_here)]
    if "llama.cpp" in against and not llama_cpp.installed():
        raise PipelineError("llama.cpp is not installed: run pip install llama-cpp-python, which needs a C++ compiler")
    if "vllm" in against and not vllm.installed():
        raise PipelineError(f"vLLM is not installed: {vllm.PYTHON} is missing; run make vllm, or set VLLM_PYTHON")
    pairs = list(dict.fromkeys(pair for name in against for pair in PAIRS[name]))
    if workloads:
        pairs = [(a, b) for a, b in pairs if a[1] in workloads and b[1] in workloads]
    if precision:
        pairs = [
            (a, b) for a, b in pairs if a[0] == f"engine {precision}" and (b[0] != _FULL or precision == "float32")
        ]
    if not pairs:
        raise PipelineError("nothing to compare: name other workloads or opponents")
    return pairs
