"""Which tokens each slot of a step holds, and which slot a new prompt gets: prefix reuse.

A slot that a sequence leaves keeps its tokens, so that a later prompt with the same prefix starts behind it; the least
recently used slot is overwritten first. Keys and values themselves are the step's.
"""

import numpy as np

from model.generation.step import Step

SHORTEST_REUSE = 16
"""Shortest shared prefix, in tokens, worth reusing; copying a shorter one costs as much as computing it again."""


class SlotTable:
    """The tokens whose keys and values a step holds, slot by slot."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.slots = step.slots
        self._ids = np.zeros((step.slots, step.context_length), dtype=np.int64)
        self._lengths = np.zeros(step.slots, dtype=np.int64)
        self._used = np.zeros(step.slots, dtype=np.int64)
        self._clock = 0

    def length(self, slot: int) -> int:
        """Tokens of the slot whose keys and values are held."""
        return int(self._lengths[slot])

    def append(self, slot: int, ids: np.ndarray) -> None:
        """Note that keys and values of these tokens now follow those that the slot holds."""
        start = self._lengths[slot]
        self._ids[slot, start : start + len(ids)] = ids
        self._lengths[slot] += len(ids)

    def truncate(self, slot: int, length: int) -> None:
        """Forget what a slot holds from position `length` on."""
        if length < self._lengths[slot]:
            self._lengths[slot] = length
            self._step.truncate(slot, length)

    def clear(self, slot: int) -> None:
        """Forget all that a slot holds, numbers included: a failed computation may have left non-finite ones."""
        self._lengths[slot] = 0
        self._step.clear(slot)

    def take(self, free: list[int], prompt_ids: np.ndarray, *, reuse: bool) -> tuple[int, int]:
        """One of the `free` slots for a prompt, and how many of its tokens the slot already holds.

        At least the prompt's last token is left to compute: its logits are the answer's first. reuse=False starts
        empty.
        """
        shared = self._shared_prefixes(prompt_ids[:-1])
        # Among equally old slots the lowest: neighboring slots decode in one call of attention.
        slot = min(free, key=lambda slot: (self._used[slot], slot))
        source = int(shared.argmax())
        length = int(shared[source]) if reuse and shared[source] >= SHORTEST_REUSE else 0
        if length and source in free and (length >= self._lengths[source] // 2 or source == slot):
            slot = source
        elif length:
            self._step.copy(source, slot, length)
            self._ids[slot, :length] = prompt_ids[:length]
            self._lengths[slot] = length
        self.truncate(slot, length)
        self.touch(slot)
        return slot, length

    def longest_shared(self, prompt_ids: np.ndarray) -> int:
        """Length of the longest prefix of a prompt that some slot holds."""
        return int(self._shared_prefixes(prompt_ids[:-1]).max())

    def touch(self, slot: int) -> None:
        """Mark a slot as the one used last."""
        self._clock += 1
        self._used[slot] = self._clock

    def _shared_prefixes(self, ids: np.ndarray) -> np.ndarray:
        """For each slot, the length of its common prefix with `ids`."""
        differs = self._ids[:, : len(ids)] != ids
        equal = np.where(differs.any(axis=1), differs.argmax(axis=1), len(ids)) if len(ids) else 0
        return np.minimum(equal, self._lengths)
