"""The operations of a step in PyTorch, for any device: what the Triton kernels of `kernels.py` are held to.

Function by function the same arguments, results and shapes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from model.generation.steps.draw import Adjustment, Draw, draw_token, penalized
from model.generation.steps.graphs.adjustments import Tables
from model.generation.steps.graphs.pages import PAGE, Places
from model.modeling_rex import rotate


def norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `kernels.norm`."""
    return (functional.rms_norm(x_ND.float(), x_ND.shape[-1:], None, eps) * weight_D.float()).to(x_ND.dtype)


def add_norm(
    x_ND: Tensor, branch_ND: Tensor, post_weight_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.add_norm`."""
    branch_ND = branch_ND.float()
    if post_weight_D is not None:
        branch_ND = norm(branch_ND, post_weight_D, eps)
    x_ND = (x_ND.float() + branch_ND).to(x_ND.dtype)
    return x_ND, norm(x_ND, weight_D, eps)


def rotate_store(
    qkv_NE: Tensor,
    rotary: tuple[Tensor, Tensor],
    qk_weights: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
) -> Tensor:
    """See `kernels.rotate_store`."""
    keys, values, table, slot_N, position_N = places
    groups, size = keys.shape[1], keys.shape[3]
    heads = qkv_NE.shape[1] // size - 2 * groups
    q_NHK, k_NGK, v_NGK = qkv_NE.float().unflatten(1, (-1, size)).split([heads, groups, groups], dim=1)
    if qk_weights is not None:
        q_NHK, k_NGK = norm(q_NHK, qk_weights[0], eps), norm(k_NGK, qk_weights[1], eps)
    cos, sin = (part_SJ[position_N][:, None] for part_SJ in rotary)
    page_N, place_N = table[slot_N, position_N // PAGE], position_N % PAGE
    keys[page_N, :, place_N] = rotate(k_NGK, cos, sin).to(keys.dtype)
    values[page_N, :, place_N] = v_NGK.to(values.dtype)
    return rotate(q_NHK, cos, sin).to(qkv_NE.dtype)


def attention(q_NHK: Tensor, places: Places, scale: float) -> Tensor:
    """See `kernels.attention`."""
    keys, values, table, slot_N, position_N = places
    longest = int(position_N.max()) + 1
    pages_NP = table[slot_N, : -(-longest // PAGE)]
    is_read_NS = torch.arange(longest, device=q_NHK.device) <= position_N[:, None]
    k_NGSK, v_NGSK = (
        # What a text has not written may be NaN, and 0 * NaN is NaN.
        part[pages_NP].transpose(1, 2).flatten(2, 3)[:, :, :longest].where(is_read_NS[:, None, :, None], 0.0)
        for part in (keys, values)
    )
    q_NGrK = q_NHK.unflatten(1, (keys.shape[1], -1))
    mask = is_read_NS[:, None, None]
    out_NGrK = functional.scaled_dot_product_attention(q_NGrK, k_NGSK, v_NGSK, attn_mask=mask, scale=scale)
    return out_NGrK.flatten(1)


def silu_times(gate_up_NE: Tensor) -> Tensor:
    """See `kernels.silu_times`."""
    gate_NF, up_NF = gate_up_NE.float().chunk(2, dim=1)
    return (functional.silu(gate_NF) * up_NF).to(gate_up_NE.dtype)


def int8_product(x_NI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """See `kernels.int8_product`."""
    return (x_NI.float() @ weight_OI.float().mT * scale_O).to(x_NI.dtype)


def adjust(
    logits_RV: Tensor,
    tables: Tables,
    slot_N: Tensor,
    position_N: Tensor,
    id_N: Tensor,
    wanted_R: Tensor,
    changes_R: Tensor,
) -> None:
    """See `kernels.adjust`."""
    slot_R, position_R = slot_N[wanted_R], position_N[wanted_R]
    tables.text_SL[slot_R, position_R] = id_N[wanted_R]
    for row in (changes_R & 1).nonzero()[:, 0].tolist():
        slot, scores_V = slot_R[row], logits_RV[row]
        repetition, frequency, presence, prompt = tables.penalties_S4[slot].tolist()
        ids = tables.text_SL[slot, : position_R[row] + 1].long()
        is_seen_V = torch.zeros_like(scores_V, dtype=torch.bool).index_fill_(0, ids, True)
        count_V = ids[int(prompt) :].bincount(minlength=len(scores_V))
        scores_V = penalized(scores_V, Adjustment((), repetition, frequency, presence, {}), is_seen_V, count_V)
        is_biased_B = tables.biased_SB[slot] >= 0
        biased, bias = tables.biased_SB[slot][is_biased_B], tables.bias_SB[slot][is_biased_B]
        logits_RV[row] = scores_V.index_add(0, biased, bias)
    for row in (changes_R & 2).nonzero()[:, 0].tolist():
        bits = torch.arange(32, device=logits_RV.device)
        is_allowed_V = (tables.allowed_RW[row][:, None] >> bits & 1).flatten()[: logits_RV.shape[1]] > 0
        logits_RV[row].masked_fill_(~is_allowed_V, -torch.inf)


def choose(logits_RV: Tensor, draws_R5: Tensor) -> Tensor:
    """See `kernels.choose`."""
    tokens = []
    for row_V, draw in zip(logits_RV, draws_R5.tolist(), strict=True):
        highest, token = row_V.max(dim=0)
        if not torch.isfinite(highest):
            tokens.append(-1)
        elif draw[0] > 0:
            tokens.append(draw_token(row_V, Draw(draw[0], int(draw[1]), *draw[2:])))
        else:
            tokens.append(int(token))
    return torch.tensor(tokens, dtype=torch.int32, device=logits_RV.device)
