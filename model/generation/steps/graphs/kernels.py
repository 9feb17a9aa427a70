"""The operations of a step as Triton kernels, with `sampling.py`; `plain.py` has the same in PyTorch.

Each row is a token of some sequence: prefill and decoding run the same kernels. Numbers are loaded in the model's
dtype, computed in float32 and rounded once. Without a GPU, Triton's interpreter runs them (TRITON_INTERPRET=1).

Shapes: N rows, D hidden size, F intermediate size, H query heads, G key/value heads, r = H / G, K head dimension, J
numbers of it that are rotated, S positions, P pages of the cache, R rows of logits, V vocabulary, O outputs and I
inputs of a product, C splits of a text.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.generation.steps.graphs import sampling
from model.generation.steps.graphs.adjustments import Tables
from model.generation.steps.graphs.pages import PAGE, Places

SPLIT_POSITIONS = 256
"""A context is split among one program for each this many positions; a shorter text, among as many."""
BUSY_PROGRAMS = 1024
"""With this many programs a GPU is busy: texts are not split any further."""
FEW_ROWS = 4
"""Of a product that computes each row on its own."""
choose = sampling.choose


@triton.jit
def _add_norm(
    x,
    branch,
    post_weight,
    weight,
    x_out,
    y_out,
    eps,
    size,
    HAS_BRANCH: tl.constexpr,
    HAS_POST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row * size + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_POST:
            scale = tl.rsqrt(tl.sum(added * added, axis=0) / size + eps)
            added = added * scale * tl.load(post_weight + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (value + added).to(x_out.dtype.element_ty)
        tl.store(x_out + row * size + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    value = value * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_out + row * size + at, value.to(y_out.dtype.element_ty), mask=inside)


def norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row."""
    y_ND = torch.empty_like(x_ND)
    block = triton.next_power_of_2(x_ND.shape[1])
    _add_norm[(len(x_ND),)](x_ND, x_ND, weight_D, weight_D, x_ND, y_ND, eps, x_ND.shape[1], False, False, block)
    return y_ND


