"""Two processes that divide the matrices hold what one process computes."""

from pathlib import Path

import pytest
import torch

from model.training.optim.newton_schulz import orthogonalize
from model.training.optim.shared import is_shared, shares
from tests.support import forked

SHAPES = [(4, 128, 384), (5, 384, 128), (1, 128, 128)]
PROGRAM = """
import sys
import torch, torch.distributed as dist
from model.training.optim import shared
from tests.model.training.optim.test_shared_orthogonalization import matrices
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
computed = []
original = shared.orthogonalize
shared.orthogonalize = lambda stack, steps: computed.append(len(stack)) or original(stack, steps)
found = {dtype: shared.orthogonalize_shared(matrices(dtype), 5) for dtype in (torch.float32, torch.bfloat16)}
sharing = [shared.is_shared(stacks) for stacks in (matrices(torch.float32), [torch.ones(8, 512)], [])]
torch.save({"found": found, "computed": computed, "sharing": sharing}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def matrices(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.processes
def test_two_processes_share_the_matrices_and_hold_the_same_bits(tmp_path: Path) -> None:
    processes = [forked.start(PROGRAM, rank, tmp_path, log=tmp_path / f"{rank}.log") for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [sum(ours["computed"]), sum(theirs["computed"])] == [10, 10]  # half of the ten matrices, twice
    assert ours["sharing"] == [True, False, False]
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        for one, other, alone in zip(
            ours["found"][dtype],
            theirs["found"][dtype],
            [orthogonalize(stack) for stack in matrices(dtype)],
            strict=True,
        ):
            assert one.dtype == dtype
            assert torch.equal(one, other)
            assert (one - alone).abs().max() <= rounding * alone.abs().max()


def test_one_process_shares_nothing() -> None:
    assert not is_shared(matrices(torch.float32))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shapes", [SHAPES, [(24, 256, 768)], [(1, 128, 128)], [(1, 8, 8), (7, 300, 200), (2, 64, 9)]])
def test_each_matrix_has_one_process_and_work_is_even(shapes: list[tuple[int, ...]], world_size: int) -> None:
    found = shares(shapes, world_size)
    assert len(found) == world_size
    work = [0] * world_size
    for place, (number, rows, columns) in enumerate(shapes):
        covered = [index for rank in range(world_size) for index in range(*found[rank][place])]
        assert covered == list(range(number))
        for rank in range(world_size):
            work[rank] += len(range(*found[rank][place])) * rows * columns * min(rows, columns)
    largest = max(rows * columns * min(rows, columns) for _, rows, columns in shapes)
    assert max(work) <= sum(work) / world_size + largest
