"""Slot allocation with prefix reuse: records the tokens of each slot and assigns slots to prompts.

A finished sequence leaves its tokens in the slot, so that a later prompt with the same prefix can reuse them; the least
recently used slot is overwritten first. The step holds the keys and values themselves.
"""

import numpy as np

from model.generation.speculation.draft import Draft
from model.generation.steps.step import Step

MIN_REUSED_TOKENS = 16
"""Shortest shared prefix, in tokens, worth reusing; copying a shorter one costs as much as computing it again."""


class SlotTable:
    """The tokens whose keys and values a step holds, slot by slot. draft: holds those of the same texts."""

    def __init__(self, step: Step, draft: Draft | None = None) -> None:
        self._step = step
        self._caches: tuple[Step | Draft, ...] = (step, draft) if draft else (step,)
        self.slots = step.slots
        self._ids = np.zeros((step.slots, step.context_length), dtype=np.int64)
        self._lengths = np.zeros(step.slots, dtype=np.int64)
        self._used = np.zeros(step.slots, dtype=np.int64)
        self._clock = 0

    def length(self, slot: int) -> int:
        """Tokens of the slot whose keys and values are held."""
        return int(self._lengths[slot])

    def append(self, slot: int, ids: np.ndarray) -> None:
        """Record that the slot now holds keys and values of these tokens too."""
        start = self._lengths[slot]
        self._ids[slot, start : start + len(ids)] = ids
        self._lengths[slot] += len(ids)

    def truncate(self, slot: int, length: int) -> None:
        """Drop the slot's tokens from position `length` on."""
        if length < self._lengths[slot]:
            self._lengths[slot] = length
            self._truncate(slot, length)

    def trim(self, slot: int, computed: int) -> None:
        """Free the memory of positions up to `computed` that hold no token of the slot: those of rejected proposals."""
        length = self.length(slot)
        if self.pages(length) < self.pages(computed):
            self._truncate(slot, length)

    def clear(self, slot: int) -> None:
        """Empty a slot and zero its memory, in which a failed computation may have left non-finite values."""
        self._lengths[slot] = 0
        for cache in self._caches:
            cache.clear(slot)

    def take(self, free: list[int], prompt_ids: np.ndarray, *, reuse: bool) -> tuple[int, int]:
        """Assign one of the `free` slots to a prompt; returns the slot and its number of reusable tokens.

        The prompt's last token is always computed, as its logits give the first new token. reuse=False starts empty.
        """
        shared = self._shared_prefixes(prompt_ids[:-1])
        # Ties go to the lowest slot: neighboring slots share one attention call.
        slot = min(free, key=lambda slot: (self._used[slot], slot))
        source = int(shared.argmax())
        length = int(shared[source]) if reuse else 0
        if length and source in free and (length >= self._lengths[source] // 2 or source == slot):
            slot = source
        elif length:
            for cache in self._caches:
                cache.copy(source, slot, length)
            self._ids[slot, :length] = prompt_ids[:length]
            self._lengths[slot] = length
        self.truncate(slot, length)
        self.touch(slot)
        return slot, length

    def free_memory(self, free: list[int], most: int) -> None:
        """Empty `free` slots, the least recently used first, until together they hold at most `most` tokens.

        The one used last stays the longest: another may have been copied from it.
        """
        held = {slot: self.pages(self.length(slot)) for slot in free}
        for slot in sorted(free, key=lambda slot: self._used[slot]):
            if sum(held.values()) <= most:
                return
            self.truncate(slot, 0)
            held[slot] = 0

    @property
    def held_tokens(self) -> int:
        """Tokens whose memory all slots take."""
        return sum(self.pages(self.length(slot)) for slot in range(self.slots))

    def pages(self, tokens: int) -> int:
        """Tokens whose memory a slot with that many takes: whole pages."""
        page = self._step.page_tokens
        return -(-tokens // page) * page

    def longest_shared(self, prompt_ids: np.ndarray) -> int:
        """Length of a prompt's longest cached prefix."""
        return int(self._shared_prefixes(prompt_ids[:-1]).max())

    def touch(self, slot: int) -> None:
        """Mark a slot as most recently used."""
        self._clock += 1
        self._used[slot] = self._clock

    def _truncate(self, slot: int, length: int) -> None:
        for cache in self._caches:
            cache.truncate(slot, length)

    def _shared_prefixes(self, ids: np.ndarray) -> np.ndarray:
        """For each slot, the length of its common prefix with `ids`; 0 where it is too short to be reused."""
        shared = np.zeros(self.slots, dtype=np.int64)
        if len(ids) < MIN_REUSED_TOKENS:
            return shared
        # Most slots differ within a few tokens: only the others are compared whole.
        begins = (self._ids[:, :MIN_REUSED_TOKENS] == ids[:MIN_REUSED_TOKENS]).all(axis=1) & (
            self._lengths >= MIN_REUSED_TOKENS
        )
        if begins.any():
            differs = self._ids[begins, : len(ids)] != ids
            equal = np.where(differs.any(axis=1), differs.argmax(axis=1), len(ids))
            shared[begins] = np.minimum(equal, self._lengths[begins])
        return shared
