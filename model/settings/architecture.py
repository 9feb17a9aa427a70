"""The shape of REX (`configs/model/`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.settings.option import Bounds, Settings, expect, option

ROPE_SCALING: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Types of scaled rotary embeddings, each with the parameters that it needs."""
OPTIONAL_ROPE_SCALING: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""Parameters that a type takes besides."""
_POSITIVE, _AT_LEAST_1 = Bounds(above=0, maximum=2**20), Bounds(minimum=1, maximum=2**20)


@dataclass
class ModelSettings(Settings, group="model"):
    """The shape of REX, with Hugging Face's field names (`configs/model/`)."""

    hidden_size: int = option(256, "Width of the residual stream.", above=0, maximum=65_536)
    intermediate_size: int = option(768, "Width of the SwiGLU branch.", above=0, maximum=524_288)
    num_hidden_layers: int = option(4, "Decoder layers.", above=0, maximum=1024)
    num_attention_heads: int = option(
        4, "Query heads; divides hidden_size unless head_dim is set.", above=0, maximum=1024
    )
    num_key_value_heads: int = option(
        2,
        "Key/value heads, each shared by a group of query heads; divides num_attention_heads.",
        above=0,
        maximum=1024,
    )
    head_dim: int | None = option(
        None, "Width of a head, even; null: hidden_size / num_attention_heads.", above=0, maximum=4096
    )
    max_position_embeddings: int = option(1024, "Context length.", unit="tokens", above=0, maximum=2**20)
    rope_theta: float = option(10_000.0, "Base of the rotary embeddings' wavelengths.", above=0, maximum=1e12)
    rope_scaling: dict[str, Any] | None = option(
        None,
        "Rotary embeddings scaled for a longer context, by transformers' names: rope_type (linear, dynamic, llama3 or "
        "yarn), factor and what else the type takes, such as original_max_position_embeddings; null: not scaled.",
    )
    partial_rotary_factor: float = option(
        1.0,
        "Share of each head's numbers, the first ones, that rotary embeddings rotate (GLM-4 and GLM layouts).",
        above=0,
        maximum=1.0,
    )
    rms_norm_eps: float = option(1e-5, "Added to the mean square in RMSNorm.", above=0, maximum=1.0)
    post_norm: bool = option(
        True, "RMSNorm after each branch too (GLM-4 layout); false: before each branch only (Llama or Qwen3 layout)."
    )
    qk_norm: bool = option(
        False, "RMSNorm of each head's queries and keys (Qwen3 layout); needs post_norm false, as no layout has both."
    )
    tie_word_embeddings: bool = option(True, "One table for input and output embeddings.")
    initializer_range: float = option(0.02, "Standard deviation of the initial weights.", above=0, maximum=10.0)
    attention_dropout: float = option(0.0, "Dropout rate of the attention weights in training.", minimum=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:
            expect(
                self.hidden_size % self.num_attention_heads == 0,
                "model.hidden_size",
                self.hidden_size,
                f"a multiple of model.num_attention_heads ({self.num_attention_heads}), or set model.head_dim",
            )
        expect(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"a multiple of model.num_key_value_heads ({self.num_key_value_heads})",
        )
        expect(
            not (self.qk_norm and self.post_norm),
            "model.qk_norm",
            self.qk_norm,
            "false, or model.post_norm=false: no layout that other engines read has both kinds of norms",
        )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        expect(head_dim % 2 == 0, "model.head_dim", head_dim, "an even number, as rotary embeddings rotate pairs")
        rotary_dim = int(head_dim * self.partial_rotary_factor)
        expect(
            rotary_dim > 0 and rotary_dim % 2 == 0,
            "model.partial_rotary_factor",
            self.partial_rotary_factor,
            f"an even share of a head's {head_dim} numbers, not {rotary_dim}, as rotary embeddings rotate pairs",
        )
        expect(
            rotary_dim == head_dim or not self.qk_norm,
            "model.partial_rotary_factor",
            self.partial_rotary_factor,
            "1, or model.qk_norm=false: no layout that other engines read has both",
        )
        if self.rope_scaling is not None:
            check_rope_scaling("model.rope_scaling", self.rope_scaling)


def check_rope_scaling(where: str, scaling: Mapping[str, Any]) -> None:
    """Raises PipelineError, one line, for an unknown type, a parameter too many or too few, and one out of range.

    where: the mapping's place, for the message.
    """
    kind = str(scaling.get("rope_type"))
    expect(kind in ROPE_SCALING, f"{where}.rope_type", scaling.get("rope_type"), f"one of {', '.join(ROPE_SCALING)}")
    needed, optional = ROPE_SCALING[kind], OPTIONAL_ROPE_SCALING.get(kind, ())
    names = scaling.keys() - {"rope_type"}
    expected = f"{', '.join(needed)}{' and, if need be, ' if optional else ''}{', '.join(optional)}"
    fits = set(needed) <= names <= {*needed, *optional}
    expect(fits, where, dict(scaling), f"{expected} with the type {kind}")
    for name in sorted(names - {"truncate"}):
        value = scaling[name]
        bounds = _AT_LEAST_1 if name in ("factor", "original_max_position_embeddings") else _POSITIVE
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        expect(is_number and bounds.admits(value), f"{where}.{name}", value, str(bounds))
    truncate = scaling.get("truncate", True)
    expect(isinstance(truncate, bool), f"{where}.truncate", truncate, "true or false")
    for low, high, defaults in (("low_freq_factor", "high_freq_factor", (0, 1)), ("beta_slow", "beta_fast", (1, 32))):
        least, most = scaling.get(low, defaults[0]), scaling.get(high, defaults[1])
        expect(least < most, f"{where}.{high}", most, f"more than {low} ({least})")
