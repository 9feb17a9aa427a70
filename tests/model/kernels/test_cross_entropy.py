"""The Triton kernel of the loss: its numbers in Triton's interpreter, and its code for GPUs that this machine lacks."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model.kernels import linear_cross_entropy
from tests.support.gpu_compiler import SHARED_MEMORY, Compiled, assert_passes

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="no Triton: `make triton` installs it")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the interpreter computes instead")
NUMBERS = Path(__file__).with_name("numbers_of_cross_entropy.py")


@needs_triton
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("interpreter", ["1", pytest.param("0", marks=needs_gpu)], ids=["interpreted", "compiled"])
def test_the_kernel_gives_the_numbers_of_pytorch(interpreter):
    assert_passes(NUMBERS, interpreter)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernel_compiles_for_gpus_and_fits_them(monkeypatch, tmp_path, capability, dtype):
    from model.kernels import cross_entropy

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list = []
    monkeypatch.setattr(cross_entropy, "_cross_entropy", Compiled(cross_entropy._cross_entropy, capability, made))
    cross_entropy.cross_entropy_(torch.zeros(2, 50_304, dtype=dtype), torch.zeros(2, dtype=torch.int64), 0.0, -100)
    ((_, compiled),) = made
    assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY[capability]


def test_without_a_kernel_that_runs_the_loss_is_pytorchs_and_a_line_says_so(monkeypatch, caplog):
    assert linear_cross_entropy.fused_cross_entropy("cpu") is None and not caplog.records

    def broken(kernel: object, device: str) -> bool:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(linear_cross_entropy, "_agrees", broken)
    with caplog.at_level(logging.WARNING):
        assert linear_cross_entropy.fused_cross_entropy.__wrapped__("cuda") is None
    (record,) = caplog.records
    assert "without its Triton kernel, slower" in record.getMessage()
