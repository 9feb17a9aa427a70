"""The engine of this project as a contender, by precision and step."""

import statistics
import threading
import time

import torch
from transformers import PreTrainedTokenizerFast

from bench.engine.workloads import RAGGED_STREAMS, SAMPLED, Contender, small_tokenizer
from model.generation.engine import Engine
from model.generation.requests import Event, GenerationRequest, SamplingParameters, TextPiece
from model.modeling_rex import RexForCausalLM
from model.system.cpu import decoding_threads
from model.weights import int4, int8
from model.weights.int8 import count_parameters

GREEDY = SamplingParameters(temperature=0)


def arrival_times(
    engine: Engine, prompts: list[list[int]], answer_tokens: list[int], sampling: SamplingParameters
) -> tuple[list[list[tuple[float, int]]], float]:
    """When how many tokens of each request arrived, and the time of sending, seconds of one clock."""
    requests = [
        GenerationRequest(prompt, count, sampling) for prompt, count in zip(prompts, answer_tokens, strict=True)
    ]
    arrivals: list[list[tuple[float, int]]] = [[] for _ in requests]
    open_requests = set(range(len(requests)))
    is_done = threading.Event()

    def deliver(number: int, event: Event) -> None:
        if isinstance(event, TextPiece):
            arrivals[number].append((time.perf_counter(), len(event.token_ids)))
            return
        open_requests.remove(number)
        if not open_requests:
            is_done.set()

    started = time.perf_counter()
    engine.submit_all(requests, deliver)
    is_done.wait()
    return arrivals, started


def answer_times(
    engine: Engine, prompts: list[list[int]], answer_tokens: list[int], sampling: SamplingParameters
) -> tuple[list[float], list[float], float]:
    """Arrival times of each request's first and last token, and the time of sending, seconds of one clock."""
    arrivals, started = arrival_times(engine, prompts, answer_tokens, sampling)
    return [of_one[0][0] for of_one in arrivals], [of_one[-1][0] for of_one in arrivals], started


class OurEngine(Contender):
    """`model.generation` with its default step and as many threads as the service uses.

    tokenizer: None takes a small one. streams: most at once. threads: at most; None takes torch's, which is
    then set to that of one text.
    """

    step = "auto"

    def __init__(
        self,
        model: RexForCausalLM,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        streams: int = RAGGED_STREAMS,
        threads: int | None = None,
    ) -> None:
        super().__init__(model)
        if threads is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(decoding_threads(count_parameters(model), threads))
        self._engine = Engine(
            model,
            tokenizer or small_tokenizer(),
            end_of_text_ids=frozenset(),
            max_batch_size=streams,
            max_queue=max(64, streams),
            step=self.step,
            threads=threads,
            speculative_tokens=0,  # random weights repeat themselves: the others would compute each token, this one not
        )
        self.name = self._engine.step_name

    def close(self) -> None:
        """End the engine."""
        self._engine.stop()

    def prefill(self) -> float:
        """Tokens of a prompt of 900 over the time to its answer's first token."""
        first, _, started = self._run([900], [1])
        return 900 / (first[0] - started)

    def decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Equal streams."""
        first, last, _ = self._run([prompt_tokens] * streams, [answer_tokens] * streams)
        return streams * (answer_tokens - 1) / statistics.mean(b - a for a, b in zip(first, last, strict=True))

    def _ragged(self, answer_tokens: list[int]) -> float:
        _, last, started = self._run(self._prompt_tokens[: len(answer_tokens)], answer_tokens)
        return sum(answer_tokens) / (max(last) - started)

    def _run(self, prompt_tokens: list[int], answer_tokens: list[int]) -> tuple[list[float], list[float], float]:
        """As `answer_times`."""
        sampling = SAMPLED if self._is_sampled else GREEDY
        return answer_times(self._engine, self._prompts(prompt_tokens), answer_tokens, sampling)


class OurEngineInt8(OurEngine):
    """The same with int8 weights."""

    def __init__(self, model: RexForCausalLM) -> None:
        super().__init__(int8.quantize(model))


class OurEngineInt4(OurEngine):
    """The same with int4 weights."""

    def __init__(self, model: RexForCausalLM) -> None:
        super().__init__(int4.quantize(model))


class ReferenceEngine(OurEngine):
    """The engine with the PyTorch step."""

    step = "reference"
