"""The reference step's KV cache: preallocated, one slot of full context length per sequence.

`slots.py` records which tokens each slot holds and assigns slots to sequences.

Shapes: S positions of the context, G key/value heads, K head dimension.
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all layers."""
    heads, head_dim = config.num_key_value_heads, config.head_dim
    return int(2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize)


class KeyValueCache:
    """Keys and values, for each layer a tensor (slots, G, S, K).

    Virtual memory is reserved at once; pages are committed as slots fill.
    """

    def __init__(self, config: PreTrainedConfig, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.context_length = slots, config.max_position_embeddings
        shape = (slots, config.num_key_value_heads, self.context_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [_zeros(shape, dtype, device) for _ in layers]
        self.values = [_zeros(shape, dtype, device) for _ in layers]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot, in which a failed computation may have left non-finite values."""
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not uninitialized memory: attention weighs positions beyond a sequence's end by 0, and 0 * NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's calloc gets zero pages, committed on first write; torch.zeros writes all of them at once.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
