"""REX: a decoder-only language model, native to transformers.

Grouped-query attention, rotary embeddings, SwiGLU, no biases, and RMSNorm before and after each branch:
`x + post_norm(branch(pre_norm(x)))`. That is GLM-4-0414's arithmetic; `post_norm=False` gives that of Llama or GLM,
with `qk_norm=True` that of Qwen3. `model/weights/export.py` converts to these layouts. Class and module names are those
that transformers looks for. This file and `configuration_rex.py` travel with every checkpoint: no imports of others.

Shapes: B batch, T new tokens, S all tokens (cached and new), D hidden size, F intermediate size, H query heads,
G key/value heads, K head dimension, J numbers of it that are rotated, V vocabulary.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_rex import RexConfig

# Names that differ between releases: the cache (5.24), the mask's arguments (5.1, 5.4), a cache's position (5.4).
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_CACHES = Cache | PagedAttentionCache if CACHE == "cache" else Cache  # attention functions read pages before 5.24
_CACHES_TAKE_POSITIONS = "cache_kwargs" in inspect.signature(Cache.update).parameters
# Of the arguments that transformers' own code passes on, those that its attention functions read or that are harmless.
_PASSED_ON = {"num_items_in_batch", "cache_position", "is_causal", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"}
_PASSED_ON |= {"max_length_q", "max_length_k", "block_table", "read_index", "write_index", "logits_indices"}
_PASSED_ON |= {"max_seqlen_q", "max_seqlen_k", "cumulative_seqlens_q", "cumulative_seqlens_k", "logits_processor_args"}
_ATTENTION_OF_TRANSFORMERS = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"}


class RexRMSNorm(nn.Module):
    """Root mean square normalization (https://arxiv.org/abs/1910.07467); statistics in float32, as in Llama and GLM-4.

    initial_gain: what `weight` starts from. kernel: (x, weight, eps) to the output while training, or None to decline.
    """

    kernel: Callable[[Tensor, Tensor, float], Tensor | None] | None = None

    def __init__(self, size: int, eps: float, initial_gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), initial_gain))
        self.eps = eps
        self.initial_gain = initial_gain

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalize the last dimension; the shape stays, and outside of autocast the dtype."""
        if (
            self.kernel is not None
            and self.training
            and (out_BTD := self.kernel(x_BTD, self.weight, self.eps)) is not None
        ):
            return out_BTD
        normed_BTD = functional.rms_norm(x_BTD.float(), (x_BTD.shape[-1],), None, self.eps)
        return self.weight * normed_BTD.to(x_BTD.dtype)


class RexRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embeddings (https://arxiv.org/abs/2104.09864).

    The buffers are not saved. transformers restores them after building on the meta device, by the names used here:
    `rope_type`, `inv_freq`, `original_inv_freq`, `compute_default_rope_parameters`.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: RexConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type: str = config.rope_parameters["rope_type"]  # type: ignore[index,assignment]
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: RexConfig, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies, shape (J / 2,), and the factor on cosines and sines."""
        dim, theta = config.rotary_dim, config.rope_parameters["rope_theta"]  # type: ignore[index]
        return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `model.to(torch.bfloat16)` would round the frequencies to 8 bits: at position 1,000 an angle is off by
        # radians. Shown as integers they follow the device and keep their bits.
        for name in ("inv_freq", "original_inv_freq"):
            setattr(self, name, fn(getattr(self, name).view(torch.int32)).view(torch.float32))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines in x's dtype, each (B, T, J / 2), for position_ids (B, T)."""
        # Angles in float32: in bfloat16, positions above 256 would coincide.
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x_BTD.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + J/2]) of the first J by its position's angle; cos and sin are (B, 1, T, J / 2)."""
    half = cos.shape[-1]
    a, b, rest = x_BHTK.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def eager_attention_forward(
    module: "RexAttention",
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, the implementation "eager": output (B, T, H, K) and weights (B, H, T, S).

    attention_mask: added to the scores, broadcast to (B, H, T, S).
    """
    key_BHSK = key_BGSK.repeat_interleave(module.num_key_value_groups, dim=1)
    value_BHSK = value_BGSK.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHTS = query_BHTK @ key_BHSK.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    # float64 stays float64: as float32 the mask's lowest float64 number would be -inf and rows of padding NaN.
    accumulate = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = functional.softmax(scores_BHTS, dim=-1, dtype=accumulate).to(query_BHTK.dtype)
    weights_BHTS = functional.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value_BHSK).transpose(1, 2).contiguous(), weights_BHTS


class RexAttention(nn.Module):
    """Causal grouped-query attention over the tokens given and those in the cache.

    rotary_kernel: takes the place of `rotate` while training.
    """

    rotary_kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: RexConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim: int = config.head_dim  # type: ignore[assignment]  # RexConfig fills it in
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.o_proj.is_residual_projection = True  # type: ignore[assignment]
        eps = config.rms_norm_eps
        self.q_norm, self.k_norm = (RexRMSNorm(self.head_dim, eps) if config.qk_norm else nn.Identity() for _ in "qk")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        output_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, D) and, from implementations that give them, attention weights.

        position_embeddings: cosines and sines, each (B, T, J / 2). output_indices: as in `RexDecoderLayer.forward`.
        kwargs go to the attention implementation as they are.
        """
        heads = (-1, self.head_dim)
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        query_states, query_rotary = hidden_states, (cos, sin)
        if output_indices is not None:
            query_states = hidden_states[:, output_indices]
            query_rotary = (cos[:, :, output_indices], sin[:, :, output_indices])
        query_BHTK = self.q_norm(self.q_proj(query_states).unflatten(-1, heads)).transpose(1, 2)
        key_BGTK = self.k_norm(self.k_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        rotary = self.rotary_kernel if self.rotary_kernel is not None and self.training else rotate
        query_BHTK, key = rotary(query_BHTK, *query_rotary), rotary(key_BGTK, cos, sin)
        if past_key_values is not None:
            if _CACHES_TAKE_POSITIONS:
                beside: dict[str, Any] = {"cache_kwargs": {"cache_position": cache_position}}
            else:
                beside = {"kwargs": kwargs} if CACHE == "cache" else {}  # 5.24: where continuous batching's pages are
            key, value = past_key_values.update(key, value, self.layer_idx, **beside)
        # transformers searches this source for these spellings (5.2's, then 5.0's) before it allows a choice.
        attend: Callable = eager_attention_forward
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        elif self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attn_output, weights = attend(
            self,
            query_BHTK,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(2)), weights


class RexMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: RexConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.is_residual_projection = True  # type: ignore[assignment]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shape (B, T, D) in and out."""
        return self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class RexDecoderLayer(GradientCheckpointingLayer):
    """Attention, then SwiGLU, each a residual branch between its norms."""

    def __init__(self, config: RexConfig, layer_idx: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = RexAttention(config, layer_idx)
        self.mlp = RexMLP(config)
        # GLM-4's names. The weight-decay filter of transformers' Trainer knows norms by "layernorm" in the name.
        self.input_layernorm = RexRMSNorm(size, eps)
        self.post_attention_layernorm = RexRMSNorm(size, eps)
        self.post_self_attn_layernorm: nn.Module = nn.Identity()
        self.post_mlp_layernorm: nn.Module = nn.Identity()
        if config.post_norm:
            # Post-norm gain sets each branch's scale; started at the embedding's std so that early branches do not
            # swamp the token embedding. Started at 1, the loss falls much more slowly.
            self.post_self_attn_layernorm = RexRMSNorm(size, eps, initial_gain=config.initializer_range)
            self.post_mlp_layernorm = RexRMSNorm(size, eps, initial_gain=config.initializer_range)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        output_indices: Tensor | None = None,
        attention_weights: list[Tensor | None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Shape (B, T, D) in and out; `position_embeddings` is always given.

        attention_weights: takes this layer's, from implementations that give them.
        output_indices: indices of the tokens that go on, (R,); out comes (B, R, D). The attention implementation has to
        know which queries those are.
        """
        branch, weights = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            output_indices=output_indices,
            **kwargs,
        )
        if attention_weights is not None:
            attention_weights.append(weights)
        if output_indices is not None:
            hidden_states = hidden_states[:, output_indices]
        hidden_states = hidden_states + self.post_self_attn_layernorm(branch)
        branch = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.post_mlp_layernorm(branch)


class RexPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers needs to know to load, initialize, shard and compile REX."""

    config: RexConfig
    config_class = RexConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RexDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with std `initializer_range`; norms as they say.

        Without post-norms, the projections that end the 2 L branches start smaller by 1 / sqrt(2 L), so that depth does
        not raise their sum (GPT-2). With post-norms, that scale would be normalized away.
        """
        super()._init_weights(module)
        if isinstance(module, RexRMSNorm):
            init.constant_(module.weight, module.initial_gain)
        elif isinstance(module, nn.Linear) and hasattr(module, "is_residual_projection") and not self.config.post_norm:
            branches = 2 * self.config.num_hidden_layers
            init.normal_(module.weight, std=self.config.initializer_range / branches**0.5)


class RexModel(RexPreTrainedModel):
    """Token ids to hidden states: embedding, decoder layers, final norm."""

    def __init__(self, config: RexConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RexDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RexRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RexRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_indices: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of `input_ids` (B, T) or `inputs_embeds` (B, T, D); exactly one of them is given.

        attention_mask: (B, S), 0 for padding, or a mask (B, 1, T, S) for the attention implementation in use.
        position_ids: (B, T); counted on from the cache when left out. Without mask and cache, positions that start over
        within a row mark packed sequences, which do not see each other. output_indices: indices (R,) of the tokens
        whose hidden states, then (B, R, D), are wanted, for attention that can tell which queries those are. `cache`:
        another name of `past_key_values`. Raises TypeError for an argument that nothing here or in attention reads.
        """
        if isinstance(kwargs.get("cache"), _CACHES):
            past_key_values = kwargs.pop("cache")
        pages = {"cache"} if isinstance(kwargs.get("cache"), PagedAttentionCache | None) else set()
        unknown = sorted(kwargs.keys() - _PASSED_ON - pages)
        if unknown and self.config._attn_implementation in _ATTENTION_OF_TRANSFORMERS:
            raise TypeError(f"REX takes no argument {unknown[0]!r}: nothing in it or in its attention would read it")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a layer computed again would write its keys and values twice
        record_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        record_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        states, attentions = [], []  # type: ignore[var-annotated]
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        # Asked before a new cache and default positions come in: with either, transformers builds a mask tensor under
        # torch.compile, and a mask tensor rules out the flash kernels.
        is_plain_causal = (
            attention_mask is None
            and position_ids is None
            and past_key_values is None
            and self.config._attn_implementation == "sdpa"
            and getattr(self.config, "is_causal", True)
        )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None and (position_ids is None or _CACHES_TAKE_POSITIONS):
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        position_ids = cache_position.unsqueeze(0) if position_ids is None else position_ids
        mask = None
        if not is_plain_causal:
            arguments: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
            arguments[CACHE] = past_key_values
            arguments["inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"] = inputs_embeds
            if _CACHES_TAKE_POSITIONS:
                arguments["cache_position"] = cache_position
            mask = create_causal_mask(config=self.config, **arguments)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if record_states:
                states.append(hidden_states)
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                cache_position=cache_position,
                output_indices=output_indices if i == last else None,
                attention_weights=attentions if record_attentions else None,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*states, hidden_states) if record_states else None,
            attentions=tuple(attentions) if record_attentions else None,
            **{CACHE: past_key_values},
        )


class RexForCausalLM(RexPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """REX with a language-model head, tied to the embedding unless the configuration says otherwise.

    linear_loss: (hidden states (B, T, D), head weights (V, D), labels (B, T), num_items_in_batch, input ids (B, T)) to
    the loss. None takes transformers' loss on whole logits; a training sets one that never holds them.
    """

    linear_loss: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor] | None = None

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: RexConfig) -> None:
        super().__init__(config)
        self.model = RexModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens (an int) or those at its indices (a tensor).

        labels: (B, T), the input ids, shifted here; -100 is left out. The loss is nats per predicted token, or their
        sum over `num_items_in_batch` where the Trainer passes that. The other arguments: `RexModel.forward`.
        With labels and `linear_loss` set, there are no logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = logits = None
        if labels is not None and self.linear_loss is not None:
            items = kwargs.get("num_items_in_batch")
            loss = self.linear_loss(outputs.last_hidden_state, self.lm_head.weight, labels, items, input_ids)
        else:
            # All tokens for 0, the last ones for another int, those at its indices for a tensor.
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["RexForCausalLM", "RexModel", "RexPreTrainedModel"]

# A copy beside weights is one of several that may be loaded, and must not take the name from the package's own.
if __name__.startswith("model."):
    AutoConfig.register("rex", RexConfig, exist_ok=True)
    AutoModel.register(RexConfig, RexModel, exist_ok=True)
    AutoModelForCausalLM.register(RexConfig, RexForCausalLM, exist_ok=True)
    # Saving copies the two files beside the weights.
    RexConfig.register_for_auto_class()
    RexModel.register_for_auto_class("AutoModel")
    RexForCausalLM.register_for_auto_class("AutoModelForCausalLM")
