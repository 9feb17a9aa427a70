"""Speculative decoding: tokens that may come next are proposed, and one step checks them all.

A text often repeats a part of itself or of its prompt, so the proposal is what followed the last occurrence of its last
tokens (prompt lookup decoding, A. Saxena, 2023): it takes no second model. The step chooses a token after each proposed
one as it would without a proposal, from the same logits and with the random number of that position; the scheduler
keeps the chosen ones up to the first that differs from the proposal. So texts are the same to the bit, if the step is
batch invariant (`Step.is_batch_invariant`).
"""

import itertools
import math
from collections.abc import Sequence

NGRAM = 2
"""Tokens that have to occur again."""
ROWS_PER_STEP = 2.0
"""The fixed cost of a step over the cost of one more token in it. Measured with AVX2: about 2 with int8 and 4 with
float32 weights (`bench/LOG.md`); more with faster integer products. A smaller number proposes less."""
FIRST_RATE = 0.3
"""Taken for the rate of right proposals until the text has had some: too low to check any."""
NEW_SHARE = 0.2
"""Of the latest proposal in the moving average of the rate."""
MOST_RATE = 0.99


class Proposer:
    """Proposes the next tokens of one text. ids: those of its prompt.

    rate: of single tokens that were as proposed, a moving average. It is kept whether or not a step checks proposals,
    as each token says whether its proposal was right.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.rate = FIRST_RATE
        self._ids = list(ids)
        grams = list(zip(*(self._ids[start:] for start in range(NGRAM)), strict=False))
        self._ends: dict[tuple[int, ...], int] = dict(zip(grams[:-1], itertools.count(NGRAM), strict=False))
        """The position after the last occurrence of each n-gram."""
        self._source: int | None = None
        """Position of the token that is proposed next; None without a proposal."""
        self._find()

    def push(self, token: int) -> None:
        """Continue the text by a token."""
        source = self._source
        if source is not None:
            is_right = self._ids[source] == token
            self.rate += NEW_SHARE * (is_right - self.rate)
            self._source = source + 1 if is_right else None
        self._ids.append(token)
        self._find()

    def propose(self, count: int) -> list[int]:
        """The next `count` tokens; none if the last ones have not occurred before."""
        if self._source is None:
            return []
        proposal = self._ids[self._source : self._source + count]
        # The text goes round in a circle: what is proposed follows itself.
        while len(proposal) < count:
            proposal += proposal[: count - len(proposal)]
        return proposal

    def _find(self) -> None:
        """Look the last tokens up, unless the last proposal was right: then what followed there goes on."""
        gram = tuple(self._ids[-NGRAM:])
        if self._source is None:
            self._source = self._ends.get(gram)
        self._ends[gram] = len(self._ids)


def proposal_length(rate: float, texts: int, most: int) -> int:
    """Tokens worth proposing for one of `texts` texts in a step, at most `most`.

    The token at place n of a proposal is right with the probability rate^n. It is worth its cost if that exceeds the
    cost of a token in the step over the time per token of the step without proposals:
    1 / (ROWS_PER_STEP / texts + 1).
    """
    least = texts / (ROWS_PER_STEP + texts)
    if rate <= least:
        return 0
    return min(most, int(math.log(least) / math.log(min(rate, MOST_RATE))))
