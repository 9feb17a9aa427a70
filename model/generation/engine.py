"""The generation engine: requests enter a bounded queue, one thread answers them, events leave as they come.

It runs one request after another: prefill in one pass, then a token at a time over a KV cache. `generate()` of
transformers is the reference, which greedy decoding matches token for token. What a request needs besides the model
(sampler, detokenizer, cache) belongs to that request alone, and one that fails fails alone.
Routes and limits on requests are not here but in `bento/`.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Generator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from model.errors import PipelineError
from model.generation.detokenizer import Detokenizer
from model.generation.requests import (
    Deliver,
    EngineBusy,
    EngineStopped,
    FinishReason,
    Generation,
    GenerationRequest,
    SamplingParameters,
    TextPiece,
)
from model.generation.sampler import Sampler
from model.text.tokenizer import FastEncoder, token_bytes

logger = logging.getLogger("bentoml.engine")  # the name decides that the server's log shows it
LONGEST_RETRY_S = 60


class Engine:
    """Generates text with one model in one thread; every method is safe to call from any thread.

    kv_cache: False computes all earlier tokens again for each new one, for comparison.
    max_queue: requests that may wait besides the one that runs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, kv_cache: bool = True, max_queue: int = 64
    ) -> None:
        self._model, self._kv_cache, self._max_queue = model, kv_cache, max_queue
        self.vocab_size: int = model.config.vocab_size
        self.context_length: int = model.config.max_position_embeddings
        """Most tokens of prompt and answer together."""
        self.end_of_text_ids = _end_of_text_ids(model, tokenizer)
        self._token_bytes = token_bytes(tokenizer)
        self._encoder = FastEncoder(tokenizer)
        self._waiting: deque[Generation] = deque()
        self._running: Generation | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._has_answered = False
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="generation-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._stopping

    @property
    def is_ready(self) -> bool:
        """Whether the model has generated a token and can generate more."""
        return self._has_answered and self.is_alive

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that generate now, 0 or 1."""
        return int(self._running is not None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens written out in it are ordinary text. Long texts take seconds."""
        ids: list[int] = self._encoder.encode(text).tolist()
        return ids

    def submit(self, request: GenerationRequest, deliver: Deliver | None = None) -> Generation:
        """Queue a request. Its events go to `deliver`, in the engine's thread, or else to whoever iterates.

        Raises PipelineError for a request that can never run, EngineBusy where the queue is full, EngineStopped.
        """
        self._check(request)
        generation = Generation(request, deliver)
        with self._changed:
            if not self.is_alive:
                raise EngineStopped
            if len(self._waiting) >= self._max_queue:
                self._drop_interrupted()
            if len(self._waiting) >= self._max_queue:
                raise EngineBusy(min(LONGEST_RETRY_S, math.ceil(self._mean_seconds)))
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def warm_up(self) -> None:
        """Generate one token, so that the first request finds everything allocated. Raises PipelineError if it fails."""
        start = min(self.end_of_text_ids, default=0)
        *_, last = self.submit(GenerationRequest([start], 1, SamplingParameters(temperature=0)))
        if last.finish_reason not in ("stop", "length"):  # type: ignore[union-attr]
            raise PipelineError(f"the model cannot generate a token ({last}): see the log; materialize the model again")

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the token it is at; what runs or waits finishes as cancelled."""
        with self._changed:
            self._stopping = True
            for generation in [*self._waiting, *([self._running] if self._running else [])]:
                generation.cancel()
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _check(self, request: GenerationRequest) -> None:
        prompt, wanted = len(request.prompt_ids), request.max_tokens
        if not prompt:
            raise PipelineError("the prompt has no tokens: expected at least one")
        if wanted < 1:
            raise PipelineError(f"max_tokens is {wanted}: expected 1 or more")
        if prompt + wanted > self.context_length:
            raise PipelineError(
                f"the prompt has {prompt:,} tokens and max_tokens is {wanted:,}: together at most "
                f"{self.context_length:,} fit into the model's context"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab_size:
            raise PipelineError(f"the prompt has token ids outside 0 to {self.vocab_size - 1}")

    def _run(self) -> None:
        try:
            while (generation := self._next()) is not None:
                self._answer(generation)
        except BaseException:
            logger.exception("the engine's thread died")
            raise
        finally:
            with self._changed:
                self._stopping = True
                unanswered = [*self._waiting, *([self._running] if self._running else [])]
                self._waiting.clear()
                self._running = None
            for generation in unanswered:
                generation.finish(generation.interruption() or "error")

    def _next(self) -> Generation | None:
        """The next request, None when the engine stops; waits for one."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, generation: Generation) -> None:
        started = time.monotonic()
        reason: FinishReason = "error"
        try:
            with torch.inference_mode():
                reason = self._generate(generation)
            self._has_answered = self._has_answered or generation.generated_tokens > 0
            self._mean_seconds += 0.2 * (time.monotonic() - started - self._mean_seconds)
        except Exception:
            logger.exception("a request failed; the others go on")
        self._running = None
        generation.finish(reason)

    def _generate(self, generation: Generation) -> FinishReason:
        request = generation.request
        if interruption := generation.interruption():
            return interruption
        sampler = Sampler(request.sampling, request.prompt_ids, self.vocab_size, self._model.device)
        text = Detokenizer(self._token_bytes)
        next_logits = self._logits(list(request.prompt_ids))
        logits_V = next(next_logits)
        reason: FinishReason = "length"
        while True:
            token = sampler.next(logits_V)
            generation.generated_tokens += 1
            if token in self.end_of_text_ids:
                reason = "stop"
                break
            generation.emit(TextPiece(text.push(token), (token,)))
            if generation.generated_tokens >= request.max_tokens:
                break
            self._answer_interrupted()
            if interruption := generation.interruption():
                return interruption
            logits_V = next_logits.send(token)
        if rest := text.flush():
            generation.emit(TextPiece(rest, ()))
        return reason

    def _logits(self, ids: list[int]) -> Generator[Tensor, int, None]:
        """Logits (V,) after `ids`, then after each token that is sent."""
        device = self._model.device
        if not self._kv_cache:
            while True:
                ids_BT = torch.tensor([ids], device=device)
                ids.append((yield self._model(ids_BT, use_cache=False, logits_to_keep=1).logits[0, -1]))
        cache = DynamicCache(config=self._model.config)
        while True:
            ids_BT = torch.tensor([ids], device=device)
            output = self._model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = [(yield output.logits[0, -1])]

    def _answer_interrupted(self) -> None:
        """Finish requests that were cancelled or timed out while they waited, without waiting for their turn."""
        if self._waiting:
            with self._changed:
                self._drop_interrupted()

    def _drop_interrupted(self) -> None:
        for generation in [g for g in self._waiting if g.interruption()]:
            self._waiting.remove(generation)
            generation.finish(generation.interruption() or "cancelled")


def _end_of_text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)
