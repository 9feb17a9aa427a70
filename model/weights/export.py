"""REX in the layout of an architecture that every serving tool knows.

GLM-4-0414 with post-norms, Qwen3 with norms of queries and keys, GLM where a part of each head is rotated, else Llama.
The arithmetic is the same; names, the order of query and key rows and the fusion of gate and up projection differ.
`model/export` writes it to files, beside other formats; none of them needs custom code.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.configuration_rex import RexConfig
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.weights.loading import load_model

StockConfig = Glm4Config | GlmConfig | LlamaConfig | Qwen3Config
CLASSES: dict[str, type[PreTrainedModel]] = {
    "glm4": Glm4ForCausalLM,
    "glm": GlmForCausalLM,
    "llama": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
"""The class of each layout, by `model_type`."""
GLM_CONFIGS: dict[str, type[Glm4Config | GlmConfig]] = {"glm4": Glm4Config, "glm": GlmConfig}
"""The layouts that rotate a share of each head, by neighboring pairs of rows, and fuse gate and up projection."""


def layout(config: RexConfig) -> str:
    """The key of CLASSES that computes what a REX of this configuration does."""
    if config.post_norm:
        return "glm4"
    if config.qk_norm:
        return "qwen3"
    return "llama" if config.rotary_dim == config.head_dim else "glm"


def export_config(config: RexConfig) -> StockConfig:
    """The configuration of the same model for the class of its layout."""
    shared = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
            "initializer_range",
            "attention_dropout",
            "bos_token_id",
            "pad_token_id",
            "dtype",
        )
    }
    rope = dict(config.rope_parameters or {})
    exported: StockConfig
    kind = layout(config)
    if kind in GLM_CONFIGS:
        # GLM turns half of each head unless told otherwise, in transformers, vLLM and llama.cpp alike.
        exported = GLM_CONFIGS[kind](
            **shared, rope_parameters={"partial_rotary_factor": 1.0, **rope}, attention_bias=False
        )
    elif kind == "qwen3":
        exported = Qwen3Config(**shared, rope_parameters=rope, attention_bias=False, use_sliding_window=False)
    else:
        exported = LlamaConfig(**shared, rope_parameters=rope, attention_bias=False, mlp_bias=False)
    exported.eos_token_id = config.eos_token_id  # set afterwards: GLM replaces None by ids of its own
    return exported


def export_state_dict(state_dict: dict[str, Tensor], config: RexConfig) -> dict[str, Tensor]:
    """The weights of a RexForCausalLM under the names and in the layout of `export_config(config)`'s class."""
    if layout(config) not in GLM_CONFIGS:
        return dict(state_dict)
    exported: dict[str, Tensor] = {}
    for name, weight in state_dict.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            exported[name] = interleave_pairs(weight, config)
        elif name.endswith("gate_proj.weight"):
            up = state_dict[name.replace("gate_proj", "up_proj")]
            exported[name.replace("gate_proj", "gate_up_proj")] = torch.cat((weight, up))
        elif not name.endswith("up_proj.weight"):
            exported[name] = weight
    return exported


def interleave_pairs(weight: Tensor, config: RexConfig) -> Tensor:
    """The rotated rows J of each head from (0 .. J/2, J/2 .. J) to (0, J/2, 1, J/2 + 1, ..): GLM turns neighbors."""
    order_J = torch.arange(config.rotary_dim).view(2, -1).T.flatten()
    return reorder_rotated(weight, order_J, config.head_dim)


def reorder_rotated(weight: Tensor, order_J: Tensor, head_dim: int | None) -> Tensor:
    """`weight` (H * K, D) with the first rows of each head in another order; the others stay."""
    heads = weight.clone().unflatten(0, (-1, head_dim or 0))
    heads[:, : len(order_J)] = heads[:, order_J]
    return heads.flatten(0, 1)


def export_model(model: RexForCausalLM) -> PreTrainedModel:
    """The same model in the class of its layout: eval mode, same dtype, on the CPU; weights are copies."""
    exported = CLASSES[layout(model.config)](export_config(model.config))
    # By assignment, which takes the dtype along: casting the model would round the rotary frequencies, too.
    weights = export_state_dict(model.state_dict(), model.config)
    exported.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    exported.tie_weights()
    exported.generation_config = copy.deepcopy(model.generation_config)
    return exported.eval()


def export_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Convert a REX checkpoint directory, tokenizer included; a quantized one in the values of its weights.

    Raises PipelineError if `checkpoint_dir` is not a REX checkpoint.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise PipelineError(f"no config.json in {checkpoint_dir}: expected a REX checkpoint; train one first")
    export_model(load_model(checkpoint_dir, quantized=False)).save_pretrained(output_dir)
    add_earlier_names(output_dir)
    copy_tokenizer(checkpoint_dir, output_dir)


def add_earlier_names(output_dir: Path) -> None:
    """Write the rotary embeddings of an exported config.json under the names of transformers 4, too.

    It does not know today's names: without the earlier ones it computes with its own defaults, and says nothing.
    """
    path = output_dir / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(checkpoint_dir: Path, output_dir: Path) -> None:
    """Copy the tokenizer's files, and the chat template if it has a separate file."""
    for path in (*checkpoint_dir.glob("*token*.json"), *checkpoint_dir.glob("chat_template.jinja")):
        shutil.copy(path, output_dir / path.name)
    path = output_dir / "tokenizer_config.json"
    if path.is_file():
        # The class's name in transformers 4, which transformers 5 keeps.
        config = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
