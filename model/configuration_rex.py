"""Configuration of REX, with Hugging Face's field names.

This file and `modeling_rex.py` travel with every checkpoint, so they import nothing of this project but each other.
The defaults are those of `model.settings.ModelSettings`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class RexConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of a REX model.

    head_dim: defaults to hidden_size / num_attention_heads.
    rope_parameters: {"rope_type": "default", "rope_theta": 10000.0} unless given; the scaled types of transformers work.
    post_norm: True normalizes the output of each branch before it is added (the GLM-4-0414 arithmetic); False is Llama.
    Raises ValueError, one line, for a shape that attention cannot be built from.
    """

    model_type = "rex"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Sequence[list[str]]]] = {  # type: ignore[misc]
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-5
    post_norm: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Raised here, not in `validate_architecture`: the strict dataclass would wrap it in a longer error of its own.
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if heads % groups:
            raise ValueError(f"num_attention_heads is {heads}: expected a multiple of num_key_value_heads ({groups})")
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}: expected a multiple of num_attention_heads ({heads}), "
                    "or set head_dim"
                )
            self.head_dim = self.hidden_size // heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: expected an even number, as rotary embeddings turn pairs")
        # All three, because vLLM's transformers backend asks for AutoModel, which saving a RexForCausalLM leaves out.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_rex.RexConfig",
                "AutoModel": "modeling_rex.RexModel",
                "AutoModelForCausalLM": "modeling_rex.RexForCausalLM",
            },
        )
        super().__post_init__(**kwargs)


__all__ = ["RexConfig"]
