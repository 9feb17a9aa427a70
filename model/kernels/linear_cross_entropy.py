"""Cross entropy straight from hidden states as one PyTorch operator: the logits of a vocabulary never exist whole.

A chunk of rows at a time goes through the output embedding, its loss and its gradient are taken, and its logits are
dropped: logits take `rows * V` numbers instead of `B * T * V`, and the backward pass is one multiplication by a scalar.
On a GPU the loss and the gradient of a chunk are one kernel (`cross_entropy.py`), else PyTorch's operations.
Source of the idea: Liger-Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989). With a teacher, a part
of the loss is the divergence from its distribution, whose logits go through the same chunks.

It is a custom operator (`torch.library`) and not an autograd.Function, because compilers trace through the latter: with
PyTorch 2.11 on an H100, a compiled graph lost the gradients that the forward pass writes into slices, and the training
learned nothing. An operator is opaque to compilers: they call it as it is, and only see the product of its backward.
Legend: `R` rows (predicted tokens), `D` hidden size, `E` the teacher's, `V` vocabulary.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.errors import one_line
from model.logits import IGNORE_INDEX

logger = logging.getLogger(__name__)


@torch.library.custom_op("rex::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_sum(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    z_loss: float,
    rows: int,
    teacher_RE: Tensor | None,
    teacher_VE: Tensor | None,
    distill_weight: float,
    temperature: float,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss summed over rows, a float32 scalar, and its gradients: (R, D) in hidden_RD's dtype and (V, D) in
    float32.

    rows: how many go through the vocabulary at once. Only the first output is differentiable.
    """
    grad_hidden_RD = torch.empty_like(hidden_RD)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float32, device=hidden_RD.device)
    in_place = fused_cross_entropy(hidden_RD.device.type) if teacher_RE is None else None
    for start in range(0, len(hidden_RD), rows):
        part_RD, labels = hidden_RD[start : start + rows], labels_R[start : start + rows, None]
        grad_logits_RV = part_RD @ weight_VD.t()
        if in_place is not None:
            total += in_place(grad_logits_RV, labels[:, 0].contiguous(), z_loss, IGNORE_INDEX).sum()
        else:
            counted = labels != IGNORE_INDEX
            logits_RV = grad_logits_RV.float()
            loss, grad_logits_RV = _cross_entropy(logits_RV, labels.clamp(min=0), z_loss)
            if teacher_RE is not None and teacher_VE is not None:
                teacher_RV = (teacher_RE[start : start + rows] @ teacher_VE.t()).float()
                divergence, grad_divergence_RV = _divergence(logits_RV, teacher_RV, temperature, top_k)
                loss = loss.lerp(divergence, distill_weight)
                grad_logits_RV = grad_logits_RV.lerp_(grad_divergence_RV, distill_weight)
            total += (loss * counted).sum()
            grad_logits_RV *= counted
            grad_logits_RV = grad_logits_RV.to(hidden_RD.dtype)
        grad_hidden_RD[start : start + rows] = grad_logits_RV @ weight_VD
        if grad_logits_RV.dtype == torch.float32:
            grad_weight_VD.addmm_(grad_logits_RV.t(), part_RD)
        else:
            grad_weight_VD += grad_logits_RV.t() @ part_RD
    return total, grad_hidden_RD, grad_weight_VD


@linear_cross_entropy_sum.register_fake
def _(hidden_RD: Tensor, weight_VD: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden_RD.new_empty((), dtype=torch.float32)
    return total, torch.empty_like(hidden_RD), torch.empty_like(weight_VD, dtype=torch.float32)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_hidden_RD, grad_weight_VD = output
    ctx.mark_non_differentiable(grad_hidden_RD, grad_weight_VD)
    ctx.set_materialize_grads(False)  # no zeros of the size of the vocabulary for those two
    ctx.save_for_backward(grad_hidden_RD, grad_weight_VD)
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, grad: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
    grad_hidden_RD, grad_weight_VD = ctx.saved_tensors
    # The factor comes last and in float32: 1 / tokens times a probability would be 0 in float16.
    scaled = (grad_hidden_RD.float() * grad).to(grad_hidden_RD.dtype)
    return scaled, (grad_weight_VD * grad).to(ctx.weight_dtype), *[None] * 8


linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)


