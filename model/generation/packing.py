"""Weights laid out for few rows at a time: what decoding multiplies with on a CPU.

torch's float32 product takes 3 times as long for 8 rows as for one; oneDNN's kernels on weights that they have reordered
take 1.4 times (`bench/LOG.md`). Each layer packed gives the same numbers up to the order of their sums.

Shapes: N output features, K inputs, M rows.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

PACKED_MIN_WEIGHTS = 1 << 18
"""Below this many weights torch's own product is as fast."""
ROWS = 16
"""Rows that the layout is chosen for; any number can be multiplied."""

M = TypeVar("M", bound=nn.Module)


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear` without bias for inference in float32 on the CPU."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), ROWS)

    def forward(self, x_MK: Tensor) -> Tensor:
        """Shape (..., K) to (..., N)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, self._packed, None, "none", [], "")
        return out

    def extra_repr(self) -> str:
        """Shape, as `print(model)` shows it."""
        return f"{self.in_features}, {self.out_features}, packed"


def pack(model: M) -> M:
    """Swap large linear layers for packed ones, in place, where that is faster; elsewhere the model stays as it is.

    The model keeps no reference to the weights it had, but for an embedding that shares one.
    """
    if not torch.backends.mkldnn.is_available():
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and getattr(module, "bias", None) is None and _is_faster(module.weight):
            model.set_submodule(name, PackedLinear(module.weight))
    return model


def _is_faster(weight_NK: Tensor) -> bool:
    return (
        weight_NK.device.type == "cpu" and weight_NK.dtype == torch.float32 and weight_NK.numel() >= PACKED_MIN_WEIGHTS
    )
