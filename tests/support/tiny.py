"""A REX model small enough to build in every test run, with a byte-level tokenizer trained on a few lines."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from model.build import build_config, build_model
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings, TokenizerSettings
from model.text.tokenizer import train_tokenizer

TEXT = "def main():\n    return 'größer als nichts' if print('日本語 🦖') else None\n"
CONTEXT = 96
ROPE_SCALING: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
}
"""Scaled rotary embeddings for CONTEXT; in heads of 8 numbers or more each scales some pairs and leaves others."""
ROTATIONS: list[dict[str, Any]] = [
    {"partial_rotary_factor": 0.5},
    {"post_norm": False, "partial_rotary_factor": 0.5, "rope_scaling": ROPE_SCALING["yarn"]},
    {"post_norm": False, "rope_scaling": ROPE_SCALING["llama3"]},
    {"rope_scaling": ROPE_SCALING["dynamic"]},
]
"""Shapes with other rotary embeddings than the default."""
SHAPES = [
    {},
    {"post_norm": False},
    {"post_norm": False, "qk_norm": True},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"tie_word_embeddings": True},
    *ROTATIONS,
]
"""Shapes that a step of the engine has to compute."""
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ message['content'] + eos_token }}
{%- elif message['role'] == 'user' -%}
{{ '### User:\\n' + message['content'] + '\\n\\n### Assistant:\\n' }}
{%- else -%}
{{ message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}"""
"""The template of the project's checkpoints before roles had marks, as their tokenizers have it."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSettings(vocab_size=280, sequence_length=CONTEXT), [TEXT] * 8)


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, *, vocab_size: int = 0, stops: bool = False, seed: int = 0, **shape: Any
) -> RexForCausalLM:
    """Random weights large enough for clear preferences; `stops` leaves the end-of-text token in place.

    vocab_size: with ids that the tokenizer does not have; 0 for none.
    Norms of queries and keys are random, too, so that one in place of the other changes the result.
    """
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,  # tied random weights mostly repeat the last token
    }
    config = build_config(
        ModelSettings(**{**settings, **shape}),
        vocab_size or len(tokenizer),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model = build_model(config, seed).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    if stops:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def save_tiny_model(directory: Path) -> Path:
    """A model directory as the pipeline publishes it."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, stops=True).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
