"""The record of one request: the route fills it in; log, metrics and trace read it when the request ends."""

import time
from dataclasses import dataclass, field

from bento.telemetry.metrics import ServiceMetrics
from model.generation.requests import Finished, Generation

CLIENT_LEFT = 499


@dataclass
class RequestRecord:
    """One request; routes find it in `request.state.record`.

    started: seconds of `time.monotonic()`; started_ns: the same moment by the clock. error_code: of a refused request.
    submitted_s, first_token_s: seconds from `started` to the first submission and token. queue_s: seconds in the queue.
    """

    id: str
    metrics: ServiceMetrics
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    status: int = CLIENT_LEFT
    error_code: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str = "-"
    submitted_s: float | None = None
    queue_s: float | None = None
    first_token_s: float | None = None

    def follow(self, generation: Generation) -> "TokenClock":
        """A clock for one generation of this request; call once per generation."""
        return TokenClock(self, generation)


class TokenClock:
    """Times the tokens of one generation as they reach the event loop. Called for each piece, so it must stay cheap."""

    __slots__ = ("_generation", "_last", "_record")

    def __init__(self, record: RequestRecord, generation: Generation) -> None:
        self._record, self._generation = record, generation
        if record.submitted_s is None:
            record.submitted_s = generation.submitted_at - record.started
        self._last: float | None = None

    def tick(self, tokens: int) -> None:
        """Record the arrival of a piece of text of that many tokens."""
        now = time.monotonic()
        record = self._record
        if self._last is not None:
            if tokens:
                record.metrics.inter_token_latency.observe((now - self._last) / tokens, tokens)
        else:
            first_token_s = now - record.started
            record.metrics.time_to_first_token.observe(first_token_s)
            if record.first_token_s is None:
                record.first_token_s = first_token_s
        self._last = now

    def stop(self, last: Finished | None) -> None:
        """Record the end of the generation; called once. `last` is None if the client left before the last event."""
        record, generation = self._record, self._generation
        record.cached_tokens += generation.cached_tokens
        record.generated_tokens += generation.generated_tokens
        record.finish_reason = last.finish_reason if last else "cancelled"
        if generation.started_at is not None:
            queue_s = generation.started_at - generation.submitted_at
            record.metrics.queue_time.observe(queue_s)
            if record.queue_s is None:
                record.queue_s = queue_s
