"""The engine's interface: sampling parameters, requests, and the events of a generation.

Imports no torch, so that a server can build its routes before it loads a model. `engine.py` has the engine.
"""

import math
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

import numpy as np
import numpy.typing as npt

from model.errors import PipelineError
from model.generation.grammar.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
Refusal = Literal["grammar", "value"]
"""The part of a request that is to blame for an error: a form of the text that takes too much work or allows no token,
or a value that the engine does not take."""
MAX_SEED = 2**63 - 1
MAX_LOGIT_BIAS = 100.0
MAX_LENGTH_PENALTY = 10.0
FAILED = "generating failed: the server's log has the reason"


class EngineBusy(Exception):
    """The queue is full. retry_after_s: whole seconds until a slot is likely to be free."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class UnsupportedValue(PipelineError):
    """The engine that serves the model does not take a value of the request, which others take."""


class EngineStopped(Exception):
    """The engine is stopped, restarting or dead, and accepts no requests."""


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen; semantics and order are those of transformers' `generate()`.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: in (0, 1], 1 keeps all.
    min_p: drops tokens below this fraction of the highest probability; 0 keeps all.
    repetition_penalty: above 1, makes tokens of the prompt and of the generated text less likely; also when greedy.
    presence_penalty, frequency_penalty: subtracted from the logit of a generated token, once and per occurrence
    (OpenAI's definition, prompt not counted). logit_bias: added to the logits of these token ids. seed: the same
    seed gives the same tokens for the same request; None draws one. Raises PipelineError naming the parameter that is
    out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or a finite number above it")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _check(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "a number above 0"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        for token, bias in self.logit_bias.items():
            _check(
                abs(bias) <= MAX_LOGIT_BIAS,
                f"logit_bias[{token}]",
                bias,
                f"-{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
            )
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")


@dataclass(frozen=True)
class Beams:
    """Beam search in place of sampling, as transformers' `generate(num_beams=width)` defines it.

    All `width` texts of a search are submitted together, by rank: rank 0 is the best one. A text's score is the sum of
    its tokens' log-probabilities divided by its length to the power of length_penalty. early_stopping: True ends the
    search at `width` complete texts; False when the best running one, at its present length, scores less than all of
    them; "never" compares its best possible score. Raises PipelineError naming the value that is out of range.
    """

    width: int
    rank: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _check(self.width >= 1, "width", self.width, "1 or more")
        _check(0 <= self.rank < self.width, "rank", self.rank, "0 or more, below width")
        limit = MAX_LENGTH_PENALTY
        _check(abs(self.length_penalty) <= limit, "length_penalty", self.length_penalty, f"-{limit:g} to {limit:g}")


@dataclass(frozen=True)
class GenerationRequest:
    """One text to continue.

    prompt_ids: tokens of the prompt, at least one. max_tokens: 0 only scores the prompt.
    min_tokens: number of tokens before which no end-of-text token, stop token or stop string ends the text.
    stop: strings that end the text, even if they span tokens; excluded from the text. stop_until: only the text
    before this string is searched for them. stop_token_ids: tokens that
    end the text as the end-of-text token does. ignore_eos: continue past the end-of-text token.
    logprobs: return the log-probability of each generated token and of the top this many; None: none.
    grammar: constrains the text, which is a prefix of a match if max_tokens cut it off (finish_reason "length");
    generation ends at a complete match that nothing extends. allowed_token_ids: the only tokens to sample from.
    bad_words: strings that never appear in the text. include_stop: keep the stop string, or the stop token's text.
    prompt_logprobs: as logprobs, for the prompt, in one `PromptScores` event before the first piece of text.
    embedding: return the prompt's vector (mean of all tokens or last token) in one `Embedding` event and no text;
    needs max_tokens 0. beams: search the likeliest texts instead of sampling; stop strings, constraints and sampling
    parameters do not apply to them. queue_timeout_s: from submission to start. timeout_s: from submission to the last
    token. None: no limit. client, connection: the sender; free slots rotate among clients, and among a client's
    connections.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_until: str | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    allowed_token_ids: frozenset[int] | None = None
    bad_words: tuple[str, ...] = ()
    include_stop: bool = False
    embedding: Literal["mean", "last"] | None = None
    beams: Beams | None = None
    queue_timeout_s: float | None = None
    timeout_s: float | None = None
    client: str = ""
    connection: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the model, before penalties, constraints and temperature.

    top_ids, top_logprobs: the most likely tokens at this position in descending order, int32 and float32, as bytes. A
    long prompt has tens of thousands of them: as Python objects they would hold the GIL while they are made and freed.
    """

    token_id: int
    logprob: float
    top_ids: bytes = b""
    top_logprobs: bytes = b""

    @classmethod
    def of(cls, token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> "TokenLogprob":
        """From pairs of a token and its log-probability, in descending order."""
        ids, logprobs = [token for token, _ in top], [score for _, score in top]
        return cls(token_id, logprob, np.array(ids, np.int32).tobytes(), np.array(logprobs, np.float32).tobytes())

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """The most likely tokens at this position with their log-probabilities, in descending order."""
        return tuple(zip(*self.ranked, strict=True))

    @property
    def ranked(self) -> tuple[list[int], list[float]]:
        """The most likely tokens, and their log-probabilities."""
        return array("i", self.top_ids).tolist(), array("f", self.top_logprobs).tolist()


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the prompt's tokens; None for the first, which has no context."""

    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class Embedding:
    """A prompt's embedding, float32, shape (D,), from the hidden states after the final norm."""

    vector: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextPiece:
    """Text completed by these tokens; empty while a character or a possible stop string is incomplete.

    The pieces of a generation concatenate to its text. logprobs: one for each of token_ids, if requested.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event.

    generated_tokens: includes the token that ended the text (finish_reason "stop"), whose text is emitted only with
    include_stop. stopped_by: the stop string or stop token id that matched; None for the end-of-text token.
    cached_tokens: prompt tokens served from the prefix cache. error: one-line reason for finish_reason "error".
    refusal: the part of the request that is to blame for an error; None: an error of the engine.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    stopped_by: str | int | None = None
    cached_tokens: int = 0
    error: str | None = None
    refusal: Refusal | None = None

    @property
    def is_refusal(self) -> bool:
        """Whether the request is invalid (a client error)."""
        return self.refusal is not None


@dataclass(frozen=True)
class EngineStats:
    """Gauges of the engine, and counters since its creation (names that end in _total)."""

    running: int
    waiting: int
    waiting_tokens: int
    """Prompt tokens of waiting requests."""
    cache_tokens: int
    """Tokens of running requests in the KV cache."""
    cache_capacity_tokens: int
    prompt_tokens_total: int
    cached_tokens_total: int
    """Prompt tokens served from the prefix cache."""
    generated_tokens_total: int
    cancelled_total: int
    restarts_total: int
    cache_bytes: int = 0
    """Memory that keys and values hold, those of ended requests included, which later prompts reuse."""
    proposed_tokens_total: int = 0
    accepted_tokens_total: int = 0
    """Proposed tokens that were chosen, see `speculation.py`."""


Event = PromptScores | Embedding | TextPiece | Finished
Deliver = Callable[[Event], None]


class Generation:
    """A submitted request. Iterating yields its events; `Finished` is the last.

    deliver: callback that gets each event in the engine's thread; iteration then yields nothing.
    """

    def __init__(self, request: GenerationRequest, deliver: Deliver | None = None) -> None:
        self.request = request
        self.submitted_at = time.monotonic()
        self.started_at: float | None = None
        """Time at which it left the queue, as `time.monotonic()`; None while it waits."""
        self.generated_tokens = 0
        self.cached_tokens = 0
        self.is_finished = False
        self.is_continuation = False
        """Continues a request that was admitted: it does not count against the queue's limits."""
        self.is_part = False
        """One token of a beam search."""
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._deliver = deliver or self._events.put
        self._is_cancelled = False
        self._finishing = threading.Lock()

    def cancel(self) -> None:
        """Stop at the next token; a waiting request never starts. Thread-safe and idempotent."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called, or the receiver is gone."""
        return self._is_cancelled

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def interruption(self) -> FinishReason | None:
        """Reason to end this request early, None if it may continue."""
        if self._is_cancelled:
            return "cancelled"
        if self.request.timeout_s is None and (self.started_at is not None or self.request.queue_timeout_s is None):
            return None
        waited_s = time.monotonic() - self.submitted_at
        limits_s = [self.request.timeout_s, self.request.queue_timeout_s if self.started_at is None else None]
        return "timeout" if any(limit_s is not None and waited_s > limit_s for limit_s in limits_s) else None

    def remaining_tokens(self, usual: float) -> float:
        """Tokens still to be generated, at least 1. usual: the tokens of an answer that ends before its max_tokens."""
        return max(min(self.request.max_tokens, usual) - self.generated_tokens, 1)

    def start(self, cached_tokens: int) -> None:
        """Record that the request left the queue; the engine calls it."""
        self.started_at, self.cached_tokens = time.monotonic(), cached_tokens

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Finish with an error if the block raises: a request in neither queue nor slot would wait for ever."""
        try:
            yield
        except Exception:
            self.finish("error", error=FAILED)
            raise

    def emit(self, event: PromptScores | Embedding | TextPiece) -> None:
        """Deliver an event; the engine calls it."""
        if not self.is_finished:
            self._hand_over(event)

    def finish(
        self,
        reason: FinishReason,
        *,
        stopped_by: str | int | None = None,
        error: str | None = None,
        refusal: Refusal | None = None,
    ) -> None:
        """Deliver the last event, once; the engine calls it."""
        with self._finishing:  # a step that hangs may return after the watchdog has finished its requests
            if self.is_finished:
                return
            self.is_finished = True
        prompt_tokens = len(self.request.prompt_ids)
        counts = prompt_tokens, self.generated_tokens
        self._hand_over(Finished(reason, *counts, stopped_by, self.cached_tokens, error, refusal))

    def _hand_over(self, event: Event) -> None:
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001  the receiver is gone (its event loop is closed)
            self._is_cancelled = True


def _check(is_valid: bool, name: str, value: object, expected: str) -> None:
    if not is_valid:
        raise PipelineError(f"{name} is {value}: expected {expected}")
