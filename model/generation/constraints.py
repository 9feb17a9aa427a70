"""Which tokens one text may take next: a grammar, a list of allowed tokens, strings that must not appear.

`sampler.py` samples from the remaining tokens. Shapes: V vocabulary.
"""

import bisect
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from model.generation.grammar.grammar import DEAD_END, GrammarFailure, Matcher
from model.generation.requests import GenerationRequest

SEPARATOR = b"\x00\xff\x00\xff"


class TokenIndex:
    """Looks tokens up by their bytes. token_bytes: the bytes each id stands for."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        pairs = sorted((data, token) for token, data in enumerate(token_bytes) if data)
        self._data = [data for data, _ in pairs]
        self._ids = [token for _, token in pairs]
        self._joined = SEPARATOR.join(self._data)
        self._starts, at = [], 0
        for data in self._data:
            self._starts.append(at)
            at += len(data) + len(SEPARATOR)

    def starting_with(self, data: bytes) -> list[int]:
        """Tokens that begin with `data`, which is not empty."""
        first = bisect.bisect_left(self._data, data)
        last = first
        while last < len(self._data) and self._data[last].startswith(data):
            last += 1
        return self._ids[first:last]

    def containing(self, data: bytes) -> set[int]:
        """Tokens that contain `data`."""
        found, at = set(), self._joined.find(data)
        while at >= 0:
            number = bisect.bisect_right(self._starts, at) - 1
            if at + len(data) <= self._starts[number] + len(self._data[number]):
                found.add(self._ids[number])
            at = self._joined.find(data, at + 1)
        return found


class BannedWords:
    """Strings that never appear in a text, whatever tokens would spell them."""

    def __init__(self, words: Sequence[str], index: TokenIndex) -> None:
        self._index = index
        self._words = [word.encode() for word in words]
        self._always = frozenset(token for word in self._words for token in index.containing(word))
        self._kept = max(map(len, self._words), default=1) - 1
        self._tail = b""

    def completing(self) -> Iterable[int]:
        """Tokens that would complete a word."""
        yield from self._always
        for word in self._words:
            for begun in range(1, len(word)):
                if self._tail.endswith(word[:begun]):
                    yield from self._index.starting_with(word[begun:])

    def push(self, data: bytes) -> None:
        """Record the bytes of the next token."""
        if self._kept:
            self._tail = (self._tail + data)[-self._kept :]


class Constraint:
    """The tokens that a request allows at each position. index: used only with `bad_words`."""

    def __init__(self, request: GenerationRequest, index: TokenIndex | None, vocab_size: int) -> None:
        self._grammar = request.grammar
        self._matcher: Matcher | None = request.grammar.matcher() if request.grammar else None
        self._allowed_V = np.ones(vocab_size, np.bool_)
        if request.allowed_token_ids is not None:
            self._allowed_V[:] = False
            self._allowed_V[list(request.allowed_token_ids)] = True
        self._banned = BannedWords(request.bad_words, index) if request.bad_words and index else None

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher is not None and self._matcher.is_complete

    @property
    def may_end(self) -> bool:
        """Whether the text is complete as it is. Without a grammar, always."""
        return self._matcher is None or self._matcher.may_end

    def allowed(self, forbidden: Collection[int], ends: Collection[int]) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, shape (V,). ends: tokens that end the text; no other token without text passes a
        grammar. Raises GrammarFailure.
        """
        allowed_V = self._allowed_V.copy()
        if self._matcher is not None and self._grammar is not None:
            allowed_V &= self._matcher.allowed()
            allowed_V[[token for token in self._grammar.end_of_text_ids if token not in ends]] = False
        if self._banned:
            allowed_V[list(self._banned.completing())] = False
        allowed_V[list(forbidden)] = False
        return allowed_V

    def next_allowed(self, forbidden: Collection[int], ends: Collection[int]) -> npt.NDArray[np.bool_] | None:
        """`allowed`; None if the text is complete and no token may follow.

        forbidden: tokens that would end the text before min_tokens. A form takes precedence over them where it needs
        one of the request's stop tokens. Raises GrammarFailure.
        """
        allowed_V = self.allowed(forbidden, ends)
        if forbidden and not allowed_V.any() and not self.may_end:
            allowed_V = self.allowed([token for token in forbidden if token in ends], ends)
        if allowed_V.any():
            return allowed_V
        if not self.may_end:
            raise GrammarFailure(DEAD_END)
        return None

    def accept(self, token: int, data: bytes) -> None:
        """Advance by a token whose bytes are `data`. Raises GrammarFailure."""
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._banned:
            self._banned.push(data)


def is_constrained(request: GenerationRequest) -> bool:
    """Whether a request has a constraint."""
    return request.grammar is not None or request.allowed_token_ids is not None or bool(request.bad_words)
