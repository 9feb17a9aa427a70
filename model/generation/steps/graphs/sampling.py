"""The choice of a token from logits as a Triton kernel; `plain.choose` is the same in PyTorch.

One program for each row. What top-k and top-p may keep is copied together first: their limits are then searched among
a few hundred tokens and not in the vocabulary. How far a token is from the most likely one, in nats over the
temperature, is a float of at least 0: those are ordered as their bits, so that a binary search ends.

Shapes: R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VOCABULARY_BLOCK = 4096
KEPT_BLOCKS = 4
"""Where top-k and top-p keep more tokens than this many blocks have, their limits are searched in the vocabulary."""


@triton.jit
def _distances(x, start, highest, inverse, size, BLOCK: tl.constexpr):
    """Of a block of entries from the highest, as bits, and the weights: below e^-87 they are 0, as in
    `model/native/kernels/draw.h`.
    """
    at = start + tl.arange(0, BLOCK)
    distance = (highest - tl.load(x + at, mask=at < size, other=float("-inf"))) * inverse
    return distance.to(tl.int32, bitcast=True), tl.where(distance < 87.0, tl.exp(-distance), 0.0)


@triton.jit
def _mass(x, highest, inverse, limit, size, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Weight, or number, of the entries up to a limit."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        bits, weight = _distances(x, start, highest, inverse, size, BLOCK)
        if IS_COUNT:
            weight = tl.full((BLOCK,), 1.0, tl.float32)
        total += tl.where((bits <= limit) & (start + tl.arange(0, BLOCK) < size), weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _least_limit(x, highest, inverse, wanted, most, size, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest limit up to `most` whose `_mass` is at least `wanted`."""
    low, high = 0, most
    while low < high:
        middle = low + (high - low) // 2
        if _mass(x, highest, inverse, middle, size, IS_COUNT, BLOCK) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _sufficient_limit(bits, weight, wanted, most):
    """The smallest limit up to `most` to which these entries weigh at least `wanted`."""
    low, high = 0, most
    while low < high:
        middle = low + (high - low) // 2
        if tl.sum(tl.where(bits <= middle, weight, 0.0), axis=0) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _gather(x, kept, kept_ids, highest, inverse, limit, size, room, BLOCK: tl.constexpr):
    """Copy the entries up to a limit, in their order, and their numbers; how many there are, for `room` of them."""
    count = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits, _ = _distances(x, start, highest, inverse, size, BLOCK)
        is_near = (bits <= limit) & (at < size)
        here = tl.sum(is_near.to(tl.int32), axis=0)
        if here > 0:
            place = count + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
            is_near = is_near & (place < room)
            tl.store(kept + place, tl.load(x + at, mask=is_near, other=0.0), mask=is_near)
            tl.store(kept_ids + place, at, mask=is_near)
        count += here
    tl.debug_barrier()  # other threads read what these have written
    return count


@triton.jit
def _kept_weights(x, start, highest, inverse, limit, equal, equals, min_p, size, BLOCK: tl.constexpr):
    """Weights of a block, 0 for what is not kept: entries nearer than the limit are, and the first `equal` of those as
    far as it; and how many are as far up to here. equals: before.
    """
    at = start + tl.arange(0, BLOCK)
    bits, weight = _distances(x, start, highest, inverse, size, BLOCK)
    is_equal = ((bits == limit) & (at < size)).to(tl.int32)
    rank = is_equal
    if equal < size:
        rank = equals + tl.cumsum(is_equal, axis=0)
        equals += tl.sum(is_equal, axis=0)
    is_kept = (at < size) & ((bits < limit) | ((is_equal > 0) & (rank <= equal)))
    return tl.where(is_kept & (weight >= min_p), weight, 0.0), equals


@triton.jit
def _sample(x, highest, inverse, limit, equal, min_p, uniform, size, BLOCK: tl.constexpr):
    """The first kept entry with a cumulative weight above `uniform` of all, else the last."""
    sums, equals = tl.zeros((BLOCK,), tl.float32), 0
    for start in range(0, size, BLOCK):
        weight, equals = _kept_weights(x, start, highest, inverse, limit, equal, equals, min_p, size, BLOCK)
        sums += weight
    target = uniform * tl.sum(sums, axis=0)
    start, before, found, last, equals = 0, 0.0, size, 0, 0
    while (start < size) & (found == size):
        at = start + tl.arange(0, BLOCK)
        weight, equals = _kept_weights(x, start, highest, inverse, limit, equal, equals, min_p, size, BLOCK)
        here = tl.sum(weight, axis=0)
        if before + here > target:
            is_above = (before + tl.cumsum(weight, axis=0) > target) & (weight > 0)
            found = tl.min(tl.where(is_above, at, size), axis=0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, at, 0), axis=0))
        before += here
        start += BLOCK
    return tl.where(found < size, found, last)


