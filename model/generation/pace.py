"""How fast requests are answered, and how long the admitted ones will take: the basis of Retry-After."""

import time
from collections.abc import Iterable

from model.generation.requests import Generation

NEW_SHARE = 0.2
"""Of the latest request in the moving averages."""


class Pace:
    """Moving averages over the requests that ended.

    token_seconds: time in a slot for each generated token. answer_tokens: tokens of an answer; the request
    for a token of a beam search does not count.
    """

    def __init__(self) -> None:
        self.token_seconds, self.answer_tokens = 1 / 64, 64.0

    def ended(self, generation: Generation) -> None:
        """Count a request that leaves its slot."""
        if generation.started_at is None:
            return
        tokens = max(generation.generated_tokens, 1)
        held_s = time.monotonic() - generation.started_at
        self.token_seconds += NEW_SHARE * (held_s / tokens - self.token_seconds)
        if not generation.is_part:
            self.answer_tokens += NEW_SHARE * (tokens - self.answer_tokens)

    def seconds(self, admitted: Iterable[Generation], slots: int) -> float:
        """Time until `slots` slots have answered these requests, running and waiting ones."""
        tokens = sum(generation.remaining_tokens(self.answer_tokens) for generation in admitted)
        return self.token_seconds * tokens / slots
