"""Int4 weights: two per byte, and one bfloat16 scale for each group of 32 inputs of an output channel.

A linear layer whose inputs are not whole groups stays in int8, as do the embedding and the head, where four bits cost
most (`bench/LOG.md`). The scales are the same as GGUF's Q4_0 up to their type, so an export keeps each weight.

Shapes: N output channels, K inputs, G groups of an output channel, M rows of activations.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from model.weights import int8
from model.weights.int8 import Int8Linear, QuantizedMatrix

SCHEME = (
    "int4 weights, symmetric, one bfloat16 scale per 32 inputs of an output channel; embedding and head in int8; norms "
    "in full precision"
)
GROUP = 32
"""Inputs that share a scale."""
ZERO = 8
"""The stored value of a weight of 0: values are 0 to 15, weights -8 to 7 times the scale."""
_FACTORS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 8 / 7)
"""Scales that are tried, as multiples of the one that maps a group's largest weight to -8: smaller ones clip it, the
last one maps it to -7 or 7."""

M = TypeVar("M", bound=nn.Module)


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Int4 weights (N, K / 2) uint8, the even inputs in the low bits, and bfloat16 scales (N, G).

    weight = (value - 8) * scale. A group's scale is the one of those tried that leaves the least squared error; its
    sign is such that the largest weight can be -8, the end with one more value. Raises ValueError if K is not a
    multiple of GROUP.
    """
    n, k = weight_NK.shape
    if k % GROUP:
        raise ValueError(f"{k} inputs: int4 needs a multiple of {GROUP}")
    groups_NGI = weight_NK.detach().float().reshape(n, k // GROUP, GROUP)
    low, high = groups_NGI.amin(dim=-1), groups_NGI.amax(dim=-1)
    base_NG = torch.where(high > -low, -high, -low) / ZERO
    best_NG = torch.full_like(base_NG, torch.inf)
    scale_NG = torch.zeros_like(base_NG)
    for factor in _FACTORS:
        for signed in (factor, -factor):
            tried_NG = (base_NG * signed).to(torch.bfloat16).float()
            error_NG = (_values(groups_NGI, tried_NG).sub_(ZERO) * tried_NG[..., None] - groups_NGI).square_().sum(-1)
            is_better = error_NG < best_NG
            best_NG = torch.where(is_better, error_NG, best_NG)
            scale_NG = torch.where(is_better, tried_NG, scale_NG)
    values = _values(groups_NGI, scale_NG).to(torch.uint8).reshape(n, k // 2, 2)
    return values[..., 0] | values[..., 1] << 4, scale_NG.to(torch.bfloat16)


def dequantize_weight(packed: Tensor, scale_NG: Tensor) -> Tensor:
    """The matrix (N, K), float32, of what `quantize_weight` returns."""
    values_NGI = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(*scale_NG.shape, GROUP)
    return ((values_NGI.float() - ZERO) * scale_NG.float()[..., None]).flatten(-2)


def _values(groups_NGI: Tensor, scale_NG: Tensor) -> Tensor:
    inverse_NG = torch.where(scale_NG == 0, 0.0, 1 / scale_NG)
    return (groups_NGI * inverse_NG[..., None]).round_().add_(ZERO).clamp_(0, 15)


class Int4Linear(QuantizedMatrix):
    """Replaces `nn.Linear` without bias."""

    precision = "int4"

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        weight = torch.full((n, k // 2), ZERO | ZERO << 4, dtype=torch.uint8, device=device)
        super().__init__(n, k, weight, torch.ones(n, k // GROUP, dtype=torch.bfloat16, device=device), dtype)

    def forward(self, x_MK: Tensor) -> Tensor:
        """Shape (..., K) to (..., N)."""
        return self.project(x_MK)

    def _quantized(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_weight(weight_NK)

    def _float(self, dtype: torch.dtype) -> Tensor:
        return dequantize_weight(self.weight, self.weight_scale).to(dtype)


def quantize(model: M, *, values: bool = True) -> M:
    """Swap every bias-free linear layer for an int4 one, if its inputs allow it, else for an int8 one, in place.

    values, and ValueError: as `int8.quantize`.
    """
    return int8.quantize(model, values=values, linear=_linear)


def _linear(n: int, k: int, dtype: torch.dtype, device: torch.device) -> QuantizedMatrix:
    kind = Int8Linear if k % GROUP else Int4Linear
    return kind(n, k, dtype, device)