def add_norm(
    x_ND: Tensor, branch_ND: Tensor, post_weight_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream with a branch added, and its RMSNorm. post_weight_D: of the RMSNorm after the branch."""
    out_ND, y_ND = torch.empty_like(x_ND), torch.empty_like(x_ND)
    post = weight_D if post_weight_D is None else post_weight_D
    size = x_ND.shape[1]
    block = triton.next_power_of_2(size)
    _add_norm[(len(x_ND),)](
        x_ND, branch_ND, post, weight_D, out_ND, y_ND, eps, size, True, post_weight_D is not None, block
    )
    return out_ND, y_ND


@triton.jit
def _rotate_store(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    q_out,
    keys,
    values,
    table,
    slots,
    positions,
    eps,
    heads,
    groups,
    width,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    start = qkv + (row * (heads + 2 * groups) + head) * SIZE
    value = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row).to(tl.int64)
    if head < heads + groups:
        half: tl.constexpr = ROTATED // 2
        is_first, is_turned = at < half, at < 2 * half
        other_at = tl.where(is_first, at + half, at - half)
        other = tl.load(start + other_at, mask=is_turned, other=0.0).to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
            weight = q_weight if head < heads else k_weight
            value = value * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            other = other * scale * tl.load(weight + other_at, mask=is_turned, other=0.0).to(tl.float32)
        pair = position * half + tl.where(is_first, at, at - half)
        c = tl.load(cos + pair, mask=is_turned, other=1.0)
        s = tl.load(sin + pair, mask=is_turned, other=0.0)
        value = value * c + tl.where(is_first, -other, other) * s
    if head < heads:
        tl.store(q_out + (row * heads + head) * SIZE + at, value.to(q_out.dtype.element_ty), mask=inside)
    else:
        group = (head - heads) % groups
        page = tl.load(table + slot * width + position // PAGE).to(tl.int64)
        target = ((page * groups + group) * PAGE + position % PAGE) * SIZE
        if head < heads + groups:
            tl.store(keys + target + at, value.to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(values + target + at, value.to(values.dtype.element_ty), mask=inside)


def rotate_store(
    qkv_NE: Tensor,
    rotary: tuple[Tensor, Tensor],
    qk_weights: tuple[Tensor, Tensor] | None,
    eps: float,
    places: Places,
) -> Tensor:
    """Rotate queries and keys by their positions, store keys and values in their places; the queries (N, H, K).

    qkv_NE: query heads, then key heads, then value heads of each row. rotary: cosines and sines, float32,
    (S, J / 2). qk_weights: of the RMSNorms of queries and keys.
    """
    (cos_SJ, sin_SJ), (_, groups, _, size) = rotary, places.keys.shape
    heads = qkv_NE.shape[1] // size - 2 * groups
    q_NHK = qkv_NE.new_empty(len(qkv_NE), heads, size)
    q_weight, k_weight = qk_weights or (cos_SJ, cos_SJ)
    width, block = places.table.shape[1], triton.next_power_of_2(size)
    _rotate_store[(len(qkv_NE), heads + 2 * groups)](
        *(qkv_NE, cos_SJ, sin_SJ, q_weight, k_weight, q_NHK, *places, eps, heads, groups, width),
        *(size, PAGE, 2 * cos_SJ.shape[1], qk_weights is not None, block),
    )
    return q_NHK


@triton.jit
def _attend(
    q,
    keys,
    values,
    table,
    slots,
    positions,
    out,
    highest_out,
    total_out,
    scale,
    heads,
    groups,
    width,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    PER_GROUP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at, query = tl.arange(0, BLOCK), tl.arange(0, QUERIES)
    inside = (query[:, None] < PER_GROUP) & (at[None, :] < SIZE)
    head = group * PER_GROUP + query
    q_rK = tl.load(q + (row * heads + head)[:, None] * SIZE + at[None, :], mask=inside, other=0.0)
    pages = table + tl.load(slots + row).to(tl.int64) * width
    end = tl.load(positions + row) + 1
    split = tl.cdiv(tl.cdiv(end, PAGE), tl.num_programs(2)) * PAGE
    first = part * split
    last = tl.minimum(end, first + split)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    for start in range(first, last, PAGE):
        position = start + tl.arange(0, PAGE)
        is_read = (position[:, None] < last) & (at[None, :] < SIZE)
        page = tl.load(pages + start // PAGE).to(tl.int64)
        place = ((page * groups + group) * PAGE + (position - start)[:, None]) * SIZE + at[None, :]
        k_SK = tl.load(keys + place, mask=is_read, other=0.0)
        scores = tl.dot(q_rK, tl.trans(k_SK), input_precision="ieee") * scale
        scores = tl.where(position[None, :] < last, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_highest[:, None])
        kept = tl.exp(highest - new_highest)
        v_SK = tl.load(values + place, mask=is_read, other=0.0)
        sums = sums * kept[:, None] + tl.dot(weights.to(v_SK.dtype), v_SK, input_precision="ieee")
        total = total * kept + tl.sum(weights, axis=1)
        highest = new_highest
    if IS_SPLIT:
        place = (part * tl.num_programs(0) + row) * heads + head
        tl.store(highest_out + place, highest, mask=query < PER_GROUP)
        tl.store(total_out + place, total, mask=query < PER_GROUP)
        tl.store(out + place[:, None] * SIZE + at[None, :], sums, mask=inside)
    else:
        result = sums / total[:, None]
        tl.store(out + (row * heads + head)[:, None] * SIZE + at[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join_splits(
    sums, highest, total, out, splits, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, part = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    place = (part * tl.num_programs(0) + row) * heads + head
    highest_C = tl.load(highest + place, mask=part < splits, other=float("-inf"))
    share_C = tl.exp(highest_C - tl.max(highest_C, axis=0))
    total_C = tl.load(total + place, mask=part < splits, other=0.0)
    inside = (part[:, None] < splits) & (at[None, :] < SIZE)
    sums_CK = tl.load(sums + place[:, None] * SIZE + at[None, :], mask=inside, other=0.0)
    result = tl.sum(sums_CK * share_C[:, None], axis=0) / tl.sum(total_C * share_C, axis=0)
    tl.store(out + (row * heads + head) * SIZE + at, result.to(out.dtype.element_ty), mask=at < SIZE)


def attention(q_NHK: Tensor, places: Places, scale: float) -> Tensor:
    """Attention of each row over the positions of its slot up to its own, (N, H * K); reads no others.

    The query heads of a group are the rows of one tile, so each key is read once for all of them. While few programs
    run, the positions of each text are split among several, and a second kernel adds their sums up.
    """
    rows, heads, size = q_NHK.shape
    groups, width = places.keys.shape[1], places.table.shape[1]
    out_NE = q_NHK.new_empty(rows, heads * size)
    splits = max(1, min(triton.cdiv(width * PAGE, SPLIT_POSITIONS), BUSY_PROGRAMS // (rows * groups)))
    queries, block = max(16, triton.next_power_of_2(heads // groups)), max(16, triton.next_power_of_2(size))
    sums, highest, total = out_NE, out_NE, out_NE
    if splits > 1:
        sums = torch.empty(splits, rows, heads, size, dtype=torch.float32, device=q_NHK.device)
        highest, total = torch.empty_like(sums[..., 0]), torch.empty_like(sums[..., 0])
    _attend[(rows, groups, splits)](
        *(q_NHK, *places, sums, highest, total, scale, heads, groups, width),
        *(size, PAGE, heads // groups, splits > 1, queries, block),
    )
    if splits > 1:
        _join_splits[(rows, heads)](
            sums, highest, total, out_NE, splits, heads, size, block, triton.next_power_of_2(splits)
        )
    return out_NE


@triton.jit
def _silu_times(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * size + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=at < size)


def silu_times(gate_up_NE: Tensor) -> Tensor:
    """silu(gate) * up, (N, F), of gate and up side by side, (N, 2 F)."""
    rows, size = len(gate_up_NE), gate_up_NE.shape[1] // 2
    out_NF = gate_up_NE.new_empty(rows, size)
    _silu_times[(rows, triton.cdiv(size, 1024))](gate_up_NE, out_NF, size, 1024)
    return out_NF


@triton.jit(do_not_specialize=["rows"])  # compiled once for any number of them
def _int8_product(
    x, weight, scale, out, rows, outputs, inputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        at = start + tl.arange(0, INPUTS)
        inside = (row[:, None] < rows) & (at[None, :] < inputs)
        x_NI = tl.load(x + row[:, None].to(tl.int64) * inputs + at[None, :], mask=inside, other=0.0)
        inside = (output[:, None] < outputs) & (at[None, :] < inputs)
        weight_OI = tl.load(weight + output[:, None].to(tl.int64) * inputs + at[None, :], mask=inside, other=0)
        # Every whole number up to 127 is exact in bfloat16.
        sums += tl.dot(x_NI, tl.trans(weight_OI.to(x_NI.dtype)), input_precision="ieee")
    sums *= tl.load(scale + output, mask=output < outputs, other=0.0)[None, :]
    inside = (row[:, None] < rows) & (output[None, :] < outputs)
    tl.store(out + row[:, None].to(tl.int64) * outputs + output[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _int8_row_product(x, weight, scale, out, outputs, inputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    # All rows of some outputs follow one another, while the weights are in the cache.
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        at = start + tl.arange(0, INPUTS)
        x_I = tl.load(x + row * inputs + at, mask=at < inputs, other=0.0).to(tl.float32)
        inside = (output[:, None] < outputs) & (at[None, :] < inputs)
        weight_OI = tl.load(weight + output[:, None].to(tl.int64) * inputs + at[None, :], mask=inside, other=0)
        sums += x_I[None, :] * weight_OI.to(tl.float32)
    product = tl.sum(sums, axis=1) * tl.load(scale + output, mask=output < outputs, other=0.0)
    tl.store(out + row * outputs + output, product.to(out.dtype.element_ty), mask=output < outputs)


def int8_product(x_NI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The product with a transposed int8 matrix and its scales, (N, O); weights become floats in registers only.

    For few rows the time is that of reading the weights: many small programs, each of which reads its own at once.
    """
    (rows, inputs), outputs = x_NI.shape, len(weight_OI)
    out_NO = x_NI.new_empty(rows, outputs)
    if rows <= FEW_ROWS:
        block = min(1024, triton.next_power_of_2(inputs))
        _int8_row_product[(rows, triton.cdiv(outputs, 8))](x_NI, weight_OI, scale_O, out_NO, outputs, inputs, 8, block)
        return out_NO
    tile = min(64, max(16, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(outputs, 32), triton.cdiv(rows, tile))
    at_once = 128 if x_NI.element_size() < 4 else 32  # without tensor cores, registers hold no more
    _int8_product[grid](x_NI, weight_OI, scale_O, out_NO, rows, outputs, inputs, tile, 32, at_once)
    return out_NO


@triton.jit
def _count_tokens(text, penalties, counts, slots, positions, ids, wanted, changes, context, size, BLOCK: tl.constexpr):
    """Counts of each row's tokens: 1 for those of the prompt, and 2 for each that was generated."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(wanted + row).to(tl.int64)
    slot, position, token = tl.load(slots + n).to(tl.int64), tl.load(positions + n), tl.load(ids + n)
    tl.store(text + slot * context + position, token)
    if tl.load(changes + row) % 2 == 1:
        prompt = tl.load(penalties + slot * 4 + 3)
        for start in range(0, position + 1, BLOCK):
            at = start + tl.arange(0, BLOCK)
            # The last token's place is being written.
            found = tl.load(text + slot * context + at, mask=at < position, other=0)
            found = tl.where(at == position, token, found)
            tl.atomic_or(counts + row * size + found, 1, mask=at < prompt, sem="relaxed")
            tl.atomic_add(counts + row * size + found, 2, mask=(at >= prompt) & (at <= position), sem="relaxed")


@triton.jit
def _adjust(
    logits,
    counts,
    penalties,
    biased,
    bias,
    allowed,
    slots,
    wanted,
    changes,
    biases,
    words,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    change = tl.load(changes + row)
    if change > 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, place = at < size, row * size + at
        value = tl.load(logits + place, mask=inside, other=0.0)
        if change % 2 == 1:
            slot = tl.load(slots + tl.load(wanted + row)).to(tl.int64)
            how = penalties + slot * 4
            repetition, frequency, presence = tl.load(how), tl.load(how + 1), tl.load(how + 2)
            count = tl.load(counts + place, mask=inside, other=0)
            tl.store(counts + place, tl.zeros_like(count), mask=inside)
            penalized = tl.where(value < 0, value * repetition, value / repetition)
            value = tl.where(count > 0, penalized, value)
            generated = count >> 1
            value -= frequency * generated.to(tl.float32)
            value -= tl.where(generated > 0, presence, 0.0)
            entry = slot * biases
            token = tl.load(biased + entry)
            while token >= 0:
                value += tl.where(at == token, tl.load(bias + entry), 0.0)
                entry += 1
                token = tl.load(biased + entry)
        if change >= 2:
            word = tl.load(allowed + row * words + at // 32, mask=inside, other=0)
            value = tl.where((word >> (at % 32)) & 1 == 1, value, float("-inf"))
        tl.store(logits + place, value, mask=inside)


def adjust(
    logits_RV: Tensor,
    tables: Tables,
    slot_N: Tensor,
    position_N: Tensor,
    id_N: Tensor,
    wanted_R: Tensor,
    changes_R: Tensor,
) -> None:
    """Keep the token of each wanted row at its position and change its logits in place: where `changes_R` has 1, by the
    penalties and biases of its slot, where it has 2, to -infinity for all tokens but the allowed ones.
    """
    (rows, size), context, biases = logits_RV.shape, tables.text_SL.shape[1], tables.biased_SB.shape[1]
    text_SL, penalties_S4, biased_SB, bias_SB, counts_RV, allowed_RW = tables
    _count_tokens[(rows,)](
        *(text_SL, penalties_S4, counts_RV, slot_N, position_N, id_N, wanted_R, changes_R),
        *(context, size, 1024),
    )
    block = min(1024, triton.next_power_of_2(size))
    _adjust[(rows, triton.cdiv(size, block))](
        *(logits_RV, counts_RV, penalties_S4, biased_SB, bias_SB, allowed_RW, slot_N, wanted_R, changes_R),
        *(biases, allowed_RW.shape[1], size, block),
    )
