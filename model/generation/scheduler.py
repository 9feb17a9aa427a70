"""Continuous batching: which tokens the next pass of the model computes, and what becomes of its logits.

In each step every running request decodes one token, and tokens of new prompts fill the pass up to `prefill_chunk`, so a
long prompt delays the others by one chunk at most. Requests join and leave at every step. One that fails fails alone.
Everything here runs in one thread; queueing, threads and restarts are `engine.py`.
"""

import logging
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.generation.cache import SHORTEST_REUSE
from model.generation.detokenizer import Detokenizer
from model.generation.forward import Piece, RaggedForward
from model.generation.queue import RequestQueue
from model.generation.requests import FinishReason, Generation, PromptScores, TextPiece, TokenLogprob
from model.generation.sampler import Sampler, token_logprobs
from model.generation.stopping import StopStrings

logger = logging.getLogger("bentoml.engine")  # the name decides that the server's log shows it
FAILED = "generating failed: the server's log has the reason"


class Running:
    """A request that has a slot."""

    def __init__(
        self, generation: Generation, slot: int, cached: int, *, token_bytes: Sequence[bytes], sampler: Sampler
    ) -> None:
        request = generation.request
        self.generation, self.request, self.slot = generation, request, slot
        self.ids = np.empty(len(request.prompt_ids) + request.max_tokens, dtype=np.int64)
        self.ids[: len(request.prompt_ids)] = request.prompt_ids
        self.known = len(request.prompt_ids)
        """Tokens of `ids` that are set: the prompt's, then those generated."""
        self.computed = cached
        """Tokens whose keys and values are in the cache."""
        self.sampler = sampler
        self.prompt_scores: list[TokenLogprob | None] = [None]
        self.text = Detokenizer(token_bytes)
        self.stops = StopStrings(request.stop)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be computed."""
        return self.computed < len(self.request.prompt_ids)

    def piece(self, most: int) -> Piece:
        """The next tokens to compute, `most` at most."""
        end = min(self.known, self.computed + most)
        wants_all = self.request.prompt_logprobs is not None and self.is_prefilling
        kept = "all" if wants_all else "last" if end == self.known else "none"
        return Piece(self.slot, self.computed, self.ids[self.computed : end], kept)  # type: ignore[arg-type]


class Scheduler:
    """Answers the requests of a queue, a step at a time.

    end_of_text_ids: tokens that end a text. kv_cache: False computes all earlier tokens again in each step.
    """

    def __init__(
        self,
        forward: RaggedForward,
        queue: RequestQueue,
        *,
        token_bytes: Sequence[bytes],
        end_of_text_ids: frozenset[int],
        prefill_chunk: int,
        kv_cache: bool,
    ) -> None:
        self._forward, self._cache, self._queue = forward, forward.cache, queue
        self._token_bytes, self._end_of_text_ids = token_bytes, end_of_text_ids
        self._prefill_chunk, self._kv_cache = prefill_chunk, kv_cache
        self._free = list(range(self._cache.slots))
        self.running: list[Running] = []
        """In the order in which they got their slots."""
        self.request_seconds = 1.0
        """A request's time in a slot, averaged over those that left last."""
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.cancelled = self.answered = 0

    @property
    def free_slots(self) -> int:
        """Requests that could start now."""
        return len(self._free)

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values running requests hold."""
        return sum(running.computed for running in list(self.running))

    def probe(self) -> None:
        """One pass over one token in a free slot: raises what the model raises."""
        slot = self._free[0]
        self._cache.truncate(slot, 0)
        (logits_RV,) = self._forward([Piece(slot, 0, np.zeros(1, dtype=np.int64))])
        if not bool(torch.isfinite(logits_RV).all()):
            raise ValueError("the model's logits are not numbers: its weights are broken")

    def step(self) -> bool:
        """Compute and hand over the next tokens of all running requests; False where there is nothing to do."""
        self.cancelled += self._queue.finish_interrupted()
        for running in [r for r in self.running if r.generation.interruption()]:
            self.cancelled += 1
            self._leave(running, running.generation.interruption() or "cancelled")
        batch = self._next_batch()
        if not batch:
            return False
        pieces = [piece for _, piece in batch]
        try:
            parts = self._forward(pieces)
        except Exception:
            logger.exception("a pass over %d requests failed: each is tried alone", len(batch))
            self._step_alone(batch)
            return True
        for running, piece in batch:
            self._advance(running, piece)
        self._choose([(r, p, logits_RV) for (r, p), logits_RV in zip(batch, parts, strict=True) if len(logits_RV)])
        return True

    def _next_batch(self) -> list[tuple[Running, Piece]]:
        if not self._kv_cache:
            for running in self.running:
                running.computed = 0
                self._cache.truncate(running.slot, 0)
        batch = [(r, r.piece(r.known)) for r in self.running if not self._is_chunked(r)]
        # A round number of tokens in all: layers compute rows in blocks and would fill up the last one with nothing.
        # However many decode, a quarter is left for prompts, so that these get done.
        left = max(self._prefill_chunk - len(batch), math.ceil(self._prefill_chunk / 4))
        for running in [r for r in self.running if self._is_chunked(r)]:
            if left > 0:
                piece = running.piece(left)
                batch.append((running, piece))
                left -= len(piece.ids)
        while left > 0 and (started := self._start_next()):
            piece = started.piece(left)
            batch.append((started, piece))
            left -= len(piece.ids)
        return batch

    def _is_chunked(self, running: Running) -> bool:
        # Without a cache the prompt is computed with every token: there is nothing to continue a chunk from.
        return running.is_prefilling and self._kv_cache

    def _start_next(self) -> Running | None:
        """Give a free slot to the request that is next; None where none can start in this step."""
        generation = self._queue.first()
        if generation is None or not self._free:
            return None
        prompt_ids = np.array(generation.request.prompt_ids, dtype=np.int64)
        if self._should_wait(prompt_ids):
            return None
        self._queue.remove(generation)
        reuse = self._kv_cache and generation.request.prompt_logprobs is None
        slot, cached = self._cache.take(self._free, prompt_ids, reuse=reuse)
        model = self._forward.model
        sampler = Sampler(generation.request.sampling, prompt_ids.tolist(), model.config.vocab_size, model.device)
        running = Running(generation, slot, cached, token_bytes=self._token_bytes, sampler=sampler)
        self._free.remove(slot)
        self.running.append(running)
        generation.start(cached)
        self.prompt_tokens += len(prompt_ids)
        self.cached_tokens += cached
        return running

    def _should_wait(self, prompt_ids: np.ndarray) -> bool:
        """Whether a prompt now being computed will soon leave a longer beginning of this one in the cache."""
        held = self._cache.longest_shared(prompt_ids)
        for running in self.running:
            if running.is_prefilling and self._kv_cache:
                most = min(len(prompt_ids) - 1, len(running.request.prompt_ids))
                differs = running.ids[:most] != prompt_ids[:most]
                if (int(differs.argmax()) if differs.any() else most) >= held + SHORTEST_REUSE:
                    return True
        return False

    def _advance(self, running: Running, piece: Piece) -> None:
        running.computed += len(piece.ids)
        self._cache.append(running.slot, piece.ids)

    def _step_alone(self, batch: list[tuple[Running, Piece]]) -> None:
        """Compute each piece by itself, so that only the requests that fail end. Raises where nothing works any more."""
        for running, piece in batch:
            try:
                (logits_RV,) = self._forward([piece])
            except Exception:
                logger.exception("a request failed; the others go on")
                self._leave(running, "error", error=FAILED)
                self.probe()
            else:
                self._advance(running, piece)
                if len(logits_RV):
                    self._choose([(running, piece, logits_RV)])

    def _choose(self, batch: list[tuple[Running, Piece, Tensor]]) -> None:
        """Choose the next token of each request whose logits (R, V) are here, and hand it over."""
        if not batch:
            return
        last_RV = torch.cat([logits_RV[-1:] for _, _, logits_RV in batch])
        highest, best = (values.tolist() for values in last_RV.max(dim=-1))
        for row, (running, piece, logits_RV) in enumerate(batch):
            try:
                if running.request.prompt_logprobs is not None and not running.generation.generated_tokens:
                    self._score_prompt(running, piece, logits_RV)
                if running.computed < running.known:
                    continue
                # Most requests are greedy, and one call for all of them is what that costs.
                is_easy = running.sampler.is_plain_greedy and not self._forbidden(running)
                token = best[row] if is_easy and math.isfinite(highest[row]) else None
                self._take_token(running, last_RV, row, token)
            except Exception:
                logger.exception("a request failed; the others go on")
                self._leave(running, "error", error=FAILED)

    def _score_prompt(self, running: Running, piece: Piece, logits_RV: Tensor) -> None:
        request = running.request
        following = [int(token) for token in running.ids[piece.start + 1 : piece.start + 1 + len(piece.ids)]]
        following = following[: len(request.prompt_ids) - piece.start - 1]
        if following:
            running.prompt_scores += token_logprobs(
                logits_RV[: len(following)], following, request.prompt_logprobs or 0
            )
        if not running.is_prefilling:
            running.generation.emit(PromptScores(tuple(running.prompt_scores)))

    def _take_token(self, running: Running, last_RV: Tensor, row: int, token: int | None) -> None:
        """Append a token (the sampler's where None is given) and hand over the text that is certain now."""
        request, generation = running.request, running.generation
        if request.max_tokens == 0:
            self._leave(running, "length")
            return
        if token is None:
            token = running.sampler.next(last_RV[row], self._forbidden(running))
        running.ids[running.known] = token
        running.known += 1
        generation.generated_tokens += 1
        self.generated_tokens += 1
        self.answered += 1
        is_end = token in self._end_of_text_ids and not request.ignore_eos
        if is_end or token in request.stop_token_ids:
            self._end_text(running, "stop", stopped_by=None if is_end else token)
            return
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            logprobs = tuple(token_logprobs(last_RV[row : row + 1], [token], request.logprobs))
        may_stop = generation.generated_tokens >= request.min_tokens
        text, stop = running.stops.push(running.text.push(token), may_stop=may_stop)
        generation.emit(TextPiece(text, (token,), logprobs))
        if stop is not None:
            self._leave(running, "stop", stopped_by=stop)
        elif generation.generated_tokens >= request.max_tokens:
            self._end_text(running, "length")

    def _forbidden(self, running: Running) -> list[int]:
        """Tokens that would end the text too early."""
        request = running.request
        if running.generation.generated_tokens >= request.min_tokens:
            return []
        return [*request.stop_token_ids, *(() if request.ignore_eos else self._end_of_text_ids)]

    def _end_text(self, running: Running, reason: FinishReason, *, stopped_by: int | None = None) -> None:
        """Hand over what was held back, then finish. An unfinished character's bytes are U+FFFD."""
        rest, stop = running.stops.push(running.text.flush())
        if stop is None:
            rest += running.stops.flush()
        if rest:
            running.generation.emit(TextPiece(rest, ()))
        if stop is None:
            self._leave(running, reason, stopped_by=stopped_by)
        else:
            self._leave(running, "stop", stopped_by=stop)

    def _leave(
        self,
        running: Running,
        reason: FinishReason,
        *,
        stopped_by: str | int | None = None,
        error: str | None = None,
    ) -> None:
        self.running.remove(running)
        self._free.append(running.slot)
        if reason == "error":
            self._cache.clear(running.slot)
        self._cache.touch(running.slot)
        held_s = time.monotonic() - (running.generation.started_at or 0.0)
        self.request_seconds += 0.2 * (held_s - self.request_seconds)
        running.generation.finish(reason, stopped_by=stopped_by, error=error)
