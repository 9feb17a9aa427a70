"""What is asked of the engine and what it answers: parameters, requests and the events of one generation.

Nothing here imports torch, so that a server can build its routes before a model is loaded. The engine that answers is
`engine.py`.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

from model.errors import PipelineError

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
MAX_SEED = 2**63 - 1


class EngineBusy(Exception):
    """The queue is full; `retry_after_s` is when a place is likely to be free, in whole seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine was stopped or its thread has died: it takes no more requests."""


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen; semantics and order are those of transformers' `generate()`.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: in (0, 1], 1 keeps all.
    repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely; also when greedy.
    seed: the same seed gives the same tokens for the same request; None draws one.
    Raises PipelineError naming the parameter that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or a finite number above it")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "a number above 0"
        )
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")


@dataclass(frozen=True)
class GenerationRequest:
    """prompt_ids: the prompt's tokens, at least one. timeout_s: from submission to the last token; None waits on."""

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    timeout_s: float | None = None


@dataclass(frozen=True)
class TextPiece:
    """Text that became certain with these tokens; empty while a character is incomplete."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """The last event. generated_tokens counts the end-of-text token where one came (finish_reason "stop")."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int


Event = TextPiece | Finished
Deliver = Callable[[Event], None]


class Generation:
    """One request under way. Iterate over it for its events, of which `Finished` is the last.

    deliver: takes each event in the engine's thread instead; there is then nothing to iterate over.
    """

    def __init__(self, request: GenerationRequest, deliver: Deliver | None = None) -> None:
        self.request = request
        self._submitted = time.monotonic()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._deliver = deliver or self._events.put
        self._cancelled = threading.Event()
        self.generated_tokens = 0
        self.is_finished = False

    def cancel(self) -> None:
        """Stop at the next token; a request that waits never starts. Safe from any thread, any number of times."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def interruption(self) -> FinishReason | None:
        """Why this request must end before it is complete, None where it may go on."""
        if self._cancelled.is_set():
            return "cancelled"
        timeout_s = self.request.timeout_s
        if timeout_s is not None and time.monotonic() - self._submitted > timeout_s:
            return "timeout"
        return None

    def emit(self, text: str, *token_ids: int) -> None:
        """Hand over a piece; called by the engine."""
        self._hand_over(TextPiece(text, token_ids))

    def finish(self, reason: FinishReason) -> None:
        """Hand over the last event, once; called by the engine."""
        if not self.is_finished:
            self.is_finished = True
            self._hand_over(Finished(reason, len(self.request.prompt_ids), self.generated_tokens))

    def _hand_over(self, event: Event) -> None:
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001  the receiver is gone (its event loop was closed): nobody waits for the rest
            self._cancelled.set()


def _check(is_valid: bool, name: str, value: object, expected: str) -> None:
    if not is_valid:
        raise PipelineError(f"{name} is {value}: expected {expected}")
