"""Stop strings, also across token boundaries.

Text that may be the beginning of a stop string is held back until later tokens decide.
"""

from collections.abc import Sequence


class StopStrings:
    """Finds the first of several stop strings in streamed text. is_included: keep the stop string in the text."""

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        self._stops, self._is_included = tuple(stops), is_included
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that can be emitted, and the stop string found after it, else None.

        may_stop=False: a stop string completed by this text counts as ordinary text.
        """
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found and may_stop:
            at, stop = min(found)
            kept, self._held = self._held[: at + len(stop) if self._is_included else at], ""
            return kept, stop
        # Ignore this match: continue the search after its first character.
        start = max((at + 1 for at, _ in found), default=0)
        keep = next(at for at in range(start, len(self._held) + 1) if self._may_begin(self._held[at:]))
        kept, self._held = self._held[:keep], self._held[keep:]
        return kept, None

    def flush(self) -> str:
        """Return the held-back text at the end of the generation."""
        rest, self._held = self._held, ""
        return rest

    def _may_begin(self, text: str) -> bool:
        return not text or any(stop.startswith(text) for stop in self._stops)
