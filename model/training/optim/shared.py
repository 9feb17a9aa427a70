"""Orthogonalization divided among the processes of a training, instead of repeated in each.

Each process orthogonalizes some of the matrices, and one all-gather gives all of them to all. Every matrix is computed
in one place, so the processes hold the same bits. Legend: `N` matrices of one shape, `R` rows, `C` columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.training.optim.newton_schulz import orthogonalize

MIN_DIVIDED_SIZE = 128
"""Rows or columns, the fewer of a matrix, from which sharing can pay: 5 steps take 20 times as many operations per byte
that is sent, so 2,560. Smaller matrices take less time than the call that would send them."""


def is_shared(matrices: Sequence[Tensor]) -> bool:
    """Whether several processes hold these matrices, each of them whole, and the largest is worth sending."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    # FSDP's parameters are a subclass, of which each process holds a part.
    whole = all(type(matrix) in (Tensor, torch.nn.Parameter) for matrix in matrices)
    return several and whole and max((min(matrix.shape[-2:]) for matrix in matrices), default=0) >= MIN_DIVIDED_SIZE


def orthogonalize_shared(stacks: Sequence[Tensor], steps: int = 5, **options: Any) -> list[Tensor]:
    """`orthogonalize` of each stack, the matrices divided among the processes of the default group.

    stacks: at least one, each of shape (N, R, C), the same in all processes, of one dtype. A matrix of a smaller batch
    can differ from that of a larger one in the last bits, as libraries choose their kernels by the size.
    options: of `orthogonalize`.
    """
    world_size = dist.get_world_size()
    bounds = shares([tuple(stack.shape) for stack in stacks], world_size)
    own = [
        orthogonalize(stack[first:last], steps, **options).flatten()
        for stack, (first, last) in zip(stacks, bounds[dist.get_rank()], strict=True)
        if first < last
    ]
    sizes = [
        sum((last - first) * stack[0].numel() for stack, (first, last) in zip(stacks, share, strict=True))
        for share in bounds
    ]
    sent = torch.zeros(max(sizes), dtype=stacks[0].dtype, device=stacks[0].device)
    if own:
        torch.cat(own, out=sent[: sizes[dist.get_rank()]])
    received = [torch.empty_like(sent) for _ in range(world_size)]
    # As bytes: gloo does not know bfloat16 everywhere.
    dist.all_gather([buffer.view(torch.uint8) for buffer in received], sent.view(torch.uint8))
    results = [torch.empty_like(stack) for stack in stacks]
    for buffer, share in zip(received, bounds, strict=True):
        start = 0
        for result, (first, last) in zip(results, share, strict=True):
            end = start + (last - first) * result[0].numel()
            result[first:last] = buffer[start:end].view(last - first, *result.shape[1:])
            start = end
    return results


def shares(shapes: Sequence[tuple[int, ...]], world_size: int) -> list[list[tuple[int, int]]]:
    """For each process, the first and the last (exclusive) of its matrices in each stack: neighbors, of even work.

    shapes: (N, R, C) of each stack.
    """
    costs = [rows * columns * min(rows, columns) for number, rows, columns in shapes for _ in range(number)]
    total, done = sum(costs), 0
    owners = []
    for cost in costs:
        owners.append(min((2 * done + cost) * world_size // (2 * total), world_size - 1))
        done += cost
    found: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    start = 0
    for number, *_ in shapes:
        of_stack = owners[start : start + number]
        for rank in range(world_size):
            first = sum(owner < rank for owner in of_stack)
            found[rank].append((first, first + of_stack.count(rank)))
        start += number
    return found
