"""Cross entropy of the next token straight from hidden states: the logits of a vocabulary never exist whole.

A chunk of rows at a time goes through the output embedding, its loss and its gradient are taken, and its logits are
dropped: logits take `rows * V` numbers instead of `B * T * V`, and the backward pass is one multiplication by a scalar.
Source of the idea: Liger-Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989), here in plain PyTorch.
With a teacher, a part of the loss is the divergence from its distribution, whose logits go by in the same chunks.
Legend: `B` windows, `T` tokens, `R` rows (predicted tokens), `D` hidden size, `E` the teacher's, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.logits import IGNORED, rows_at_once
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings


@dataclass(frozen=True)
class Teaching:
    """What a teacher says about the tokens of a batch, and how much that counts.

    hidden_BTE: its final hidden states. weight_VE: its output embedding. weight: the divergence's part of the loss, 0 to
    1. temperature: divides both models' logits. top_k: of the teacher's most likely tokens each is followed, of the others
    only their sum; 0 follows all.
    """

    hidden_BTE: Tensor
    weight_VE: Tensor
    weight: float
    temperature: float
    top_k: int


@torch.library.custom_op("rex::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    z_loss: float,
    rows: int,
    teacher_RE: Tensor | None,
    teacher_VE: Tensor | None,
    share: float,
    temperature: float,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of the loss, and its gradients: (), (R, D), (V, D) in float32; chunk by chunk.

    An operator of its own, not an autograd.Function: compilers see one opaque call with a registered gradient. Traced
    into a compiled graph on a GPU, the writes into slices below were lost and every gradient was exactly 0.
    """
    grad_hidden_RD = torch.empty_like(hidden_RD)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float32, device=hidden_RD.device)
    for start in range(0, len(hidden_RD), rows):
        part_RD, labels = hidden_RD[start : start + rows], labels_R[start : start + rows, None]
        counted = labels != IGNORED
        logits_RV = (part_RD @ weight_VD.t()).float()
        loss, slope_RV = _cross_entropy(logits_RV, labels.clamp(min=0), z_loss)
        if teacher_RE is not None and teacher_VE is not None:
            expected_RV = (teacher_RE[start : start + rows] @ teacher_VE.t()).float()
            divergence, towards_RV = _divergence(logits_RV, expected_RV, temperature, top_k)
            loss, slope_RV = loss.lerp(divergence, share), slope_RV.lerp_(towards_RV, share)
        total += (loss * counted).sum()
        slope_RV *= counted
        slope_RV = slope_RV.to(hidden_RD.dtype)
        grad_hidden_RD[start : start + rows] = slope_RV @ weight_VD
        if slope_RV.dtype == torch.float32:
            grad_weight_VD.addmm_(slope_RV.t(), part_RD)
        else:
            grad_weight_VD += slope_RV.t() @ part_RD
    return total, grad_hidden_RD, grad_weight_VD


@_linear_cross_entropy.register_fake
def _(hidden_RD: Tensor, weight_VD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden_RD.new_empty((), dtype=torch.float32)
    return total, torch.empty_like(hidden_RD), torch.empty_like(weight_VD, dtype=torch.float32)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_hidden_RD, grad_weight_VD = ctx.saved_tensors
    # The factor comes last and in float32: 1 / tokens times a probability would be 0 in float16.
    scaled = (grad_hidden_RD.float() * grad).to(grad_hidden_RD.dtype)
    return scaled, (grad_weight_VD * grad).to(ctx.weight_dtype), *[None] * 8


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _cross_entropy(logits_RV: Tensor, labels_R1: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross entropy and z-loss, (R, 1), and their gradient with respect to the logits, (R, V)."""
    at_label = logits_RV.gather(1, labels_R1)
    highest, most_likely = logits_RV.max(dim=1, keepdim=True)
    slope_RV = torch.softmax(logits_RV, dim=1)
    # Log sum exp by way of the most likely token, whose probability is at least 1 / V: exact, and one pass less.
    normalizer = highest - slope_RV.gather(1, most_likely).log()
    loss = normalizer - at_label + z_loss * normalizer.square()
    if z_loss:
        slope_RV *= 1 + 2 * z_loss * normalizer
    slope_RV.scatter_add_(1, labels_R1, torch.full_like(at_label, -1.0))
    return loss, slope_RV


def _divergence(logits_RV: Tensor, teacher_RV: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """temperature^2 * KL(teacher || student), (R, 1), and its gradient with respect to the student's logits, (R, V).

    The factor keeps gradients at one size over temperatures (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). With
    top_k, the tokens that are not followed one by one are one event, so that this stays a divergence of distributions:
    0 where they agree, never negative. The student shares the teacher's probability of that event out as it would itself.
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


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    z_loss: float = 0.0,
    teaching: Teaching | None = None,
    rows: int | None = None,
) -> Tensor:
    """Mean nats per predicted token, or their sum over `num_items_in_batch`; a float32 scalar.

    hidden_BTD: final hidden states. weight_VD: output embedding. labels_BT: the input ids, shifted here; IGNORED is left
    out. num_items_in_batch: predicted tokens of the whole optimizer step, over all its batches and processes: gradients
    summed over batches are then those of one large batch, however ragged its parts.
    z_loss: weight of the squared logarithm of the softmax's denominator (PaLM, section 5, takes 1e-4); it keeps logits
    from drifting. teaching: (1 - its weight) of the loss is the above, the rest the divergence from the teacher at the
    same tokens. rows: how many go at once; as many as CHUNK_BYTES holds where left out.
    Under autocast, the products are in its dtype; sums over tokens are always in float32.
    """
    device = hidden_BTD.device.type
    labels_R = labels_BT[:, 1:].reshape(-1).to(hidden_BTD.device)
    hidden_RD = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    if num_items_in_batch is None:
        num_items_in_batch = (labels_R != IGNORED).sum().clamp(min=1)
    teacher: tuple[Any, ...] = (None, None, 0.0, 1.0, 0)
    if teaching is not None:
        teacher_RE = teaching.hidden_BTE[:, :-1].reshape(-1, teaching.hidden_BTE.shape[-1])
        teacher = (teacher_RE, teaching.weight_VE, teaching.weight, teaching.temperature, teaching.top_k)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_RD, weight_VD = hidden_RD.to(dtype), weight_VD.to(dtype)
        teacher = tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in teacher)
    with torch.autocast(device, enabled=False):
        total, _, _ = _linear_cross_entropy(
            hidden_RD, weight_VD, labels_R, z_loss, rows or rows_at_once(len(weight_VD), weight_VD.device), *teacher
        )
    return total / num_items_in_batch


class TrainingLoss:
    """A model's `linear_loss` under the settings of a training, with a teacher or without."""

    def __init__(self, settings: TrainingSettings, teacher: RexForCausalLM | None = None) -> None:
        self._settings, self._teacher = settings, teacher

    def __call__(
        self,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        labels_BT: Tensor,
        num_items_in_batch: Tensor | None,
        input_ids_BT: Tensor | None,
    ) -> Tensor:
        """`linear_cross_entropy`; input_ids_BT: what the teacher reads."""
        teaching = None
        if self._teacher is not None:
            with torch.no_grad():
                hidden_BTE = self._teacher.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
            teaching = Teaching(
                hidden_BTE,
                self._teacher.lm_head.weight,
                weight=self._settings.distill_weight,
                temperature=self._settings.distill_temperature,
                top_k=self._settings.distill_top_k,
            )
        return linear_cross_entropy(
            hidden_BTD, weight_VD, labels_BT, num_items_in_batch, z_loss=self._settings.z_loss, teaching=teaching
        )
