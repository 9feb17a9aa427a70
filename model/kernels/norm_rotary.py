"""RMSNorm and rotary embeddings for training on a CPU, forward and backward written by hand.

PyTorch composes both of many passes over memory on a CPU. `use_cpu_kernels` gives them to a model's modules, which use
them while they train in float32 or under autocast; on GPUs, and compiled, PyTorch's own are faster.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.modeling_rex import RexAttention, RexRMSNorm, rotate


def use_cpu_kernels(model: nn.Module) -> None:
    """Run the norms and rotary embeddings of `model` on these kernels if they make CPU training faster."""
    for module in model.modules():
        if isinstance(module, RexRMSNorm):
            module.kernel = rms_norm
        elif isinstance(module, RexAttention):
            module.rotary_kernel = rotary


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """The norm with its weight, or None to use PyTorch's."""
    if not _applies(x_BTD):
        return None
    # Under autocast the residual stream is in float32, the branches are not, and a norm stands between the two.
    into_branch = torch.is_autocast_enabled("cpu") and x_BTD.dtype == torch.float32
    dtype = torch.get_autocast_dtype("cpu") if into_branch else torch.float32
    normed_BTD: Tensor = _ScaledRMSNorm.apply(x_BTD, weight_D, eps, dtype)
    return normed_BTD


def rotary(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of the model; its backward pass is the rotation by the opposite angle."""
    if not _applies(x_BHTK):
        return rotate(x_BHTK, cos, sin)
    rotated_BHTK: Tensor = _Rotary.apply(x_BHTK, cos, sin)
    return rotated_BHTK


def _applies(x: Tensor) -> bool:
    """Ignores is_grad_enabled() on purpose: activation checkpointing recomputes the forward pass the same way."""
    takes = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu"))
    return takes and not x.is_cuda and not torch.compiler.is_compiling()


class _ScaledRMSNorm(torch.autograd.Function):
    """RMSNorm with its weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        norm = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x_BTD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_BTD, weight_D, scale)
        return (x_BTD.float() * scale).mul_(weight_D).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x_BTD, weight_D, scale = ctx.saved_tensors
        x32_BTD, grad_BTD = x_BTD.float(), grad_BTD.float()
        product_BTD = grad_BTD * x32_BTD
        rows, size = product_BTD.reshape(-1, x_BTD.shape[-1]), x_BTD.shape[-1]
        # d weight = sum over rows of grad * x * scale, and d scale needs grad * x weighted: two small products.
        grad_weight_D = torch.mv(rows.t(), scale.reshape(-1))
        dot = torch.mv(rows, weight_D).view_as(scale)
        along = dot.mul_(scale.pow(3)).div_(-size)
        grad_x_BTD = (grad_BTD * weight_D).mul_(scale).addcmul_(x32_BTD, along)
        return grad_x_BTD.to(x_BTD.dtype), grad_weight_D, None, None


class _Rotary(torch.autograd.Function):
    """The rotation, without the copies of `cat` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BHTK, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad_BHTK, cos, sin, -1.0), None, None


def _rotated(x_BHTK: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    out_BHTK = torch.empty_like(x_BHTK, dtype=cos.dtype)
    places = (cos.shape[-1], 2 * cos.shape[-1])
    a, b, rest = x_BHTK.to(cos.dtype).tensor_split(places, dim=-1)
    c, d, unturned = out_BHTK.tensor_split(places, dim=-1)
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=d).addcmul_(a, sin, value=direction)
    unturned.copy_(rest)
    return out_BHTK.to(x_BHTK.dtype)
