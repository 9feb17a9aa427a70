"""Lets `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)` load a quantized model.

transformers knows neither the layers nor the layout of `model/weights/`. A folder that holds this file, and `CONFIG` as
its config.json, loads the model directory that contains it. The model type is not `rex`: transformers prefers a class
that is registered for a type to the code in a directory, and `rex` may be registered for models in full precision.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from model.modeling_rex import RexForCausalLM as Model
from model.weights.loading import load_model

MODULE = "quantized_rex"
CONFIG = {
    "model_type": "rex_quantized",
    "architectures": ["RexForCausalLM"],
    "auto_map": {
        "AutoConfig": f"{MODULE}.QuantizedRexConfig",
        "AutoModelForCausalLM": f"{MODULE}.RexForCausalLM",
    },
}
"""The `config.json` beside this file."""
_FROM_AUTO_CLASSES = {"adapter_kwargs", "config", "low_cpu_mem_usage", "revision", "trust_remote_code", "_from_auto"}
"""Arguments that transformers' auto classes pass on and that change nothing here; so does any that is None."""


class QuantizedRexConfig(PreTrainedConfig):
    """A name for transformers' registries; the configuration of the model is the one beside its weights."""

    model_type = "rex_quantized"


class RexForCausalLM(Model):
    """`from_pretrained` alone: the model that it returns is made by `load_model`."""

    config_class = QuantizedRexConfig  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, directory: str, *, dtype: Any = None, torch_dtype: Any = None, **arguments: Any) -> Model:  # type: ignore[override]
        """The quantized model of the directory that contains `directory`, on the CPU.

        dtype, torch_dtype: of activations and unquantized weights; None or "auto" keeps the stored one.
        Raises TypeError for other arguments, PipelineError if the model directory is incomplete or altered.
        """
        unknown = {name for name, value in arguments.items() if value is not None} - _FROM_AUTO_CLASSES
        if unknown:
            raise TypeError(
                f"from_pretrained of a quantized REX model takes dtype alone, not {', '.join(sorted(unknown))}"
            )
        chosen = next((value for value in (dtype, torch_dtype) if value not in (None, "auto")), None)
        return load_model(Path(directory).parent, dtype=chosen)
