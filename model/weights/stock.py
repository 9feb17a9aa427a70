"""Weights of Llama, GLM, GLM-4 and Qwen3 as those of REX: the inverse of `model/weights/export.py`.

Read from safetensors, in one file or several (model.safetensors.index.json), without code from the directory. What REX
does not compute (biases, sliding windows, rotary embeddings whose frequencies depend on a text's length) is refused by
name.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from model.artifact import read_json
from model.configuration_rex import RexConfig
from model.errors import PipelineError, one_line
from model.settings.architecture import OPTIONAL_ROPE_SCALING, ROPE_SCALING, check_rope_scaling
from model.weights.export import GLM_CONFIGS, reorder_rotated
from model.weights.loading import WEIGHTS

INDEX = "model.safetensors.index.json"
CLASSES: dict[str, Any] = {"rex": RexConfig, "llama": LlamaConfig, "qwen3": Qwen3Config, **GLM_CONFIGS}
"""The architectures that hold a REX, by `model_type`."""
_EXPECTED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "hidden_act": ("silu", None),
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
    "rope_scaling",
    "partial_rotary_factor",
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
            names = sorted(set(read_json(path, "fetch the model again")["weight_map"].values()))
            missing = [name for name in names if not (directory / name).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PipelineError(f"{path} is not a readable index ({error!r}): fetch the model again") from None
        if missing:
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
        except (SafetensorError, FileNotFoundError, IsADirectoryError) as error:
            raise PipelineError(f"{path} is not a readable safetensors file ({error}): fetch the model again") from None
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)  # Some files hold the tied head once more.
    biases = sorted(name for name in found if name.endswith(".bias"))
    if biases:
        raise PipelineError(f"{directory} has biases ({biases[0]}): expected none, as REX has none; take another model")
    return import_state_dict(found, config) if config["model_type"] in GLM_CONFIGS else found


def import_state_dict(state_dict: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a Glm4ForCausalLM or GlmForCausalLM under REX's names: the inverse of `export_state_dict`."""
    imported: dict[str, Tensor] = {}
    for name, weight in state_dict.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            imported[name] = separate_pairs(weight, config["head_dim"], config["partial_rotary_factor"])
        elif name.endswith("gate_up_proj.weight"):
            gate, up = weight.chunk(2)
            imported[name.replace("gate_up_proj", "gate_proj")] = gate
            imported[name.replace("gate_up_proj", "up_proj")] = up
        else:
            imported[name] = weight
    return imported


def separate_pairs(weight: Tensor, head_dim: int, partial_rotary_factor: float) -> Tensor:
    """The rotated rows J of each head from (0, J/2, 1, J/2 + 1, ..) to (0 .. J/2, J/2 .. J), shape (H * K, D)."""
    order_J = torch.arange(int(head_dim * partial_rotary_factor)).view(-1, 2).T.flatten()
    return reorder_rotated(weight, order_J, head_dim)


def differing_options(directory: Path, config: RexConfig) -> list[str]:
    """Differences of an experiment's `config` from the model in `directory`, as overrides that adopt the model's.

    Shapes that differ fail anyway; the base of the rotary embeddings or a norm's epsilon would not.
    """
    stored, ours = _read_config(directory), _with_options(config.to_dict())
    # Frequencies of the type "dynamic" change beyond the context.
    is_dynamic = (stored["rope_scaling"] or {}).get("rope_type") == "dynamic"
    fields = (*_FIELDS, "max_position_embeddings") if is_dynamic else _FIELDS
    return [_override(name, stored[name], ours[name]) for name in fields if stored[name] != ours[name]]


def _override(name: str, value: Any, former: Any) -> str:
    """`model.name=value` as Hydra reads it in a shell. A mapping is added to a former one, which is removed first."""
    if not isinstance(value, dict):
        return f"model.{name}={'null' if value is None else str(value).lower()}"
    items = ",".join(f"{key}:{str(item).lower()}" for key, item in value.items())
    return f"{f'model.{name}=null ' if former else ''}'++model.{name}={{{items}}}'"


def _read_config(directory: Path) -> dict[str, Any]:
    """The configuration with the defaults of its class, under the names of today's transformers."""
    path = directory / "config.json"
    raw = read_json(path, "fetch the model again")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise PipelineError(
            f"{path} has model_type {kind!r}: expected {', '.join(CLASSES)}, the architectures that compute what REX "
            "does; take a model of one of these"
        )
    try:
        config: dict[str, Any] = CLASSES[kind].from_dict(raw).to_dict()
    except Exception as error:  # noqa: BLE001  the strict dataclass wraps its reasons in several types of its own
        reason = one_line(error.__cause__ or error)
        raise PipelineError(f"{path} is not a valid configuration: {reason}; fetch the model again") from None
    norms = {"post_norm": kind == "glm4", "qk_norm": kind == "qwen3"}
    return _with_options({**norms, **config})


def _with_options(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with those options of the group `model` that transformers nests or leaves out.

    Parameters that a type of rotary embeddings does not read are left out, as transformers ignores them.
    """
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    names = ("rope_type", *ROPE_SCALING.get(kind, ()), *OPTIONAL_ROPE_SCALING.get(kind, ()))
    scaling = {name: rope[name] for name in names if rope.get(name) is not None}
    return {
        **config,
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "rope_scaling": None if kind == "default" else scaling,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }


def _refuse_differences(directory: Path, config: dict[str, Any]) -> None:
    path = directory / "config.json"
    rotates_a_share = config["model_type"] in ("rex", *GLM_CONFIGS)
    expected = _EXPECTED if rotates_a_share else {**_EXPECTED, "partial_rotary_factor": (1.0,)}
    for name, fitting in expected.items():
        if config.get(name) not in fitting:
            raise PipelineError(
                f"{path} has {name} {config[name]!r}: expected {fitting[0]!r}, as REX computes nothing else; "
                "take another model"
            )
    share = config["partial_rotary_factor"]
    if int(config["head_dim"] * share) % 2:
        raise PipelineError(
            f"{path} has partial_rotary_factor {share!r}: expected an even share of a head's {config['head_dim']} "
            "numbers, as REX rotates pairs; take another model"
        )
    if config["rope_scaling"] is not None:
        try:
            check_rope_scaling(f"{path}: rope_parameters", config["rope_scaling"])
        except PipelineError as error:
            raise PipelineError(f"{error}; take another model") from None
    if config.get("quantization_config"):
        raise PipelineError(
            f"{path} has quantized weights: expected full precision; take the model before quantization"
        )
