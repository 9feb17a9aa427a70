"""The environment that has vLLM: that of `make vllm`, or the one that the variable VLLM_PYTHON names."""

import os
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm/bin/python").absolute()
needs_vllm = pytest.mark.skipif(
    not PYTHON.is_file(), reason="no vLLM: `make vllm` makes its environment, or VLLM_PYTHON names a Python"
)
