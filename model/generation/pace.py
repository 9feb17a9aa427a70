"""How fast requests are answered: the basis of Retry-After, and of the size of a step while several clients wait."""

import math
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


SHARED_STEP_S = 0.005
"""Time of a step with prompts while several clients are present: a longer one would delay the others."""
LEAST_SHARE = 16
"""Such a step has at least this fraction of `prefill_chunk`, a tile of a matrix product by default."""


class StepBudget:
    """Tokens of a step with prompts.

    most: of a step while one client is present.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tokens_per_second = 0.0

    @property
    def shared(self) -> int:
        """Tokens of a step while several clients are present: what took SHARED_STEP_S lately, in whole tiles."""
        tile = math.ceil(self.most / LEAST_SHARE)
        fits = int(SHARED_STEP_S * self._tokens_per_second)
        return min(max(fits // tile, 1) * tile, self.most)

    def count(self, tokens: int, seconds: float) -> None:
        """Count a step with prompts. Few tokens, for which all weights are read too, only raise the speed."""
        speed = tokens / seconds
        if tokens >= self.shared or speed > self._tokens_per_second:
            self._tokens_per_second += NEW_SHARE * (speed - self._tokens_per_second)
