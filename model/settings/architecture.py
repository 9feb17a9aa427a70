"""The shape of REX (`configs/model/`)."""

from dataclasses import dataclass

from model.settings.option import Settings, expect, option


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
