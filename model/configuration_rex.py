"""Configuration of REX, with Hugging Face's field names.

This file and `modeling_rex.py` travel with every checkpoint, so they import nothing of this project but each other.
The defaults are those of `model.settings.ModelSettings`.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from transformers.configuration_utils import PreTrainedConfig

KNOWN_TRANSFORMERS = ((5, 0), (5, 24))
"""The first and the last minor release of transformers that these two files were seen to load and generate alike on."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Types of rotary embeddings whose frequencies are those of any other text within the context, so that cached keys stay
valid; "dynamic" changes them beyond it.
"""
if not KNOWN_TRANSFORMERS[0] <= tuple(map(int, transformers.__version__.split(".")[:2])) <= KNOWN_TRANSFORMERS[1]:
    warnings.warn(
        f"transformers {transformers.__version__}: REX was seen to work with 5.0 to 5.24; compare a few outputs with "
        "one of those releases before you rely on them",
        stacklevel=2,
    )


class RexConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of a REX model.

    head_dim: defaults to hidden_size / num_attention_heads.
    rope_parameters: {"rope_type": "default", "rope_theta": 10000.0} unless given, by transformers' names; the types of
    ROPE_TYPES, and partial_rotary_factor, the share of each head that is rotated. post_norm: True normalizes the output
    of each branch before it is added (the GLM-4-0414 arithmetic); False is Llama. qk_norm: normalizes the queries and
    keys of each head before they are rotated (Qwen3), without post_norm and partial_rotary_factor.
    Raises ValueError, one line, for a shape that attention cannot be built from, for another type of rotary embeddings
    and for qk_norm with what it excludes, and KeyError for a type that lacks one of its parameters.
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

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        max_position_embeddings: int = 1024,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-5,
        post_norm: bool = True,
        qk_norm: bool = False,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": max_position_embeddings,
            **({} if head_dim is None else {"head_dim": head_dim}),
        }
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size < 2**31:
                raise ValueError(f"{name} is {size!r}: expected a whole number, at least 1 and below 2^31")
        for name, number in {"rms_norm_eps": rms_norm_eps, "initializer_range": initializer_range}.items():
            if type(number) not in (int, float) or not 0 <= number < 1e3:
                raise ValueError(f"{name} is {number!r}: expected a number of at least 0")
        for name, token in {"bos_token_id": bos_token_id, "pad_token_id": pad_token_id}.items():
            if token is not None and (type(token) is not int or not 0 <= token < 2**31):
                raise ValueError(f"{name} is {token!r}: expected the number of a token")
        ends = eos_token_id if isinstance(eos_token_id, list) else [0 if eos_token_id is None else eos_token_id]
        if not all(type(number) is int and 0 <= number < 2**31 for number in ends):
            raise ValueError(f"eos_token_id is {eos_token_id!r}: expected the number of a token, or a list of them")
        if rope_parameters is not None and not isinstance(rope_parameters, dict):
            raise ValueError(f"rope_parameters is {rope_parameters!r}: expected an object")
        heads, groups = num_attention_heads, num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads is {heads}: expected a multiple of num_key_value_heads ({groups})")
        if head_dim is None:
            if hidden_size % heads:
                raise ValueError(
                    f"hidden_size is {hidden_size}: expected a multiple of num_attention_heads ({heads}), "
                    "or set head_dim"
                )
            head_dim = hidden_size // heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}: expected an even number, as rotary embeddings rotate pairs")
        if qk_norm and post_norm:
            raise ValueError("qk_norm is True: expected False with post_norm, as no other architecture has both")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = dict(rope_parameters or {})  # transformers writes its defaults into the mapping
        self.rms_norm_eps = rms_norm_eps
        self.post_norm = post_norm
        self.qk_norm = qk_norm
        self.initializer_range = float(initializer_range)
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        # All three, because vLLM's transformers backend asks for AutoModel, which saving a RexForCausalLM leaves out.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_rex.RexConfig",
                "AutoModel": "modeling_rex.RexModel",
                "AutoModelForCausalLM": "modeling_rex.RexForCausalLM",
            },
        )
        super().__init__(**kwargs)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type is {rope_type!r}: expected one of {', '.join(ROPE_TYPES)}, whose frequencies do not depend "
                "on a text's length"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor rotates {self.rotary_dim} of the {head_dim} numbers of a head: expected an "
                "even number of them, as rotary embeddings rotate pairs"
            )
        if qk_norm and self.rotary_dim < head_dim:
            raise ValueError(
                "qk_norm is True: expected False with partial_rotary_factor, as no other architecture has both"
            )

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are rotated, the first ones."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))


__all__ = ["RexConfig"]
