"""What a report times of engines: the one that serves, for each model, and llama.cpp where it is installed.

The engine generates as the service does, but for proposed tokens: those depend on the text, and a peer would compute
each token. Each engine runs its workloads once before they are timed, because it tries its settings on them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench.engine.ours import OurEngine
from bench.report.llama_cpp import KINDS, MOST_STREAMS, LlamaCppProcess, reason_to_leave_out
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.text.tokenizer import load_tokenizer

ENGINE, LLAMA_CPP = "engine", "llama.cpp"
Work = tuple[tuple[Any, ...], int, Callable[[], Any]]
"""What is timed, its amount of work, and the function that does it."""
Workload = tuple[int, int]
"""Streams, and tokens of each."""


def engine_work(
    stack: ExitStack,
    models: Mapping[str, RexForCausalLM],
    tokenizer_dir: Path,
    workloads: Sequence[Workload],
    threads: int,
) -> tuple[list[Work], str]:
    """The work of the engine that serves, and the name of its step. It ends with `stack`. threads: most of them."""
    tokenizer = load_tokenizer(tokenizer_dir)
    work: list[Work] = []
    steps, streams = [], max(streams for streams, _ in workloads)
    for weights, model in models.items():
        engine = OurEngine(model, tokenizer, streams=streams, threads=threads)
        stack.callback(engine.close)
        steps.append(engine.name)
        work += _work(ENGINE, weights, engine.from_one_token, workloads)
    return work, " and ".join(dict.fromkeys(steps))


def llama_cpp_work(
    stack: ExitStack,
    model: RexForCausalLM,
    model_dir: Path,
    tokenizer_dir: Path,
    workloads: Sequence[Workload],
    threads: int,
) -> tuple[list[Work], str]:
    """The work of llama.cpp, and why it is left out, in one line, empty if it is not. It ends with `stack`."""
    reason = reason_to_leave_out(model, load_tokenizer(tokenizer_dir))
    if max(streams for streams, _ in workloads) > MOST_STREAMS:
        reason = f"takes at most {MOST_STREAMS} sequences at once"
    if reason:
        return [], reason
    process = stack.enter_context(LlamaCppProcess.running(model_dir, tokenizer_dir, threads))
    work: list[Work] = []
    try:
        for kind in KINDS:
            work += _work(LLAMA_CPP, kind, partial(process.decode, kind), workloads)
    except PipelineError as error:
        return [], str(error)
    return work, ""


def _work(engine: str, weights: str, decode: Callable[[int, int], float], workloads: Sequence[Workload]) -> list[Work]:
    """Each workload as it is timed, after a first run. decode: streams and tokens to tokens per second."""
    for streams, tokens in workloads:
        decode(streams, tokens)
    return [
        (("engines", engine, weights, streams, tokens), tokens, partial(decode, streams, tokens))
        for streams, tokens in workloads
    ]
