"""Stop strings: found across tokens, never part of the text.

Text that could be the beginning of a stop string is held back until it is certain.
"""

from collections.abc import Sequence


class StopStrings:
    """Looks for the first of some strings in a text that comes in pieces. is_included: it stays part of the text."""

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        self._stops, self._is_included = tuple(stops), is_included
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is certain to stay, and the stop string that was found after it, else None.

        may_stop=False: a stop string that is complete with this piece is ordinary text.
        """
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found and may_stop:
            at, stop = min(found)
            kept, self._held = self._held[: at + len(stop) if self._is_included else at], ""
            return kept, stop
        # After a string that may not stop, the search goes on behind its first character.
        start = max((at + 1 for at, _ in found), default=0)
        keep = next(at for at in range(start, len(self._held) + 1) if self._may_begin(self._held[at:]))
        kept, self._held = self._held[:keep], self._held[keep:]
        return kept, None

    def flush(self) -> str:
        """The end of the text: what was held back belongs to it."""
        rest, self._held = self._held, ""
        return rest

    def _may_begin(self, text: str) -> bool:
        return not text or any(stop.startswith(text) for stop in self._stops)
