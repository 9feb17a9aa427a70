"""Int8 weights: one signed byte per weight and one float32 scale per output channel (per token for the embedding).

`quantize` and `dequantize` swap the layers of a model in memory; `model/weights/int4.py` has layers of half the size,
and `model/quantization.py` writes files and measures quality.

On x86 CPUs large layers multiply in int8 (FBGEMM, activations quantized to 7 bits per token). Small layers, other
devices and torch.compile dequantize the weights. Quantization is per token, so results do not depend on the rest of the
batch, and cached logits equal uncached ones; torch's dynamic quantization (`linear_dynamic`) uses one range per batch
and loses both properties. Measurements: `bench/LOG.md`.

Shapes: N output channels (or tokens of the vocabulary), K inputs, M rows of activations.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

SCHEME = "int8 weights, symmetric, one float32 scale per output channel; norms in full precision"
INT8_MIN_WEIGHTS = 1 << 19
"""Below this many weights a float32 product beats int8 at batch 1: quantizing activations costs about 20 us."""

M = TypeVar("M", bound=nn.Module)
LinearKind = Callable[[int, int, torch.dtype, torch.device], "QuantizedMatrix"]
"""Makes a layer from N, K, dtype and device."""


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 weights (N, K) and float32 scales (N,) with weight = int8 * scale; the largest weight of a row is +-127."""
    weight_NK = weight_NK.detach().float()
    scale_N = weight_NK.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight_NK / scale_N[:, None]).round().clamp(-127, 127).to(torch.int8), scale_N


