"""Cross entropy of the next token straight from hidden states: the logits of a vocabulary never exist whole.

A chunk of rows at a time goes through the output embedding, its loss and its gradient are taken, and its logits are
dropped: logits take `rows * V` numbers instead of `B * T * V`, and the backward pass is one multiplication by a scalar.
Source of the idea: Liger-Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989), here in plain PyTorch.
Legend: `B` windows, `T` tokens, `R` rows (predicted tokens), `D` hidden size, `V` vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that is not predicted: Hugging Face's number."""
# Float32 logits held at once: what a processor's cache takes, and what keeps a GPU busy.
CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 30}


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross entropy and z-loss; the gradients are taken in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, z_loss: float, rows: int
    ) -> Tensor:
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden_RD.device)
        for start in range(0, len(hidden_RD), rows):
            part_RD, labels = hidden_RD[start : start + rows], labels_R[start : start + rows, None]
            counted = labels != IGNORED
            labels = labels.clamp(min=0)
            logits_RV = (part_RD @ weight_VD.t()).float()
            at_label = logits_RV.gather(1, labels)
            highest, most_likely = logits_RV.max(dim=1, keepdim=True)
            slope_RV = torch.softmax(logits_RV, dim=1)
            # Log sum exp by way of the most likely token, whose probability is at least 1 / V: exact, and one pass less.
            normalizer = highest - slope_RV.gather(1, most_likely).log()
            total += ((normalizer - at_label + z_loss * normalizer.square()) * counted).sum()
            if z_loss:
                slope_RV *= 1 + 2 * z_loss * normalizer
            slope_RV.scatter_add_(1, labels, torch.full_like(at_label, -1.0))
            slope_RV *= counted
            slope_RV = slope_RV.to(hidden_RD.dtype)
            grad_hidden_RD[start : start + rows] = slope_RV @ weight_VD
            if slope_RV.dtype == torch.float32:
                grad_weight_VD.addmm_(slope_RV.t(), part_RD)
            else:
                grad_weight_VD += slope_RV.t() @ part_RD
        ctx.save_for_backward(grad_hidden_RD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden_RD, grad_weight_VD = ctx.saved_tensors
        # The factor comes last and in float32: 1 / tokens times a probability would be 0 in float16.
        scaled = (grad_hidden_RD.float() * grad).to(grad_hidden_RD.dtype)
        return scaled, (grad_weight_VD * grad).to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    z_loss: float = 0.0,
    rows: int | None = None,
) -> Tensor:
    """Mean nats per predicted token, or their sum over `num_items_in_batch`; a float32 scalar.

    hidden_BTD: final hidden states. weight_VD: output embedding. labels_BT: the input ids, shifted here; IGNORED is left
    out. num_items_in_batch: predicted tokens of the whole optimizer step, over all its batches and processes: gradients
    summed over batches are then those of one large batch, however ragged its parts.
    z_loss: weight of the squared logarithm of the softmax's denominator (PaLM, section 5, takes 1e-4); it keeps logits
    from drifting. rows: how many go at once; as many as CHUNK_BYTES holds where left out.
    Under autocast, the products are in its dtype; sums over tokens are always in float32.
    """
    device = hidden_BTD.device.type
    labels_R = labels_BT[:, 1:].reshape(-1).to(hidden_BTD.device)
    hidden_RD = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    if num_items_in_batch is None:
        num_items_in_batch = (labels_R != IGNORED).sum().clamp(min=1)
    if rows is None:
        rows = max(16, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * weight_VD.shape[0]))
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_RD, weight_VD = hidden_RD.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(hidden_RD, weight_VD, labels_R, z_loss, rows)
    return total / num_items_in_batch
