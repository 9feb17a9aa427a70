"""The reference step's KV cache: address space for one context per slot, memory for the tokens that it holds.

`slots.py` records which tokens each slot holds and assigns slots to sequences.

Shapes: S positions of the context, G key/value heads, K head dimension.
"""

import math
import mmap

import torch
from transformers import PreTrainedConfig


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all layers."""
    heads, head_dim = config.num_key_value_heads, config.head_dim
    return int(2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize)


class KeyValueCache:
    """Keys and values, for each layer a tensor (slots, G, S, K).

    On a CPU, virtual memory is reserved at once; pages are committed as slots fill, and given back by `release`.
    """

    def __init__(self, config: PreTrainedConfig, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.context_length = slots, config.max_position_embeddings
        shape = (slots, config.num_key_value_heads, self.context_length, config.head_dim)
        self._slot_bytes = math.prod(shape[1:]) * dtype.itemsize
        tensors = 2 * config.num_hidden_layers
        if device.type == "cpu":
            # Anonymous memory: zero pages, committed at the first write.
            size, private = max(1, slots * self._slot_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._maps = [mmap.mmap(-1, size, flags=private) for _ in range(tensors)]
            made = [torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape) for memory in self._maps]
        else:
            self._maps = []
            made = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(tensors)]
        # Zeros, not uninitialized memory: attention weighs positions beyond a sequence's end by 0, and 0 * NaN is NaN.
        self.keys, self.values = made[::2], made[1::2]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot, in which a failed computation may have left non-finite values."""
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the operating system; pages that it shares with a neighbor stay."""
        first = -(-slot * self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (slot + 1) * self._slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTNEED, first, last - first)
