"""The engine of this project, and generation by transformers: a plain loop, padded batches, continuous batching."""

import statistics
import threading
import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.decode import decode
from bench.engine.workloads import RAGGED_STREAMS, SAMPLED, Contender, small_tokenizer
from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.requests import Event, GenerationRequest, SamplingParameters, TextPiece
from model.modeling_rex import RexForCausalLM
from model.system.cpu import decoding_threads
from model.weights import int4, int8
from model.weights.int8 import count_parameters

GREEDY = SamplingParameters(temperature=0)


def answer_times(
    engine: Engine, prompts: list[list[int]], answer_tokens: list[int], sampling: SamplingParameters
) -> tuple[list[float], list[float], float]:
    """Arrival times of each request's first and last token, and the time of sending, seconds of one clock."""
    requests = [
        GenerationRequest(prompt, count, sampling) for prompt, count in zip(prompts, answer_tokens, strict=True)
    ]
    first, last, open_requests = [0.0] * len(requests), [0.0] * len(requests), set(range(len(requests)))
    is_done = threading.Event()

    def deliver(number: int, event: Event) -> None:
        if isinstance(event, TextPiece):
            last[number] = time.perf_counter()
            first[number] = first[number] or last[number]
            return
        open_requests.remove(number)
        if not open_requests:
            is_done.set()

    started = time.perf_counter()
    engine.submit_all(requests, deliver)
    is_done.wait()
    return first, last, started


class OurEngine(Contender):
    """`model.generation` with its default step and as many threads as the service uses."""

    step = "auto"

    def __init__(self, model: RexForCausalLM) -> None:
        super().__init__(model)
        threads = torch.get_num_threads()
        torch.set_num_threads(decoding_threads(count_parameters(model), threads))
        self._engine = Engine(
            model,
            small_tokenizer(),
            end_of_text_ids=frozenset(),
            max_batch_size=RAGGED_STREAMS,
            max_queue=64,
            step=self.step,
            threads=threads,
            speculative_tokens=0,  # random weights repeat themselves: the others would compute each token, this one not
        )
        self.name = self._engine.step_name

    def prefill(self) -> float:
        """Tokens of a prompt of 900 over the time to its answer's first token."""
        first, _, started = self._run([900], [1])
        return 900 / (first[0] - started)

    def _decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
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


class GreedyLoop(Contender):
    """A plain loop over transformers' DynamicCache."""

    def _decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        ids = torch.tensor(self._prompts([prompt_tokens] * streams))
        _, seconds = decode(self._model, ids, answer_tokens, use_cache=True)
        return streams * (answer_tokens - 1) / sum(seconds[1:])


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
