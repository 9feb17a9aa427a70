"""Beam search over the engine: each beam's next token is a request of its own, so a search takes turns with others.

The search is that of transformers' `generate(num_beams=...)`: candidates, length penalty and the rule when to stop are
the same. The keys and values of a beam come from the prefix cache. `requests.Beams` has the parameters; sampling is in
`sampler.py`.

Words: a beam is a text under search, a part is the request for its next token.
"""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from model.errors import PipelineError
from model.generation.detokenizer import Detokenizer
from model.generation.requests import (
    FAILED,
    Beams,
    EngineStopped,
    Event,
    Finished,
    FinishReason,
    Generation,
    GenerationRequest,
    PromptScores,
    SamplingParameters,
    TextPiece,
    TokenLogprob,
)

logger = logging.getLogger(__name__)
NUMBER_BYTES = 4
"""Of a token's id, and of its log-probability, in `TokenLogprob`."""
Submit = Callable[[Sequence[Generation]], None]


@dataclass(frozen=True)
class Beam:
    """A text: its tokens and the sum of their log-probabilities. is_ended: the last one ends the text."""

    tokens: tuple[TokenLogprob, ...] = ()
    total: float = 0.0
    is_ended: bool = False


class BeamSearch:
    """The texts of one search.

    max_tokens: length of the longest text. min_tokens: no text ends before. ends: tokens that end one. shown: likely
    tokens to keep beside each token.
    """

    def __init__(
        self, beams: Beams, *, max_tokens: int, min_tokens: int = 0, ends: Collection[int] = (), shown: int = 0
    ) -> None:
        self._beams, self._max_tokens, self._min_tokens, self._shown = beams, max_tokens, min_tokens, shown
        self._ends = frozenset(ends)
        self.running = [Beam()]
        self._ended: list[tuple[float, Beam]] = []
        """The best texts that are complete, with their scores, best first."""

    @property
    def candidates(self) -> int:
        """Most likely tokens of each beam that a step needs."""
        return max(self._kept + (len(self._ends) if self._length < self._min_tokens else 0), self._shown)

    @property
    def best(self) -> list[Beam]:
        """The texts found, best first."""
        return [beam for _, beam in self._ended]

    @property
    def _length(self) -> int:
        return len(self.running[0].tokens)

    @property
    def _kept(self) -> int:
        # Enough that `width` candidates go on even if all others end.
        return max(2, 1 + len(self._ends)) * self._beams.width

    def advance(self, found: Sequence[TokenLogprob]) -> bool:
        """Extend each running beam by one token; False at the end of the search.

        found: for each beam, its most likely next tokens in `top`, `candidates` of them.
        """
        length = self._length + 1
        candidates = [
            (beam.total + logprob, number, token)
            for number, (beam, place) in enumerate(zip(self.running, found, strict=True))
            for token, logprob in place.top
            if length > self._min_tokens or token not in self._ends
        ]
        # A stable sort: among equals the earlier beam's, and the earlier token, come first.
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates = candidates[: self._kept]
        stops = [length == self._max_tokens or token in self._ends for _, _, token in candidates]
        for candidate, stop in list(zip(candidates, stops, strict=True))[: self._beams.width]:
            if stop:
                beam = self._extended(candidate, found)
                self._ended.append((beam.total / length**self._beams.length_penalty, beam))
        is_full = len(self._ended) >= self._beams.width
        self._ended.sort(key=lambda scored: -scored[0])
        del self._ended[self._beams.width :]
        going = [candidate for candidate, stop in zip(candidates, stops, strict=True) if not stop]
        if not going:
            return False
        self.running = [self._extended(candidate, found) for candidate in going[: self._beams.width]]
        return not is_full or (self._beams.early_stopping is not True and self._can_improve(length))

    def _extended(self, candidate: tuple[float, int, int], found: Sequence[TokenLogprob]) -> Beam:
        total, number, token = candidate
        beam, place = self.running[number], found[number]
        logprob = next(value for other, value in place.top if other == token)
        size = NUMBER_BYTES * self._shown
        score = TokenLogprob(token, logprob, place.top_ids[:size], place.top_logprobs[:size])
        return Beam((*beam.tokens, score), total, is_ended=token in self._ends)

    def _can_improve(self, length: int) -> bool:
        """Whether the best running beam may still beat the worst complete text, by the estimate of `early_stopping`."""
        penalty = self._beams.length_penalty
        if self._beams.early_stopping == "never" and penalty > 0:
            length = self._max_tokens
        return self.running[0].total / length**penalty > self._ended[-1][0]


class Part(Generation):
    """The next token of one beam of `search`."""

    def __init__(self, request: GenerationRequest, deliver: Callable[[Event], None], search: "Search") -> None:
        super().__init__(request, deliver)
        self._search = search
        self.submitted_at = search.texts[0].submitted_at
        self.is_part, self.is_continuation = True, search.texts[0].started_at is not None

    def interruption(self) -> FinishReason | None:
        """Why to end early: as any request, or because all texts were canceled."""
        return "cancelled" if all(text.is_cancelled for text in self._search.texts) else super().interruption()

    def remaining_tokens(self, usual: float) -> float:
        """The part's share of the tokens of its search."""
        return self._search.remaining_tokens / max(self._search.missing, 1)


