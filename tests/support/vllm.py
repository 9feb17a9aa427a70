"""The environment that has vLLM: that of `make vllm`, or the one that the variable VLLM_PYTHON names."""

import pytest

from bench.engine.vllm import PYTHON, installed

__all__ = ["PYTHON", "needs_vllm"]

needs_vllm = pytest.mark.skipif(
    not installed(), reason="no vLLM: `make vllm` makes its environment, or VLLM_PYTHON names a Python"
)
