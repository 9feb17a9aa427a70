"""The graphs step on a CPU: the same passes, with PyTorch in place of the kernels and of CUDA's graphs."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from model.generation.steps.choose import STEPS, available_steps
from model.generation.steps.graphs.step import GraphStep
from tests.support.tiny import tiny_model, tiny_tokenizer

EVERY_STEP = [GraphStep.name, *available_steps(tiny_model(tiny_tokenizer()))]
"""Names of all implementations of a step, for tests with `use_graphs_on_cpu`."""
TEXTS = [np.arange(start, start + 60) % 270 + 2 for start in (3, 70, 140, 210)]
"""Token ids of four texts."""


def alone(model, ids: np.ndarray) -> torch.Tensor:
    """The logits of a text by the model itself, float32."""
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float()


class GraphStepOnCPU(GraphStep):
    """Takes the models that a processor holds."""

    operations: ClassVar[str] = "model.generation.steps.graphs.plain"

    @classmethod
    def unavailable(cls, model: PreTrainedModel) -> str | None:
        """None: every model of the tests."""
        return None


def use_graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines take the graphs step by its name."""
    monkeypatch.setitem(STEPS, GraphStep.name, "tests.support.graphs:GraphStepOnCPU")
