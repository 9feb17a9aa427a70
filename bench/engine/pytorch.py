"""Generation by transformers: a plain loop, padded batches, continuous batching."""

import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.decode import decode
from bench.engine.workloads import RAGGED_STREAMS, Contender
from model.errors import PipelineError


class GreedyLoop(Contender):
    """A plain loop over transformers' DynamicCache."""

    def decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Equal streams."""
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
