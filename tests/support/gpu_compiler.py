"""Runs Triton kernels in its interpreter, and compiles them for GPUs that this machine lacks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.int64: "*i64",
}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes for one program of an A100, an H100 or H200, and an RTX 5090, by compute capability."""


class Compiled:
    """Stands for a kernel: a launch compiles it for a GPU, and records what it needs."""

    def __init__(self, kernel: Any, capability: int, made: list) -> None:
        self._kernel, self._capability, self._made = kernel, capability, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *arguments: Any, **options: int) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, aligned = {}, {}, {}
        for place, (parameter, value) in enumerate(zip(self._kernel.params, arguments, strict=True)):
            if parameter.is_constexpr:
                signature[parameter.name], constants[(place,)] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = (
                POINTERS[value.dtype] if is_tensor else "fp32" if type(value) is float else "i32"
            )
            if is_tensor or (type(value) is int and value % 16 == 0):
                aligned[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", self._capability, 32), options=options)
        self._made.append((self._kernel.__name__, compiled))


def assert_passes(tests: Path, interpreter: str) -> None:
    """Run a file of tests in a process with Triton's interpreter ("1"), or with its compiler ("0") on a GPU."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": interpreter},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
