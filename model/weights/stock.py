"""Weights of stock architectures, Llama, GLM-4 and Qwen3, as those of REX: the inverse of `model/weights/export.py`.

Read from safetensors, in one file or several (model.safetensors.index.json), without code from the directory. What REX
does not compute (scaled rotary embeddings, biases, sliding windows) is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Glm4Config, LlamaConfig, Qwen3Config

from model.configuration_rex import RexConfig
from model.errors import PipelineError
from model.weights.loading import WEIGHTS

INDEX = "model.safetensors.index.json"
CLASSES: dict[str, Any] = {"rex": RexConfig, "llama": LlamaConfig, "glm4": Glm4Config, "qwen3": Qwen3Config}
"""The architectures that hold a REX, by `model_type`."""
_EXPECTED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "hidden_act": ("silu", None),
    "rope_type": ("default", None),
    "partial_rotary_factor": (1.0, None),
}
"""Fields of a configuration that change what is computed, and their values that REX computes."""
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "post_norm",
    "qk_norm",
    "tie_word_embeddings",
)
"""Fields that determine the meaning of weights; each is an option of the group `model` of an experiment."""


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory; empty if there is none.

    Raises PipelineError if the index is unreadable or names a file that is not there.
    """
    path = directory / INDEX
    if path.is_file():
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"{path} is not a readable index ({error}): fetch the model again") from None
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise PipelineError(f"{path} names {missing[0]}, which is not there: fetch the model again")
        return [directory / name for name in names]
    return [directory / WEIGHTS] if (directory / WEIGHTS).is_file() else []


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The weights of a directory of one of CLASSES under REX's names and in its layout, in the stored dtype, CPU.

    Raises PipelineError, one line, for files that are missing or unreadable and for what REX does not compute.
    """
    config = _read_config(directory)
    _refuse_differences(directory, config)
    found: dict[str, Tensor] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, FileNotFoundError) as error:
            raise PipelineError(f"{path} is not a readable safetensors file ({error}): fetch the model again") from None
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)  # Some files hold the tied head once more.
    biases = sorted(name for name in found if name.endswith(".bias"))
    if biases:
        raise PipelineError(f"{directory} has biases ({biases[0]}): expected none, as REX has none; take another model")
    return import_state_dict(found, config) if config["model_type"] == "glm4" else found


def import_state_dict(state_dict: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a Glm4ForCausalLM under REX's names: the inverse of `export_state_dict`."""
    imported: dict[str, Tensor] = {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name, weight in state_dict.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            imported[name] = separate_pairs(weight, head_dim)
        elif name.endswith("gate_up_proj.weight"):
            gate, up = weight.chunk(2)
            imported[name.replace("gate_up_proj", "gate_proj")] = gate
            imported[name.replace("gate_up_proj", "up_proj")] = up
        else:
            imported[name] = weight
    return imported


def separate_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (0, K/2, 1, K/2 + 1, ..) to (0 .. K/2, K/2 .. K), shape (H * K, D) as before."""
    width = weight.shape[-1]
    rows_HK = weight.view(-1, head_dim // 2, 2, width)
    return rows_HK.transpose(1, 2).reshape(-1, width)


def differing_options(directory: Path, config: RexConfig) -> list[str]:
    """Differences of an experiment's `config` from the model in `directory`, as overrides that adopt the model's.

    Shapes that differ fail anyway; the base of the rotary embeddings or a norm's epsilon would not.
    """
    stored, ours = _read_config(directory), config.to_dict()
    for fields in (stored, ours):
        fields["rope_theta"] = (fields.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
        fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return [f"model.{name}={str(stored[name]).lower()}" for name in _FIELDS if stored[name] != ours[name]]


def _read_config(directory: Path) -> dict[str, Any]:
    """The configuration with the defaults of its class, under the names of today's transformers."""
    path = directory / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise PipelineError(f"{path} is not a readable configuration ({error}): expected a model's directory") from None
    if kind not in CLASSES:
        raise PipelineError(
            f"{path} has model_type {kind!r}: expected {', '.join(CLASSES)}, the architectures that compute what REX "
            "does; take a model of one of these"
        )
    try:
        config: dict[str, Any] = CLASSES[kind].from_dict(raw).to_dict()
    except Exception as error:  # noqa: BLE001  the strict dataclass wraps its reasons in several types of its own
        reason = " ".join(str(error.__cause__ or error).split())
        raise PipelineError(f"{path} is not a valid configuration: {reason}; fetch the model again") from None
    norms = {"post_norm": kind == "glm4", "qk_norm": kind == "qwen3"}
    return {**norms, **config}


def _refuse_differences(directory: Path, config: dict[str, Any]) -> None:
    path, rope = directory / "config.json", config.get("rope_parameters") or {}
    found = {**config, "rope_type": rope.get("rope_type"), "partial_rotary_factor": rope.get("partial_rotary_factor")}
    for name, fitting in _EXPECTED.items():
        if found.get(name) not in fitting:
            raise PipelineError(
                f"{path} has {name} {found[name]!r}: expected {fitting[0]!r}, as REX computes nothing else; "
                "take another model"
            )
    if config.get("quantization_config"):
        raise PipelineError(
            f"{path} has quantized weights: expected full precision; take the model before quantization"
        )
