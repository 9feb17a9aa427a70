"""The Triton kernels: their numbers in Triton's interpreter, and their code for GPUs that this machine lacks."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpu_compiler import SHARED_MEMORY, Compiled, assert_passes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("triton"), reason="no Triton: `make triton` installs it"),
]

NUMBERS = Path(__file__).with_name("numbers_of_kernels.py")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the interpreter computes instead")


@pytest.mark.processes
@pytest.mark.parametrize("interpreter", ["1", pytest.param("0", marks=needs_gpu)], ids=["interpreted", "compiled"])
def test_kernels_give_the_numbers_of_pytorch(interpreter):
    assert_passes(NUMBERS, interpreter)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile_for_gpus_and_fit_them(monkeypatch, tmp_path, capability, dtype):
    from model.generation.steps.graphs import kernels, sampling
    from model.generation.steps.graphs.adjustments import Adjustments
    from model.generation.steps.graphs.pages import PAGE, Places

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list[tuple[str, Any]] = []
    names = ["_add_norm", "_rotate_store", "_attend", "_join_splits", "_silu_times", "_int8_product"]
    names += ["_int8_row_product"]
    names += ["_count_tokens", "_adjust", "_choose"]
    for name in names:
        module = sampling if name == "_choose" else kernels
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), capability, made))
    heads, groups, head_dim, vocab_size = 12, 4, 64, 50_304
    size, intermediate_size = heads * head_dim, 2048
    for rows in (1, kernels.BUSY_PROGRAMS):
        x_ND, weight_D = torch.zeros(rows, size, dtype=dtype), torch.zeros(size, dtype=dtype)
        kernels.norm(x_ND, weight_D, 1e-6)
        kernels.add_norm(x_ND, x_ND, weight_D, weight_D, 1e-6)
        table, at_N = torch.zeros(2, 16, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        keys = torch.zeros(32, groups, PAGE, head_dim, dtype=dtype)
        places = Places(keys, keys, table, at_N, at_N)
        cos, qkv_NE = torch.zeros(1024, head_dim // 2), x_ND.new_zeros(rows, size + 2 * groups * head_dim)
        for weights in (None, (weight_D, weight_D)):
            q_NHK = kernels.rotate_store(qkv_NE, (cos, cos), weights, 1e-6, places)
        kernels.attention(q_NHK, places, 0.1)
        kernels.silu_times(x_ND.new_zeros(rows, 2 * intermediate_size))
        weight_OI = torch.zeros(intermediate_size, size, dtype=torch.int8)
        kernels.int8_product(x_ND, weight_OI, torch.zeros(intermediate_size))
    at_R = torch.zeros(1, dtype=torch.int32)
    tables = Adjustments(1, 1024, 1, vocab_size, torch.device("cpu")).tables
    kernels.adjust(torch.zeros(1, vocab_size), tables, at_R, at_R, at_R, at_R, at_R)
    kernels.choose(torch.zeros(1, vocab_size), torch.zeros(1, 5))
    assert {name for name, _ in made} == set(names)
    for name, compiled in made:
        assert compiled.asm["cubin"], name
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], name
        if dtype == torch.bfloat16 and name in ("_attend", "_int8_product"):
            assert "mma" in compiled.asm["ptx"], f"{name} uses no tensor cores"
