"""Linear and RMSNorm replacements for CPU decoding in the reference step, weights pre-packed for small batches.

torch's float32 product takes 3 times as long for 8 rows as for one; oneDNN's kernels on weights that they have
reordered take 1.4 times. An RMSNorm costs its eight kernel calls; the replacement makes three (`bench/LOG.md`). Both
give the original's numbers up to the order of summation.

Shapes: N output features, K inputs, M rows, D hidden size.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.modeling_rex import RexRMSNorm

PACKED_MIN_WEIGHTS = 1 << 18
"""Below this many weights torch's own product is as fast."""
ROWS = 16
"""Rows that the packed layout is optimized for; any number works."""
ROW_STEP = 32
"""Inputs of more than ROWS rows are padded to a multiple of this: oneDNN generates and caches code for each number of
rows, a third of a megabyte per layer."""

M = TypeVar("M", bound=nn.Module)


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear` without bias for inference in float32 on the CPU."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), ROWS)

    def forward(self, x_MK: Tensor) -> Tensor:
        """Shape (..., M, K) to (..., M, N)."""
        rows = x_MK.shape[-2]
        missing = -rows % ROW_STEP if rows > ROWS else 0
        if missing:
            x_MK = functional.pad(x_MK, (0, 0, 0, missing))
        out_MN: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, self._packed, None, "none", [], "")
        return out_MN[..., :rows, :] if missing else out_MN

    def extra_repr(self) -> str:
        """Shape, as `print(model)` shows it."""
        return f"{self.in_features}, {self.out_features}, packed"


class PackedRMSNorm(nn.Module):
    """Takes the place of a `RexRMSNorm` for inference in float32 on the CPU: the mean square is a norm's square."""

    _eps: Tensor

    def __init__(self, norm: RexRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("_eps", torch.tensor(norm.eps), persistent=False)

    def forward(self, x_MD: Tensor) -> Tensor:
        """Shape (..., D) in and out."""
        length_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True)
        scale_M1 = torch.addcmul(self._eps, length_M1, length_M1, value=1 / x_MD.shape[-1]).rsqrt_()
        return torch.mul(x_MD, scale_M1).mul_(self.weight)


def pack(model: M) -> M:
    """Swap norms and large linear layers for those above, in place, if that is faster; else the model stays.

    The model keeps no reference to the weights it had, but for an embedding that shares one.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, RexRMSNorm) and _is_float32_on_cpu(module.weight):
            model.set_submodule(name, PackedRMSNorm(module))
        elif isinstance(module, nn.Linear) and getattr(module, "bias", None) is None and _is_faster(module.weight):
            model.set_submodule(name, PackedLinear(module.weight))
    return model


def _is_float32_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _is_faster(weight_NK: Tensor) -> bool:
    is_large = weight_NK.numel() >= PACKED_MIN_WEIGHTS
    return is_large and _is_float32_on_cpu(weight_NK) and torch.backends.mkldnn.is_available()