class Search:
    """Runs one search: submits the parts of each step, and delivers the texts at the end, best first.

    texts: a generation for each text. ends: tokens that end a text. submit: queues the parts of a later step; raises
    Exception if the engine stopped. release: called at the end.
    """

    def __init__(
        self,
        texts: Sequence[Generation],
        *,
        ends: Collection[int],
        token_bytes: Sequence[bytes],
        submit: Submit,
        release: Callable[[], None],
    ) -> None:
        request = texts[0].request
        assert request.beams is not None
        self.texts, self._request, self._token_bytes = texts, request, token_bytes
        self._submit, self._release = submit, release
        self._is_released = False
        own = () if request.ignore_eos else ends
        self._search = BeamSearch(
            request.beams,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            ends={*own, *request.stop_token_ids},
            shown=request.logprobs or 0,
        )
        self._end_of_text_ids = frozenset(own)
        self._prompt_scores: PromptScores | None = None
        self._found: list[TokenLogprob | None] = []
        self._parts: list[Part] = []
        self._failure: Finished | None = None
        self.missing = 0
        """Parts of this step that have not ended."""
        self._lock = threading.Lock()

    @property
    def remaining_tokens(self) -> int:
        """Tokens of all beams until the search ends at its max_tokens."""
        assert self._request.beams
        return self._request.beams.width * (self._request.max_tokens - len(self._search.running[0].tokens))

    def parts(self) -> list[Part]:
        """The requests of the next step, one for each beam."""
        beams = self._search.running
        self._found, self.missing = [None] * len(beams), len(beams)
        self._parts = [
            Part(
                GenerationRequest(
                    [*self._request.prompt_ids, *(score.token_id for score in beam.tokens)],
                    1,
                    SamplingParameters(temperature=0),
                    ignore_eos=True,
                    logprobs=self._search.candidates,
                    prompt_logprobs=None if beam.tokens else self._request.prompt_logprobs,
                    queue_timeout_s=None if beam.tokens else self._request.queue_timeout_s,
                    timeout_s=self._request.timeout_s,
                    client=self._request.client,
                    connection=self._request.connection,
                ),
                partial(self._take, number),
                self,
            )
            for number, beam in enumerate(beams)
        ]
        return self._parts

    def _take(self, number: int, event: Event) -> None:
        """An event of a part; called in the engine's thread, or in the watchdog's."""
        if isinstance(event, PromptScores):
            self._prompt_scores = event
        elif isinstance(event, TextPiece) and event.logprobs:
            self._found[number] = event.logprobs[0]
        elif isinstance(event, Finished):
            with self._lock:
                self.missing -= 1
                if event.finish_reason != "length":
                    self._failure = event
                if self.missing:
                    return
            self._advance(event)

    def _advance(self, last: Finished) -> None:
        try:
            if self._failure:
                self._finish(self._failure)
                return
            for text in self.texts:
                if text.started_at is None:
                    text.started_at, text.cached_tokens = self._parts[0].started_at, last.cached_tokens
            if self._search.advance([score for score in self._found if score is not None]):
                self._submit(self.parts())
                return
            self._deliver()
        except EngineStopped:
            self._finish(replace(last, finish_reason="cancelled"))
        except Exception:
            logger.exception("a beam search failed; the others go on")
            self._finish(replace(last, finish_reason="error", error=FAILED))

    def _end(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._release()

    def _deliver(self) -> None:
        self._end()
        for text, beam in zip(self.texts, self._search.best, strict=True):
            if self._prompt_scores:
                text.emit(self._prompt_scores)
            text.generated_tokens = len(beam.tokens)
            is_shown = not beam.is_ended or (self._request.include_stop and self._token_bytes[beam.tokens[-1].token_id])
            detokenizer = Detokenizer(self._token_bytes)
            for score in beam.tokens if is_shown else beam.tokens[:-1]:
                logprobs = () if self._request.logprobs is None else (score,)
                text.emit(TextPiece(detokenizer.push(score.token_id), (score.token_id,), logprobs))
            if rest := detokenizer.flush():
                text.emit(TextPiece(rest, ()))
            stopped_by = beam.tokens[-1].token_id if beam.is_ended else None
            if stopped_by in self._end_of_text_ids:
                stopped_by = None
            text.finish("stop" if beam.is_ended else "length", stopped_by=stopped_by)

    def _finish(self, failure: Finished) -> None:
        self._end()
        for text in self.texts:
            text.finish(text.interruption() or failure.finish_reason, error=failure.error, refusal=failure.refusal)


def searches(generations: Sequence[Generation]) -> list[list[Generation]]:
    """The generations of each search, and each other generation alone, in order.

    Raises PipelineError if a search has not one generation for each beam, by rank.
    """
    groups: list[list[Generation]] = []
    for generation in generations:
        beams = generation.request.beams
        if not groups or beams is None or beams.rank == 0:
            groups.append([])
        groups[-1].append(generation)
    for group in groups:
        beams = group[-1].request.beams
        ranks = [one.request.beams.rank if one.request.beams else None for one in group]
        if beams and ranks != list(range(beams.width)):
            raise PipelineError(
                f"a beam search of width {beams.width} has the texts {ranks}: expected one for each rank"
            )
    return groups
