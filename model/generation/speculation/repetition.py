"""Proposals from the text itself: what followed the last occurrence of its last two tokens.

A text often repeats a part of itself or of its prompt (prompt lookup decoding, A. Saxena, 2023).
"""

from collections.abc import Iterable, Sequence

from model.generation.speculation.length import moved

FIRST_RATE = 0.3
"""Taken for the rate of right proposals until the text has had some: too low to check any."""


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
                    rate = moved(rate, is_right=True)
                    source += 1
                else:
                    rate = moved(rate, is_right=False)
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
