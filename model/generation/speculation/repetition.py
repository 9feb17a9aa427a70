"""Speculative decoding: tokens that may come next are proposed, and one step checks them all.

A text often repeats a part of itself or of its prompt, so the proposal is what followed the last occurrence of its last
two tokens (prompt lookup decoding, A. Saxena, 2023): it takes no second model. The step chooses a token after each
proposed one as it would without a proposal, from the same logits and with the random number of that position; the
scheduler keeps the chosen ones up to the first that differs from the proposal. So texts are the same to the bit, if the
step is batch invariant (`Step.is_batch_invariant`).
"""

import math
from collections.abc import Iterable, Sequence

ROWS_PER_STEP = 2.0
"""The fixed cost of a step over the cost of one more token in it. Measured with AVX2: 2 to 3.5 with int8 and
3 to 5 with float32 weights (`bench/LOG.md`). A smaller number proposes less."""
FIRST_RATE = 0.3
"""Taken for the rate of right proposals until the text has had some: too low to check any."""
NEW_SHARE = 0.2
"""Of the latest proposal in the moving average of the rate."""
MOST_RATE = 0.99


class Proposer:
    """Proposes the next tokens of one text. ids: the first ones, at least one.

    rate: of single tokens that were as proposed, a moving average. It is kept whether or not a step checks proposals,
    as each token says whether its proposal was right.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.rate = FIRST_RATE
        self._ids = list(ids)
        pairs = zip(self._ids, self._ids[1:], strict=False)
        self._ends: dict[tuple[int, int], int] = dict(zip(pairs, range(2, len(ids)), strict=False))
        """The position after the last occurrence of each pair of tokens."""
        self._source: int | None = None
        """Position of the token that is proposed next; None without a proposal."""
        if len(ids) > 1:
            last = (self._ids[-2], self._ids[-1])
            self._source, self._ends[last] = self._ends.get(last), len(ids)

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, tokens: Iterable[int]) -> None:
        """Continue the text."""
        ids, ends, source, rate = self._ids, self._ends, self._source, self.rate
        for token in tokens:
            if source is not None:
                if ids[source] == token:
                    rate += NEW_SHARE * (1.0 - rate)
                    source += 1
                else:
                    rate -= NEW_SHARE * rate
                    source = None
            pair = (ids[-1], token)
            ids.append(token)
            # After a right proposal, the same occurrence goes on, though the pair may have occurred later, too.
            if source is None:
                source = ends.get(pair)
            ends[pair] = len(ids)
        self._source, self.rate = source, rate

    def propose(self, count: int) -> list[int]:
        """The next `count` tokens; none if the last ones have not occurred before."""
        if self._source is None:
            return []
        proposal = self._ids[self._source : self._source + count]
        # The text goes round in a circle: what is proposed follows itself.
        while len(proposal) < count:
            proposal += proposal[: count - len(proposal)]
        return proposal


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
