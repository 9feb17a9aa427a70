"""Cross entropy of rows of logits and its gradient, which takes their place, as a Triton kernel for GPUs.

One program for each row reads its logits twice, the second time from the cache, and writes the gradient once; PyTorch's
operations for the same read and write them in float32 some eight times. Legend: `R` rows, `V` vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _cross_entropy(logits, labels, losses, size, z_loss, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x, label = logits + row * size, tl.load(labels + row)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        for start in range(0, size, BLOCK):
            tl.store(x + start + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=start + at < size)
    else:
        # Read before the sums below, after which all threads have passed here: one of them overwrites it.
        at_label = tl.load(x + label).to(tl.float32)
        # Of every BLOCK-th logit; finite, so that places without one add exp(-infinity) and not NaN.
        highest, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            value = tl.load(x + start + at, mask=start + at < size, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, value)
            total = total * tl.exp(highest - higher) + tl.exp(value - higher)
            highest = higher
        most = tl.max(highest, axis=0)
        weight = tl.sum(total * tl.exp(highest - most), axis=0)
        normalizer = most + tl.log(weight)
        tl.store(losses + row, normalizer - at_label + z_loss * normalizer * normalizer)
        factor = (1.0 + 2.0 * z_loss * normalizer) / weight
        for start in range(0, size, BLOCK):
            value = tl.load(x + start + at, mask=start + at < size, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(value - most) * factor
            gradient = tl.where(start + at == label, gradient - 1.0, gradient)
            tl.store(x + start + at, gradient.to(x.dtype.element_ty), mask=start + at < size)


def cross_entropy_(logits_RV: Tensor, labels_R: Tensor, z_loss: float, ignored: int) -> Tensor:
    """Cross entropy and z-loss of each row, float32; 0 where the label is `ignored`. The logits, contiguous, become its
    gradient, in their dtype.
    """
    losses_R = torch.empty(len(logits_RV), dtype=torch.float32, device=logits_RV.device)
    size = logits_RV.shape[1]
    block = min(BLOCK, triton.next_power_of_2(size))
    _cross_entropy[(len(logits_RV),)](logits_RV, labels_R, losses_R, size, float(z_loss), ignored, block, num_warps=8)
    return losses_R
