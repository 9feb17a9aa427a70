"""Penalties and biases of the texts in the slots, on the device: tables at fixed addresses, which kernels read.

The tokens of a text are kept by position, not their counts: a step that is computed again changes nothing.

Shapes: S slots, L context length, B biases of a text, R rows of logits, V vocabulary, W words of 32 bits.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.generation.steps.draw import Adjustment
from model.generation.steps.graphs.pages import to_device

MOST_BIASES = 512
"""Of one text; one with more takes its tokens on the host."""


class Tables(NamedTuple):
    """What the operation `adjust` reads and writes.

    text_SL: tokens of each text, int32. penalties_S4: repetition, frequency and presence of an `Adjustment`, and the
    tokens of the prompt, float32. biased_SB, bias_SB: tokens, -1 after the last one, and what is added to their logits,
    int32 and float32. counts_RV: zeros before and after each pass, int32. allowed_RW: bits of the tokens that each row
    may choose, the lowest first, int32.
    """

    text_SL: Tensor
    penalties_S4: Tensor
    biased_SB: Tensor
    bias_SB: Tensor
    counts_RV: Tensor
    allowed_RW: Tensor


def words(vocab_size: int) -> int:
    """Numbers that hold a bit for each token."""
    return -(-vocab_size // 32)


def packed(allowed_V: np.ndarray) -> np.ndarray:
    """A mask's bits, (W,) int32."""
    bits = np.packbits(allowed_V, bitorder="little")
    return np.pad(bits, (0, 4 * words(len(allowed_V)) - len(bits))).view(np.int32)


class Adjustments:
    """The adjustments of `slots` texts of up to `context_length` tokens. rows: most rows of logits of a pass."""

    def __init__(self, slots: int, context_length: int, rows: int, vocab_size: int, device: torch.device) -> None:
        def zeros(columns: int, dtype: torch.dtype = torch.int32, rows: int = slots + 1) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=device)

        # The last column ends the list of a text that has the most.
        biases, floats = min(MOST_BIASES, vocab_size) + 1, torch.float32
        self.tables = Tables(
            *(zeros(context_length), zeros(4, floats), zeros(biases), zeros(biases, floats)),
            *(zeros(vocab_size, rows=rows), zeros(words(vocab_size), rows=rows)),
        )
        """Of each slot, and of the one that takes what rows without a text write."""
        self._vocab_size = vocab_size

    def set(self, slot: int, adjustment: Adjustment) -> bool:
        """Adjust the logits of a slot's text; False if it has too many biases, or ones of other tokens."""
        text_SL, penalties_S4, biased_SB, bias_SB, *_ = self.tables
        bias, ids = adjustment.bias, adjustment.prompt_ids
        if len(bias) >= biased_SB.shape[1] or not all(0 <= token < self._vocab_size for token in bias):
            return False
        penalties = (adjustment.repetition, adjustment.frequency, adjustment.presence, len(ids))
        text_SL[slot, : len(ids)] = to_device(ids, torch.int32, text_SL.device)
        penalties_S4[slot] = to_device(penalties, torch.float32, text_SL.device)
        biased_SB[slot] = -1
        biased_SB[slot, : len(bias)] = to_device(list(bias), torch.int32, text_SL.device)
        bias_SB[slot, : len(bias)] = to_device(list(bias.values()), torch.float32, text_SL.device)
        return True
