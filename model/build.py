"""From the settings of an experiment to a configuration, an initialized model and its size."""

import copy
from typing import Any

import torch

from model.configuration_rex import RexConfig
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings


def build_config(
    settings: ModelSettings,
    vocab_size: int,
    bos_token_id: int | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> RexConfig:
    """The configuration for a tokenizer of `vocab_size` tokens, special ones included."""
    return RexConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_position_embeddings,
        rope_parameters=_rope_parameters(settings),
        rms_norm_eps=settings.rms_norm_eps,
        post_norm=settings.post_norm,
        qk_norm=settings.qk_norm,
        tie_word_embeddings=settings.tie_word_embeddings,
        initializer_range=settings.initializer_range,
        attention_dropout=settings.attention_dropout,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def _rope_parameters(settings: ModelSettings) -> dict[str, Any]:
    """Everything about the rotary embeddings in one mapping, as transformers has it."""
    partial = {} if settings.partial_rotary_factor == 1 else {"partial_rotary_factor": settings.partial_rotary_factor}
    return {"rope_type": "default", "rope_theta": settings.rope_theta, **(settings.rope_scaling or {}), **partial}


def build_model(config: RexConfig, seed: int) -> RexForCausalLM:
    """A float32 model on the CPU, with its own copy of `config`.

    Its weights depend on `config` and `seed` alone, and the global generator stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RexForCausalLM(copy.deepcopy(config))


def count_config_parameters(config: RexConfig) -> int:
    """Parameters of the model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = RexForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
