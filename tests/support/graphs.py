"""The graphs step on a CPU: the same passes, with PyTorch in place of the kernels and of CUDA's graphs."""

from typing import ClassVar

from transformers import PreTrainedModel

from model.generation.steps.graphs.step import GraphStep


class GraphStepOnCPU(GraphStep):
    """Takes the models that a processor holds."""

    operations: ClassVar[str] = "model.generation.steps.graphs.plain"

    @classmethod
    def unavailable(cls, model: PreTrainedModel) -> str | None:
        """None: every model of the tests."""
        return None
