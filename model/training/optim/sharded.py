"""Orthogonalization of matrices of which each process holds some rows, as FSDP2 divides them.

Newton-Schulz needs whole matrices. The rows of each go to one process, which orthogonalizes it and sends the rows back:
each matrix is whole in one process only, and each process does an even part of the work.
Legend: `N` matrices of one shape, `R` rows, `S` rows of this process, `C` columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.training.optim.newton_schulz import orthogonalize
from model.training.optim.shared import shares


def own_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_by_rank(rows: int, world_size: int) -> list[int]:
    """Number of rows of each process where DTensor divides `rows` by its Shard(0): equal chunks, the last ones less."""
    chunk = -(-rows // world_size)
    return [min(chunk, max(rows - chunk * rank, 0)) for rank in range(world_size)]


def orthogonalize_rows(stacks: Sequence[Tensor], rows: Sequence[int], steps: int = 5, **options: Any) -> list[Tensor]:
    """`orthogonalize` of matrices whose rows are divided among the processes of the default group.

    stacks: at least one, each (N, S, C), of one dtype; N and C are the same in all processes. rows: R of each stack.
    Returns this process's rows of the orthogonalized matrices, (N, S, C) each. options: of `orthogonalize`.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    whole_shapes = [(len(stack), number, stack.shape[2]) for stack, number in zip(stacks, rows, strict=True)]
    owned = shares(whole_shapes, world_size)  # [owner][stack]: first and last matrix
    parts = [rows_by_rank(number, world_size) for number in rows]  # [stack][rank]: rows
    sent = [
        [stack[first:last] for stack, (first, last) in zip(stacks, owned[owner], strict=True)]
        for owner in range(world_size)
    ]
    counts = [last - first for first, last in owned[rank]]
    shapes = [
        [(count, part[source], stack.shape[2]) for stack, count, part in zip(stacks, counts, parts, strict=True)]
        for source in range(world_size)
    ]
    received = _exchange(sent, shapes)
    results = []
    for index, count in enumerate(counts):
        matrices_NRC = torch.cat([of_source[index] for of_source in received], dim=1)
        results.append(orthogonalize(matrices_NRC, steps, **options) if count else matrices_NRC)
    split = [result.split(part, dim=1) for result, part in zip(results, parts, strict=True)]
    back = [[pieces[target] for pieces in split] for target in range(world_size)]
    shapes = [
        [(last - first, *stack.shape[1:]) for stack, (first, last) in zip(stacks, owned[owner], strict=True)]
        for owner in range(world_size)
    ]
    returned = _exchange(back, shapes)
    return [torch.cat([of_owner[index] for of_owner in returned]) for index in range(len(stacks))]


def _exchange(sent: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[list[Tensor]]:
    """All-to-all of lists of tensors. sent: [target][index]. shapes: [source][index] of what arrives."""
    like = sent[0][0]
    numbers_in = [sum(torch.Size(shape).numel() for shape in of_source) for of_source in shapes]
    numbers_out = [sum(tensor.numel() for tensor in of_target) for of_target in sent]
    outgoing = torch.cat([tensor.reshape(-1) for of_target in sent for tensor in of_target])
    incoming = torch.empty(sum(numbers_in), dtype=like.dtype, device=like.device)
    size = like.element_size()
    # As bytes: gloo does not know bfloat16 everywhere.
    dist.all_to_all_single(
        incoming.view(torch.uint8),
        outgoing.view(torch.uint8),
        [number * size for number in numbers_in],
        [number * size for number in numbers_out],
    )
    found = []
    for of_source, flat in zip(shapes, incoming.split(numbers_in), strict=True):
        pieces = flat.split([torch.Size(shape).numel() for shape in of_source])
        found.append([piece.view(shape) for piece, shape in zip(pieces, of_source, strict=True)])
    return found
