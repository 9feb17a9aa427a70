"""Int8 in the compressed-tensors layout that vLLM reads as W8A8: int8 rows, one scale each, activations per token.

The linear layers hold the integers of `model/weights/int8.py`; embedding and head stay in full precision, as that
layout has no quantized embedding. Format: https://github.com/vllm-project/compressed-tensors ("int-quantized").
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from model.modeling_rex import RexForCausalLM
from model.weights.export import CLASSES, add_earlier_names, export_config, export_state_dict, layout
from model.weights.int8 import quantize_weight

QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}


def write_compressed_tensors(model: RexForCausalLM, output_dir: Path) -> None:
    """Write configuration and weights of `model`; each quantized matrix (N, K) comes with its scales (N, 1)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, weight in export_state_dict(model.state_dict(), model.config).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.contiguous()
            continue
        integers_NK, scale_N = quantize_weight(weight)
        tensors[name] = integers_NK
        tensors[f"{name}_scale"] = scale_N[:, None].to(weight.dtype)
    config, architecture = export_config(model.config), CLASSES[layout(model.config)].__name__
    written = {**config.to_dict(), "architectures": [architecture], "quantization_config": QUANTIZATION}
    (output_dir / "config.json").write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")
    add_earlier_names(output_dir)
    model.generation_config.save_pretrained(output_dir)
    save_file(tensors, output_dir / "model.safetensors", metadata={"format": "pt"})
