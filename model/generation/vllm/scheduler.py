"""Passes requests on to vLLM, which batches and samples, and turns its tokens into the engine's events.

Queueing among clients, deadlines, stop strings, text and constraints are as in `model/generation/scheduler.py`, whose
place it takes in the engine. vLLM ends a text at a stop token, at min_tokens and at max_tokens; that of a constrained
request it ends at max_tokens only, as its form decides where it may end.
"""

import base64
import collections.abc
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from model.generation.constraints import Constraint, TokenIndex, is_constrained
from model.generation.grammar.grammar import GrammarFailure
from model.generation.pace import Pace
from model.generation.queue import RequestQueue, unreserved
from model.generation.requests import FinishReason, Generation, PromptScores, Refusal, TextPiece, TokenLogprob
from model.generation.scheduler import FAILED
from model.generation.stopping import GeneratedText
from model.generation.vllm.process import VllmProcess

logger = logging.getLogger(__name__)


class Running:
    """A request that vLLM computes, and its text so far."""

    def __init__(
        self,
        generation: Generation,
        number: str,
        token_bytes: collections.abc.Sequence[bytes],
        constraint: Constraint | None,
    ) -> None:
        request = generation.request
        self.generation, self.request, self.number = generation, request, number
        self.text = GeneratedText(request, token_bytes)
        self.constraint = constraint
        self.mask_V: npt.NDArray[np.bool_] | None = None
        """Tokens that may come next, until vLLM has been told."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt_ids) + self.generation.generated_tokens


class VllmScheduler:
    """Serves the requests of a queue, at most `slots` at once, step by step. See `Scheduler` for the attributes."""

    def __init__(
        self,
        process: VllmProcess,
        queue: RequestQueue,
        *,
        slots: int,
        vocab_size: int,
        token_bytes: collections.abc.Sequence[bytes],
        end_of_text_ids: frozenset[int],
    ) -> None:
        self._process, self._queue, self._slots, self._vocab_size = process, queue, slots, vocab_size
        self._token_bytes, self._end_of_text_ids = token_bytes, end_of_text_ids
        self._token_index: TokenIndex | None = None
        self._started = 0
        self._left: list[str] = []
        """Requests that ended here before they did in vLLM."""
        self.running: list[Running] = []
        self.pace = Pace()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.cancelled = self.answered = 0
        self.proposed_tokens = self.accepted_tokens = 0

    @property
    def free_slots(self) -> int:
        """Requests that could start now."""
        return max(self._slots - len(self.running), 0)

    @property
    def cache_tokens(self) -> int:
        """Tokens of running requests in the KV cache."""
        return sum(one.num_tokens for one in list(self.running))

    @property
    def cache_bytes(self) -> int:
        """Memory that vLLM holds for keys and values, all of it from the start."""
        return self._process.cache_tokens * self._process.bytes_per_token

    def probe(self) -> None:
        """Start the process again after a failure."""
        self._process.start()

    def step(self) -> bool:
        """Compute and deliver the next tokens of all running requests; False if none runs."""
        self.cancelled += self._queue.finish_interrupted()
        for one in [one for one in self.running if one.generation.interruption()]:
            self.cancelled += 1
            self._leave(one, one.generation.interruption() or "cancelled", is_left=True)
        started = {one.number: _asked(one.request, self._end_of_text_ids) for one in self._start()}
        masks = {one.number: packed(one.mask_V) for one in self.running if one.mask_V is not None}
        abort, self._left = self._left, []
        if not self.running and not abort:
            return False
        answer = self._process.exchange(started, abort, masks)
        for one in list(self.running):
            one.mask_V = None
            if one.number in answer["refused"]:
                self._refuse(one, **answer["refused"][one.number])
            elif one.number in answer["outputs"]:
                self._for_one(one, self._process_output, answer["outputs"][one.number])
        return bool(self.running)

    def _start(self) -> list[Running]:
        """The requests that join this step."""
        started = []
        while self.free_slots:
            generation = self._queue.first(unreserved(self._slots, (one.generation for one in self.running)))
            if generation is None:
                break
            self._queue.remove(generation)
            self._started += 1
            request = generation.request
            one = Running(generation, str(self._started), self._token_bytes, self._constraint(request))
            self.running.append(one)
            generation.start(0)
            self.prompt_tokens += len(request.prompt_ids)
            self._for_one(one, self._allow_next)
            if one in self.running:
                started.append(one)
        return started

    def _constraint(self, request: Any) -> Constraint | None:
        if not is_constrained(request) or not request.max_tokens:
            return None
        if request.bad_words and self._token_index is None:
            self._token_index = TokenIndex(self._token_bytes)
        return Constraint(request, self._token_index, self._vocab_size)

    def _for_one(self, one: Running, work: Callable[..., None], *arguments: Any) -> None:
        """Run the part of a step that concerns one request: its error ends this request only."""
        try:
            work(one, *arguments)
        except GrammarFailure as error:
            self._leave(one, "error", error=str(error), refusal="grammar", is_left=True)
        except Exception:
            logger.exception("a request failed; the others go on")
            self._leave(one, "error", error=FAILED, is_left=True)

    def _refuse(self, one: Running, *, reason: str, is_value: bool) -> None:
        if is_value:
            self._leave(one, "error", error=f"vLLM refuses the request: {reason}", refusal="value")
        else:
            logger.error("vLLM could not take a request: %s", reason)
            self._leave(one, "error", error=FAILED)

    def _allow_next(self, one: Running) -> None:
        """Look up which tokens may come next in a constrained text; end it where none may."""
        if one.constraint is None:
            return
        request = one.request
        ends = frozenset() if request.ignore_eos else self._end_of_text_ids
        forbidden = [*request.stop_token_ids, *ends] if one.generation.generated_tokens < request.min_tokens else []
        one.mask_V = one.constraint.next_allowed(forbidden, ends)
        if one.mask_V is None:
            self._end_text(one, "stop", is_left=True)

    def _process_output(self, one: Running, output: dict[str, Any]) -> None:
        """Deliver what is new of one request."""
        generation, request = one.generation, one.request
        if output["cached"] > generation.cached_tokens:
            self.cached_tokens += output["cached"] - generation.cached_tokens
            generation.cached_tokens = output["cached"]
        if request.prompt_logprobs is not None and output.get("prompt_logprobs"):  # once; empty lists follow
            generation.emit(_prompt_scores(request.prompt_ids, output["prompt_logprobs"], request.prompt_logprobs))
        if request.max_tokens == 0:  # vLLM generates at least one token
            if output["ids"] or output["ended"]:
                self._leave(one, "length", is_left=not output["ended"])
            return
        places = output.get("logprobs") or [None] * len(output["ids"])
        for number, (token, place) in enumerate(zip(output["ids"], places, strict=True), start=1):
            is_last = bool(output["ended"]) and number == len(output["ids"])
            self._take_token(one, token, place, is_last=is_last)
            if generation.is_finished:
                return
        if output["ended"]:
            self._end_text(one, "length" if output["ended"] == "length" else "stop")

    def _take_token(self, one: Running, token: int, place: list[Any] | None, *, is_last: bool) -> None:
        """Deliver the text that no later token can change, and end it where a stop string, a stop token or the form of
        the text does.
        """
        generation, request = one.generation, one.request
        may_end = generation.generated_tokens >= request.min_tokens
        if one.constraint:
            one.constraint.accept(token, self._bytes_of(token))
        generation.generated_tokens += 1
        self.generated_tokens += 1
        self.answered += 1
        is_end = token in self._end_of_text_ids and not request.ignore_eos
        ends = is_end or (token in request.stop_token_ids and may_end)
        if ends and not (request.include_stop and self._bytes_of(token)):
            self._end_text(one, "stop", stopped_by=None if is_end else token, is_left=not is_last)
            return
        scores = (_score(place, token, request.logprobs),) if place and request.logprobs is not None else ()
        may_stop = generation.generated_tokens >= request.min_tokens
        text, stop = one.text.push(token, may_stop=may_stop)
        generation.emit(TextPiece(text, (token,), scores))
        if stop is not None:
            self._leave(one, "stop", stopped_by=stop, is_left=not is_last)
        elif ends:
            self._end_text(one, "stop", stopped_by=None if is_end else token, is_left=not is_last)
        elif one.constraint and one.constraint.is_complete:
            self._end_text(one, "stop", is_left=not is_last)
        elif not is_last:
            self._allow_next(one)

    def _bytes_of(self, token: int) -> bytes:
        return self._token_bytes[token] if token < len(self._token_bytes) else b""

    def _end_text(
        self, one: Running, reason: FinishReason, *, stopped_by: int | None = None, is_left: bool = False
    ) -> None:
        """Emit the held-back text, then finish."""
        rest, stop = one.text.end()
        if rest:
            one.generation.emit(TextPiece(rest, ()))
        if stop is None:
            self._leave(one, reason, stopped_by=stopped_by, is_left=is_left)
        else:
            self._leave(one, "stop", stopped_by=stop, is_left=is_left)

    def _leave(
        self,
        one: Running,
        reason: FinishReason,
        *,
        stopped_by: str | int | None = None,
        error: str | None = None,
        refusal: Refusal | None = None,
        is_left: bool = False,
    ) -> None:
        """Finish a request, once. is_left: vLLM still computes it."""
        if one not in self.running:  # an error after its end
            return
        self.running.remove(one)
        if is_left:
            self._left.append(one.number)
        self.pace.ended(one.generation)
        one.generation.finish(reason, stopped_by=stopped_by, error=error, refusal=refusal)


def packed(mask_V: npt.NDArray[np.bool_]) -> str:
    """A mask as text: one bit for each token, the first token in the lowest bit, base64."""
    return base64.b64encode(np.packbits(mask_V, bitorder="little").tobytes()).decode()


def _asked(request: Any, end_of_text_ids: frozenset[int]) -> dict[str, Any]:
    """A request in vLLM's words: the end of text is one of its stop tokens, as vLLM has no tokenizer here."""
    sampling = request.sampling
    stops = request.stop_token_ids | (frozenset() if request.ignore_eos else end_of_text_ids)
    is_free = not is_constrained(request)  # the masks of a constrained request decide where it may end
    return {
        "ids": [int(token) for token in request.prompt_ids],
        "options": {
            "max_tokens": max(request.max_tokens, 1),
            "min_tokens": request.min_tokens if is_free else 0,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": dict(sampling.logit_bias),
            "seed": sampling.seed,
            "stop_token_ids": sorted(stops) if is_free else [],
            "ignore_eos": True,
            "logprobs": request.logprobs,
            "prompt_logprobs": request.prompt_logprobs,
        },
    }


def _score(place: list[Any], token: int, top: int) -> TokenLogprob:
    """The score of a token among the entries (token, log-probability, rank) at its place."""
    ranked = sorted((rank, other, score) for other, score, rank in place if 0 < rank <= top)
    own = next(score for other, score, _ in place if other == token)
    return TokenLogprob.of(token, own, [(other, score) for _, other, score in ranked[:top]])


def _prompt_scores(ids: collections.abc.Sequence[int], places: list[Any], top: int) -> PromptScores:
    scores = [place and _score(place, int(token), top) for token, place in zip(ids, places, strict=True)]
    return PromptScores(tuple(scores))
