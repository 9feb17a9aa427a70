"""The text of a request's tokens, and stop strings in it, also across token boundaries.

Text that may be the beginning of a stop string is held back until later tokens decide.
"""

from collections.abc import Sequence

from model.generation.detokenizer import Detokenizer
from model.generation.requests import GenerationRequest


class StopStrings:
    """Finds the first of several stop strings in streamed text.

    is_included: keep the stop string in the text. until: search only the text before this string.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool = False, until: str | None = None) -> None:
        self._stops, self._is_included, self._until = tuple(stops), is_included, until or ""
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True, is_last: bool = False) -> tuple[str, str | None]:
        """Text that can be emitted, and the stop string found after it, else None.

        may_stop=False: a stop string completed by this text counts as ordinary text. is_last: no more text follows.
        """
        if not self._stops:
            return text, None
        self._held += text
        end, is_over = self._searchable(is_last=is_last)
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop, 0, end)) >= 0]
        if found and may_stop:
            at, stop = min(found)
            kept, self._held = self._held[: at + len(stop) if self._is_included else at], ""
            return kept, stop
        if is_over:
            self._stops = ()
            return self.flush(), None
        # Ignore this match: continue the search after its first character.
        start = max((at + 1 for at, _ in found), default=0)
        keep = next(at for at in range(start, end + 1) if at == end or self._may_begin(self._held[at:]))
        kept, self._held = self._held[:keep], self._held[keep:]
        return kept, None

    def flush(self) -> str:
        """Return the held-back text at the end of the generation."""
        rest, self._held = self._held, ""
        return rest

    def _searchable(self, *, is_last: bool) -> tuple[int, bool]:
        """Characters of the held text to search, which exclude `until` or a possible start of it; whether it occurs."""
        if not self._until:
            return len(self._held), False
        if (at := self._held.find(self._until)) >= 0:
            return at, True
        begun = (n for n in range(len(self._until) - 1, 0, -1) if self._held.endswith(self._until[:n]))
        return len(self._held) - (0 if is_last else next(begun, 0)), False

    def _may_begin(self, text: str) -> bool:
        return not text or any(stop.startswith(text) for stop in self._stops)


class GeneratedText:
    """The text of one request, token by token, up to its first stop string."""

    def __init__(self, request: GenerationRequest, token_bytes: Sequence[bytes]) -> None:
        self._characters = Detokenizer(token_bytes)
        self._stops = StopStrings(request.stop, is_included=request.include_stop, until=request.stop_until)

    def push(self, token: int, *, may_stop: bool) -> tuple[str, str | None]:
        """Text that no later token can change, and the stop string found after it, else None."""
        return self._stops.push(self._characters.push(token), may_stop=may_stop)

    def push_all(self, tokens: Sequence[int]) -> str:
        """The text of several tokens of a request without stop strings, as `push`."""
        return self._characters.push_all(tokens)

    def end(self) -> tuple[str, str | None]:
        """The held-back text, and the stop string found after it. Bytes of an incomplete character become U+FFFD."""
        rest, stop = self._stops.push(self._characters.flush(), is_last=True)
        return (rest, stop) if stop is not None else (rest + self._stops.flush(), None)
