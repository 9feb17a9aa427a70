"""The model that an exported file is, computed from the checkpoint and never read from the file.

The engine of a file is compared with REX in the numbers that its format prescribes (`model/export/parity.py`): weights
rounded to it and, in int8, activations rounded for each token. The remaining difference is the engine's own arithmetic;
the loss from rounding is reported separately.

Shapes: M rows of activations, N output channels (or tokens of the vocabulary), K inputs, G groups of BLOCK inputs.
"""

import copy

import torch
from torch import Tensor

from model.export.gguf import BLOCK
from model.modeling_rex import RexForCausalLM
from model.weights import int4, int8

ROUNDED = ("int8", "q8_0", "q4_0")
"""Precisions in which a file is another model than the checkpoint."""


@torch.no_grad()
def as_stored(model: RexForCausalLM, precision: str) -> RexForCausalLM:
    """A copy of `model` in float32 with the values that a file of `precision` holds.

    precision: "int8", as compressed-tensors has it, "q8_0" or "q4_0"; with any other the values are the checkpoint's.
    """
    stored = copy.deepcopy(model).float()
    for name, weight in stored.named_parameters():
        if precision == "int8" and name.endswith("_proj.weight"):
            integers_NK, scale_N = int8.quantize_weight(weight)
            weight.copy_(integers_NK * scale_N.to(model.dtype).float()[:, None])
        elif precision in ("q8_0", "q4_0") and weight.dim() == 2 and weight.shape[1] % BLOCK == 0:
            weight.copy_(_q4_0(weight) if precision == "q4_0" and ".layers." in name else _q8_0(weight))
    if precision == "int8":
        for name, layer in stored.named_modules():
            if name.endswith("_proj"):
                layer.register_forward_pre_hook(lambda _, inputs: _int8_activations(inputs[0]))
    return stored


def _int8_activations(x_MK: Tensor) -> Tensor:
    """Activations (..., K) in 8 bits with one scale for each token, as compressed-tensors rounds them."""
    scale_M1 = x_MK.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x_MK.dtype).tiny) / 127.5
    return (x_MK / scale_M1).round().clamp(-128, 127) * scale_M1


def _q8_0(weight_NK: Tensor) -> Tensor:
    """Values of Q8_0 (N, K): integers of -127 to 127 times a float16 scale for each group of BLOCK inputs."""
    groups_NGI = weight_NK.unflatten(-1, (-1, BLOCK))
    scale_NG1 = groups_NGI.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    ratio_NGI = groups_NGI * (1 / scale_NG1)
    values_NGI = ratio_NGI.sign() * (ratio_NGI.abs() + 0.5).floor()  # half away from zero, as the format has it
    return (values_NGI * scale_NG1.half().float()).flatten(-2)


def _q4_0(weight_NK: Tensor) -> Tensor:
    """Values (N, K) of `model/weights/int4.py` with the float16 scales of Q4_0."""
    packed, scale_NG = int4.quantize_weight(weight_NK)
    return int4.dequantize_weight(packed, scale_NG.half())