class QuantizedMatrix(nn.Module):
    """An (N, K) matrix of integers and scales, as plain buffers `weight` and `weight_scale`: as safetensors stores it.

    On the CPU, `project` keeps a float copy; on other devices it dequantizes the weights in each call.
    """

    precision: str
    """The name of its type, such as "int8"."""
    weight: Tensor
    weight_scale: Tensor
    like: Tensor

    def __init__(self, n: int, k: int, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = n, k
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        # Converted by .to(dtype), so that embeddings have the model's dtype.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=weight.device), persistent=False)
        self._float_NK: Tensor | None = None

    def set_weight(self, weight_NK: Tensor) -> None:
        """Quantize and store `weight_NK`."""
        weight, scale = self._quantized(weight_NK)
        self.weight.copy_(weight)
        self.weight_scale.copy_(scale)
        self._forget()

    def dequantized(self) -> Tensor:
        """The matrix (N, K) in the model's dtype."""
        return self._float(self.like.dtype)

    def project(self, x_MK: Tensor) -> Tensor:
        """Activations (..., K) times the transposed matrix: (..., N), in x's dtype."""
        if x_MK.device.type != "cpu" or torch.compiler.is_compiling() or x_MK.requires_grad:
            return functional.linear(x_MK, self._float(x_MK.dtype))
        if self._float_NK is None or self._float_NK.dtype != x_MK.dtype:
            self._float_NK = self._float(x_MK.dtype)
        return functional.linear(x_MK, self._float_NK)

    def _quantized(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Integers and scales of a matrix."""
        raise NotImplementedError

    def _float(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _forget(self) -> None:
        self._float_NK = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedMatrix":
        exact = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != exact.dtype:  # .to(bfloat16) would round the scales to 3 digits
            self.weight_scale = exact.to(self.weight.device)
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_float_NK": None}

    def extra_repr(self) -> str:
        """Shape, as `print(model)` shows it."""
        return f"{(self.out_features, self.in_features)}, {self.precision}"


class Int8Matrix(QuantizedMatrix):
    """In int8; on x86 CPUs large matrices multiply in int8."""

    precision = "int8"

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        weight = torch.zeros(n, k, dtype=torch.int8, device=device)
        super().__init__(n, k, weight, torch.ones(n, device=device), dtype)
        self._packed: Any = None

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: ids (...) to (..., K)."""
        return (functional.embedding(ids, self.weight) * self.weight_scale[ids].unsqueeze(-1)).to(self.like.dtype)

    def project(self, x_MK: Tensor) -> Tensor:
        """Activations (..., K) times the transposed matrix: (..., N), in x's dtype."""
        is_plain = x_MK.device.type == "cpu" and not torch.compiler.is_compiling() and not x_MK.requires_grad
        is_large = self.weight.numel() >= INT8_MIN_WEIGHTS
        if is_plain and is_large and torch.backends.quantized.engine in ("x86", "fbgemm"):
            return self._project_int8(x_MK)
        return super().project(x_MK)

    def _project_int8(self, x_MK: Tensor) -> Tensor:
        if self._packed is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # only the tensor type is deprecated, not the kernels
                weight_NK = torch._make_per_channel_quantized_tensor(
                    self.weight, self.weight_scale.double(), torch.zeros(len(self.weight), dtype=torch.long), 0
                )
            self._packed = torch.ops.quantized.linear_prepack(weight_NK, None)
        x32_MK = x_MK.float()
        largest_M = x32_MK.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        # Scale 1/63 and zero point 64 use 7 bits (1 to 127). With 8 bits, FBGEMM's AVX2 kernel saturates when it adds
        # two products in int16: ones times 127 over K = 256 gave 257 instead of 32,512.
        y_MN = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x32_MK / largest_M, 1 / 63, 64, self._packed
        )
        return y_MN.mul_(largest_M).to(x_MK.dtype)

    def _quantized(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_weight(weight_NK)

    def _float(self, dtype: torch.dtype) -> Tensor:
        # Scale before casting: in float16, sums over unscaled int8 weights overflow.
        return (self.weight.float() * self.weight_scale[:, None]).to(dtype)

    def _forget(self) -> None:
        super()._forget()
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}


class Int8Linear(Int8Matrix):
    """Replaces `nn.Linear` without bias."""

    def forward(self, x_MK: Tensor) -> Tensor:
        """Shape (..., K) to (..., N)."""
        return self.project(x_MK)


class Int8Embedding(Int8Matrix):
    """Replaces `nn.Embedding`."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) to (..., K)."""
        return self.rows(ids)


class TiedInt8Head(nn.Module):
    """A language-model head that shares the embedding's table and has no parameters of its own."""

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, so that the table is saved and moved once

    def forward(self, x_MK: Tensor) -> Tensor:
        """Shape (..., K) to (..., V)."""
        return self._table[0].project(x_MK)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` holds quantized weights."""
    return any(isinstance(module, QuantizedMatrix) for module in model.modules())


def precision_name(model: PreTrainedModel) -> str:
    """The type of weights and activations: "float32", "bfloat16", "int8" (activations float32), "int8, bfloat16".

    Of a model with layers of several types, the one with the fewest bits.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    found = {module.precision for module in model.modules() if isinstance(module, QuantizedMatrix)}
    if not found:
        return dtype
    name = min(found)  # "int4" before "int8"
    return name if dtype == "float32" else f"{name}, {dtype}"


def quantize(model: M, *, values: bool = True, linear: LinearKind | None = None) -> M:
    """Swap every bias-free linear layer and the embedding for int8 ones, in place; tied weights stay one table.

    values=False leaves the weights at zero; load a state dict afterwards.
    linear: of the decoder layers; default Int8Linear. Embedding and head are int8.
    Raises ValueError if a linear layer has a bias.
    """
    swapped: dict[int, QuantizedMatrix] = {}
    # Embeddings come first in a decoder, so a tied head finds its table in `swapped`.
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if getattr(module, "bias", None) is not None:
            raise ValueError(f"{name} has a bias: int8 supports only linear layers without one")
        weight = module.weight
        tied = swapped.get(id(weight))
        if isinstance(tied, Int8Embedding):
            model.set_submodule(name, TiedInt8Head(tied))
            continue
        n, k = weight.shape
        if isinstance(module, nn.Embedding):
            matrix: QuantizedMatrix = Int8Embedding(n, k, weight.dtype, weight.device)
        else:
            is_head = name == "lm_head"
            matrix = (Int8Linear if is_head or linear is None else linear)(n, k, weight.dtype, weight.device)
        if values:
            matrix.set_weight(weight)
        swapped[id(weight)] = matrix
        model.set_submodule(name, matrix)
    return model.eval()


def dequantize(model: M) -> M:
    """Swap quantized layers back for float ones in the model's dtype, in place; a tied head shares the embedding."""
    tables: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedMatrix):
            weight = tables[id(module)] = nn.Parameter(module.dequantized(), requires_grad=False)
        elif isinstance(module, TiedInt8Head):
            weight = tables[id(module._table[0])]
        else:
            continue
        n, k = weight.shape
        plain: nn.Module = (
            nn.Embedding(n, k, device="meta")
            if isinstance(module, Int8Embedding)
            else nn.Linear(k, n, bias=False, device="meta")
        )
        plain.weight = weight
        model.set_submodule(name, plain)
    return model.eval()


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, quantized or not; tied ones once, scales not counted."""
    matrices = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    quantized = sum(matrix.out_features * matrix.in_features for matrix in matrices)
    return quantized + sum(parameter.numel() for parameter in model.parameters())
