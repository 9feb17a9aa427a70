"""The converted layouts against transformers' own classes of GLM-4, GLM, Llama and Qwen3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4ForCausalLM,
    GlmForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.weights.export import export_checkpoint, export_model
from tests.model.test_modeling_rex import left_pad, tiny_model, tokens
from tests.support.tiny import ROPE_SCALING

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "multi-query": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_size": 24,
        "rope_parameters": {"rope_theta": 500.0},
    },
    "multi-head": {"num_key_value_heads": 4, "eos_token_id": None, "pad_token_id": None},
    **{name: {"rope_parameters": {**scaling, "rope_theta": 500.0}} for name, scaling in ROPE_SCALING.items()},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "glm4": {},
    "glm4 of half heads": {"partial_rotary_factor": 0.5},
    "glm": {"post_norm": False, "partial_rotary_factor": 0.5},
    "llama": {"post_norm": False},
    "qwen3": {"post_norm": False, "qk_norm": True},
}
CLASSES = {
    "glm4": Glm4ForCausalLM,
    "glm4 of half heads": Glm4ForCausalLM,
    "glm": GlmForCausalLM,
    "llama": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}


def randomized(**changes: Any) -> RexForCausalLM:
    """A model whose norms matter, too: their weights start out constant, which would hide a swap."""
    model = tiny_model(**changes)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_equal_to_the_last_bit_in_float64(layout: str, shape: dict[str, Any]) -> None:
    model = randomized(**LAYOUTS[layout], **shape).double()
    exported = export_model(model)
    assert type(exported) is CLASSES[layout]
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (4, 60)])
    assert torch.equal(exported(ids).logits, model(ids).logits)
    assert torch.equal(exported(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_converted_model_generates_the_same_tokens(layout: str) -> None:
    model = randomized(**LAYOUTS[layout]).double()
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    ids = tokens(2, 6)
    assert torch.equal(export_model(model).generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_keeps_the_special_tokens_the_dtype_and_the_number_of_parameters(layout: str) -> None:
    model = randomized(**LAYOUTS[layout], eos_token_id=None).to(torch.bfloat16)
    exported = export_model(model)
    assert (exported.config.bos_token_id, exported.config.eos_token_id, exported.config.pad_token_id) == (0, None, 1)
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert exported.num_parameters() == model.num_parameters()
    model.lm_head.weight.data.zero_()
    assert exported.get_output_embeddings().weight.abs().max() > 0  # copies: REX may train on


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_converts_to_a_directory_that_needs_no_custom_code(layout: str, tmp_path: Path) -> None:
    model = randomized(**LAYOUTS[layout])
    model.save_pretrained(tmp_path / "rex")
    (tmp_path / "rex" / "tokenizer.json").write_text("{}")
    export_checkpoint(tmp_path / "rex", tmp_path / "native")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "native", trust_remote_code=False)
    assert type(loaded) is CLASSES[layout]
    torch.testing.assert_close(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert "tokenizer.json" in names and not [name for name in names if name.endswith(".py")]
    assert "auto_map" not in (tmp_path / "native" / "config.json").read_text()


def test_a_directory_without_a_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"^no config.json in .*: expected a REX checkpoint; train one first$"):
        export_checkpoint(tmp_path, tmp_path / "native")