@functools.cache
def fused_cross_entropy(device: str) -> Callable[[Tensor, Tensor, float, int], Tensor] | None:
    """`cross_entropy_` of Triton on a kind of device, if it runs there and gives PyTorch's numbers; else None, with a
    line in the log.
    """
    if device != "cuda":
        return None
    try:
        from model.kernels.cross_entropy import cross_entropy_

        if not _agrees(cross_entropy_, device):
            raise ValueError("its results differ from PyTorch's")
    except Exception as error:  # noqa: BLE001  compilers and drivers fail in many ways
        logger.warning("the loss is computed without its Triton kernel, slower: %s", one_line(error))
        return None
    return cross_entropy_


def _agrees(kernel: Callable[[Tensor, Tensor, float, int], Tensor], device: str) -> bool:
    numbers = torch.arange(3 * 5000, dtype=torch.float32, device=device).reshape(3, 5000)
    logits_RV = (numbers * 0.37).sin() * 8
    labels_R = torch.tensor([4999, IGNORE_INDEX, 0], device=device)
    expected, expected_RV = _cross_entropy(logits_RV, labels_R[:, None].clamp(min=0), 1e-3)
    is_counted = labels_R != IGNORE_INDEX
    found_R = kernel(logits_RV, labels_R, 1e-3, IGNORE_INDEX)
    is_same = torch.allclose(found_R, expected[:, 0] * is_counted, rtol=1e-4, atol=1e-5)
    return is_same and torch.allclose(logits_RV, expected_RV * is_counted[:, None], rtol=1e-3, atol=1e-6)


def _cross_entropy(logits_RV: Tensor, labels_R1: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross entropy and z-loss, (R, 1), and their gradient with respect to the logits, (R, V)."""
    at_label = logits_RV.gather(1, labels_R1)
    highest, most_likely = logits_RV.max(dim=1, keepdim=True)
    grad_logits_RV = torch.softmax(logits_RV, dim=1)
    # Log sum exp by way of the most likely token, whose probability is at least 1 / V: exact, and one pass less.
    normalizer = highest - grad_logits_RV.gather(1, most_likely).log()
    loss = normalizer - at_label + z_loss * normalizer.square()
    if z_loss:
        grad_logits_RV *= 1 + 2 * z_loss * normalizer
    grad_logits_RV.scatter_add_(1, labels_R1, torch.full_like(at_label, -1.0))
    return loss, grad_logits_RV


def _divergence(logits_RV: Tensor, teacher_RV: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """temperature^2 * KL(teacher || student), (R, 1), and its gradient with respect to the student's logits, (R, V).

    The factor keeps gradients at one size over temperatures (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
    With top_k, the tokens outside the teacher's top k are one event, so that this stays a divergence of
    distributions: 0 if they agree, never negative. The student shares the teacher's probability of that event out as
    it would itself.
    """
    log_q_RV = functional.log_softmax(logits_RV / temperature, dim=1)
    log_p_RV = functional.log_softmax(teacher_RV / temperature, dim=1)
    q_RV, p_RV = log_q_RV.exp(), log_p_RV.exp()
    if not 0 < top_k < logits_RV.shape[1]:
        return temperature**2 * (p_RV * (log_p_RV - log_q_RV)).sum(1, keepdim=True), temperature * (q_RV - p_RV)
    followed_RK = log_p_RV.topk(top_k, dim=1).indices
    p_RK, log_q_RK = p_RV.gather(1, followed_RK), log_q_RV.gather(1, followed_RK)
    kl = (p_RK * (log_p_RV.gather(1, followed_RK) - log_q_RK)).sum(1, keepdim=True)
    target_RV = q_RV.scatter(1, followed_RK, 0.0)
    # Summed and not 1 minus the others, which would leave rounding of a probability near 0.
    rest_p = p_RV.scatter(1, followed_RK, 0.0).sum(1, keepdim=True)
    rest_q = target_RV.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    kl = kl + torch.special.xlogy(rest_p, rest_p / rest_q)
    target_RV = (target_RV * (rest_p / rest_q)).scatter_(1, followed_RK, p_RK)
    return temperature**2 * kl, temperature * (q_RV - target_RV)
