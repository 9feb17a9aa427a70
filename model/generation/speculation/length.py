"""How many proposed tokens are worth their cost.

The token at place n of a proposal is right with the probability rate^n, if each is right with the probability `rate`.
"""

import math

ROWS_PER_STEP = 2.0
"""The fixed cost of a step over the cost of one more token in it. Measured with AVX2: 2 to 3.5 with int8 and
3 to 5 with float32 weights (`bench/LOG.md`). A smaller number proposes less."""
NEW_SHARE = 0.2
"""Of the latest proposal in the moving average of the rate."""
MOST_RATE = 0.99


def moved(rate: float, *, is_right: bool, share: float = NEW_SHARE) -> float:
    """The moving average of the rate after one more token."""
    return rate + share * (is_right - rate)


def proposal_length(rate: float, texts: int, most: int) -> int:
    """Tokens worth proposing for one of `texts` texts in a step, at most `most`, if making the proposal costs nothing.

    The token at place n is worth its cost if its probability exceeds the cost of a token in the step over the time per
    token of the step without proposals: 1 / (ROWS_PER_STEP / texts + 1).
    """
    least = texts / (ROWS_PER_STEP + texts)
    if rate <= least:
        return 0
    return min(most, int(math.log(least) / math.log(min(rate, MOST_RATE))))


def expected_tokens(rate: float, count: int) -> float:
    """Tokens that a step gives a text, `count` of whose next tokens are proposed: the right ones and one more."""
    rate = min(rate, MOST_RATE)
    return (1 - rate ** (count + 1)) / (1 - rate)