@triton.jit
def _choose(logits, draws, kept, kept_ids, out, size, room, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x, how = logits + row * size, draws + row * 5
    # The highest of every BLOCK-th entry, and the first place that has it.
    best, first = tl.full((BLOCK,), float("-inf"), tl.float32), lane
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        at = start + lane
        value = tl.load(x + at, mask=at < size, other=float("-inf"))
        broken += (value != value).to(tl.int32)  # noqa: PLR0124  NaN
        first = tl.where(value > best, at, first)
        best = tl.maximum(best, value)
    highest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == highest, first, size), axis=0)
    temperature = tl.load(how)
    if (tl.sum(broken, axis=0) > 0) | (highest == float("-inf")) | (highest == float("inf")):
        token = -1
    elif temperature > 0:
        top_k, top_p, min_p, uniform = tl.load(how + 1), tl.load(how + 2), tl.load(how + 3), tl.load(how + 4)
        inverse = 1.0 / tl.maximum(temperature, 1e-30)
        limit, count = tl.full((), 0x7F800000, tl.int32), tl.full((), 0, tl.int32) + size
        equal, total, is_gathered = count, 0.0, False
        has_top_k = (top_k > 0) & (top_k < size)
        if has_top_k | (top_p < 1):
            distance = (highest - best) * inverse
            weight, wanted = tl.full((BLOCK,), 1.0, tl.float32), top_k
            if not has_top_k:
                total = _mass(x, highest, inverse, limit, size, False, BLOCK)
                weight, wanted = tl.where(distance < 87.0, tl.exp(-distance), 0.0), top_p * total
            # Up to where these alone are enough, all entries are.
            enough = _sufficient_limit(distance.to(tl.int32, bitcast=True), weight, wanted, limit)
            enough = tl.minimum(enough, 0x42AE0000)  # the bits of 87: what is further has a weight of 0
            kept += row * room
            kept_ids += row * room
            found = _gather(x, kept, kept_ids, highest, inverse, enough, size, room, BLOCK)
            if found <= room:
                x, count, is_gathered = kept, found, True
        if has_top_k:
            limit = _least_limit(x, highest, inverse, top_k, limit, count, True, BLOCK)
            equal = (top_k - _mass(x, highest, inverse, limit - 1, count, True, BLOCK)).to(tl.int32)
            distance = limit.to(tl.float32, bitcast=True)
            total = _mass(x, highest, inverse, limit - 1, count, False, BLOCK)
            total += equal * tl.where(distance < 87.0, tl.exp(-distance), 0.0)
        if top_p < 1:
            wanted = top_p * total
            nearer = _least_limit(x, highest, inverse, wanted, limit, count, False, BLOCK)
            less = _mass(x, highest, inverse, nearer - 1, count, False, BLOCK)
            fewest = tl.maximum(tl.ceil((wanted - less) / tl.exp(-nearer.to(tl.float32, bitcast=True))), 1.0)
            equal = tl.where(nearer < limit, count, equal)
            equal = tl.minimum(equal.to(tl.float32), fewest).to(tl.int32)
            limit = nearer
        token = _sample(x, highest, inverse, limit, equal, min_p, uniform, count, BLOCK)
        if is_gathered:
            token = tl.load(kept_ids + token)
    tl.store(out + row, token)


def choose(logits_RV: Tensor, draws_R5: Tensor) -> Tensor:
    """The token of each row, int32: the first most likely one for a temperature of 0, else that of its `Draw`.

    -1 if the highest logit is not finite. Sums are float32: where a random number falls on the border between two
    tokens, or a token on that of top-p, rounding decides.
    """
    rows, size = logits_RV.shape
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(size))
    tokens_R = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    kept = logits_RV.new_empty(rows, KEPT_BLOCKS * block)
    kept_ids = torch.empty_like(kept, dtype=torch.int32)
    _choose[(rows,)](logits_RV, draws_R5, kept, kept_ids, tokens_R, size, kept.shape[1], block, num_warps=8)
    return tokens_R
