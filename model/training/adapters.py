"""LoRA: trains small matrices beside the frozen ones of a checkpoint, and merges them into it at the end.

The package peft puts its layers in place of the model's own projections, so loop, loss, checkpoints and self-check stay
those of full fine-tuning. The saved model is always merged: later stages never see adapters.
Source: "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685).
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The modules that get an adapter: every matrix of attention and SwiGLU."""


def require(package: str, option: str) -> None:
    """Raises PipelineError if an optional package, which `option` needs, is not installed."""
    if not find_spec(package):
        raise PipelineError(
            f"{option} needs {package}, which is not installed: install the extra, pip install -e '.[finetune]'"
        )


def lora_config(settings: TrainingSettings) -> Any:
    """The configuration of peft for `training.lora_rank` and `training.lora_alpha`."""
    require("peft", "training.lora_rank")
    import peft

    return peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(PROJECTIONS), lora_dropout=0.0
    )


def add_adapters(model: RexForCausalLM, settings: TrainingSettings) -> None:
    """Put adapters beside the projections of `model`, if `training.lora_rank` is above 0, and freeze all else.

    Their initial values depend on the seed alone, and leave the model's results as they are.
    """
    if not settings.lora_rank:
        return
    config = lora_config(settings)
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        peft.inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters of `model` to its weights and take them out; every parameter can be trained again."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "lora_A"):
                layer: Any = child
                layer.merge()
                setattr(parent, name, layer.get_base_layer())
    model.requires_grad_(True)
