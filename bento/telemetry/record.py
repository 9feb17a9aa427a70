"""What is known about one request: filled in by its route, read by the log, the metrics and the trace when it ends."""

import time
from dataclasses import dataclass, field

from bento.telemetry.metrics import ServiceMetrics
from model.generation.requests import Finished, Generation

CLIENT_LEFT = 499


@dataclass
class RequestRecord:
    """One request; routes find it in `request.state.record`.

    started: seconds of `time.monotonic()`; started_ns: the same moment by the clock. error_code: of the refusal, where it
    was refused. submitted_s, first_token_s: from `started` to the first submission and token; queue_s: that it waited.
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
        """A clock for one generation of this request, once for each that is submitted."""
        return TokenClock(self, generation)


class TokenClock:
    """Times the tokens of one generation as they reach the event loop; called for each, so it does next to nothing."""

    __slots__ = ("_generation", "_last", "_record")

    def __init__(self, record: RequestRecord, generation: Generation) -> None:
        self._record, self._generation = record, generation
        if record.submitted_s is None:
            record.submitted_s = generation.submitted_at - record.started
        self._last: float | None = None

    def tick(self) -> None:
        """A piece of text is here."""
        now = time.monotonic()
        record = self._record
        if self._last is not None:
            record.metrics.inter_token_latency.observe(now - self._last)
        else:
            first_token_s = now - record.started
            record.metrics.time_to_first_token.observe(first_token_s)
            if record.first_token_s is None:
                record.first_token_s = first_token_s
        self._last = now

    def stop(self, last: Finished | None) -> None:
        """The generation is over, once; `last` is None where its client left before the last event."""
        record, generation = self._record, self._generation
        record.cached_tokens += generation.cached_tokens
        record.generated_tokens += generation.generated_tokens
        record.finish_reason = last.finish_reason if last else "cancelled"
        if generation.started_at is not None:
            queue_s = generation.started_at - generation.submitted_at
            record.metrics.queue_time.observe(queue_s)
            if record.queue_s is None:
                record.queue_s = queue_s
