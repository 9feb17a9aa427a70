"""The training loss from final hidden states: label shift, autocast, distillation from a teacher.

The arithmetic, in chunks of the vocabulary's logits, is `model/kernels/linear_cross_entropy.py`.
Legend: `B` windows, `T` tokens, `R` rows (predicted tokens), `D` hidden size, `E` the teacher's, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.logits import IGNORE_INDEX, rows_at_once
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings


@dataclass(frozen=True)
class DistillationTargets:
    """A teacher's predictions for the tokens of a batch, and their weight in the loss.

    hidden_BTE: its final hidden states. weight_VE: its output embedding. weight: the share of the divergence in the
    loss, 0 to 1. temperature: divides both models' logits. top_k: the divergence covers the teacher's top k tokens and
    the sum of the others; 0 covers all tokens.
    """

    hidden_BTE: Tensor
    weight_VE: Tensor
    weight: float
    temperature: float
    top_k: int


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    z_loss: float = 0.0,
    targets: DistillationTargets | None = None,
    rows: int | None = None,
) -> Tensor:
    """Mean nats per predicted token, or their sum over `num_items_in_batch`; a float32 scalar.

    hidden_BTD: final hidden states. weight_VD: output embedding. labels_BT: the input ids, shifted here; IGNORE_INDEX
    is excluded. num_items_in_batch: predicted tokens of the whole optimizer step, over all batches and processes, so
    that gradients summed over batches equal those of one large batch even if batches differ in size. z_loss: weight of
    the squared log of the softmax denominator (PaLM, section 5, uses 1e-4); it keeps logits from drifting.
    targets: the loss is (1 - weight) times the above plus weight times the divergence from the teacher at the same
    tokens.
    rows: chunk size; default: as many as fit into CHUNK_BYTES. Under autocast, products use its dtype; sums over tokens
    are always float32.
    """
    device = hidden_BTD.device.type
    labels_R = labels_BT[:, 1:].reshape(-1).to(hidden_BTD.device)
    hidden_RD = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    if num_items_in_batch is None:
        num_items_in_batch = (labels_R != IGNORE_INDEX).sum().clamp(min=1)
    teacher: tuple[Any, ...] = (None, None, 0.0, 1.0, 0)
    if targets is not None:
        teacher_RE = targets.hidden_BTE[:, :-1].reshape(-1, targets.hidden_BTE.shape[-1])
        teacher = (teacher_RE, targets.weight_VE, targets.weight, targets.temperature, targets.top_k)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_RD, weight_VD = hidden_RD.to(dtype), weight_VD.to(dtype)
        teacher = tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in teacher)
    with torch.autocast(device, enabled=False):
        total, *_ = linear_cross_entropy_sum(
            hidden_RD, weight_VD, labels_R, z_loss, rows or rows_at_once(len(weight_VD), weight_VD.device), *teacher
        )
    return total / num_items_in_batch


class TrainingLoss:
    """A model's `linear_loss` for a training's settings, with or without a teacher."""

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
        """`linear_cross_entropy`; input_ids_BT: the teacher's input."""
        targets = None
        if self._teacher is not None:
            with torch.no_grad():
                hidden_BTE = self._teacher.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
            targets = DistillationTargets(
                hidden_BTE,
                self._teacher.lm_head.weight,
                weight=self._settings.distill_weight,
                temperature=self._settings.distill_temperature,
                top_k=self._settings.distill_top_k,
            )
        return linear_cross_entropy(
            hidden_BTD, weight_VD, labels_BT, num_items_in_batch, z_loss=self._settings.z_loss, targets=targets
        )
