"""The tasks of lm-eval that a model is scored on (`configs/evaluation/`)."""

from dataclasses import dataclass
from typing import Literal

from model.settings.option import Settings, option


@dataclass
class EvaluationSettings(Settings, group="evaluation"):
    """The tasks of lm-eval that a model is scored on (`configs/evaluation/`); the pipeline itself runs none."""

    tasks: list[str] = option(
        [], "Tasks, groups or tags of lm-eval, by name; most read data from the Hugging Face hub."
    )
    include_path: str = option("", "Folder with YAML files of further tasks; empty: lm-eval's own alone.")
    model: Literal["served", "trained_checkpoint", "quantized_model"] = option(
        "served", "The model to score; served: the one that serving.quantized names."
    )
    limit: int = option(0, "Documents of each task; 0: all.", unit="documents", minimum=0, maximum=10**9)
    num_fewshot: int = option(
        -1, "Solved examples before each question; -1: as each task says.", unit="examples", minimum=-1, maximum=1000
    )
    batch_size: int = option(8, "Requests in one forward pass.", unit="requests", above=0, maximum=65_536)
