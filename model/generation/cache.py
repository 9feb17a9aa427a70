"""The slot cache: fixed memory for keys and values, one slot of the whole context for each request at once.

A slot that a request leaves keeps its tokens, so that a later prompt that begins alike starts behind them; the slot left
longest ago is overwritten first. Which request has which slot is the scheduler's business, not known here.

Shapes: S positions of the context, G key/value heads, K head dimension.
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

SHORTEST_REUSE = 16
"""Tokens below which a shared beginning is computed again: looking after it costs as much."""


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that keys and values of one token take over all layers."""
    heads, head_dim = config.num_key_value_heads, config.head_dim
    return int(2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize)


class SlotCache:
    """Keys and values, for each layer a tensor (slots, G, S, K), and the tokens that they belong to.

    Memory is reserved at once and touched as slots fill.
    """

    def __init__(self, config: PreTrainedConfig, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.context_length = slots, config.max_position_embeddings
        shape = (slots, config.num_key_value_heads, self.context_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [_zeros(shape, dtype, device) for _ in layers]
        self.values = [_zeros(shape, dtype, device) for _ in layers]
        self._ids = np.zeros((slots, self.context_length), dtype=np.int64)
        self._lengths = np.zeros(slots, dtype=np.int64)
        self._used = np.zeros(slots, dtype=np.int64)
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
        self._lengths[slot] = min(self._lengths[slot], length)

    def clear(self, slot: int) -> None:
        """Forget all that a slot holds, numbers included: a pass that failed may have left some that are not finite."""
        self.truncate(slot, 0)
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0

    def take(self, free: list[int], prompt_ids: np.ndarray, *, reuse: bool) -> tuple[int, int]:
        """One of the `free` slots for a prompt, and how many of its tokens the slot already holds.

        At least the prompt's last token is left to compute: its logits are the answer's first. reuse=False starts empty.
        """
        shared = self._shared_beginnings(prompt_ids[:-1])
        # Where tokens are equally old, the lowest slot: neighbours decode in one call.
        slot = min(free, key=lambda slot: (self._used[slot], slot))
        source = int(shared.argmax())
        length = int(shared[source]) if reuse and shared[source] >= SHORTEST_REUSE else 0
        if length and source in free and (length >= self._lengths[source] // 2 or source == slot):
            slot = source
        elif length:
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[slot, :, :length] = tensor[source, :, :length]
            self._ids[slot, :length] = prompt_ids[:length]
            self._lengths[slot] = length
        self.truncate(slot, length)
        self.touch(slot)
        return slot, length

    def longest_shared(self, prompt_ids: np.ndarray) -> int:
        """Tokens at the beginning of a prompt that some slot holds."""
        return int(self._shared_beginnings(prompt_ids[:-1]).max())

    def touch(self, slot: int) -> None:
        """Mark a slot as the one used last."""
        self._clock += 1
        self._used[slot] = self._clock

    def _shared_beginnings(self, ids: np.ndarray) -> np.ndarray:
        """For each slot, how many tokens at its beginning equal those of `ids`."""
        differs = self._ids[:, : len(ids)] != ids
        equal = np.where(differs.any(axis=1), differs.argmax(axis=1), len(ids)) if len(ids) else 0
        return np.minimum(equal, self._lengths)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever was there: attention weighs positions that a text has not reached by 0, and 0 * NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages, which take memory when they are written; torch writes all of them at once.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
