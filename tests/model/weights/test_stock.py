"""Stock models as initial weights: what export wrote comes back as it was, and what REX does not compute is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.training.initial.weights import start_from
from model.weights.export import export_checkpoint
from model.weights.stock import differing_options, read_weights
from tests.model.weights.test_export import LAYOUTS
from tests.support.tiny import CONTEXT, ROPE_SCALING, tiny_model, tiny_tokenizer

IDS = torch.arange(24)[None] % 280
LONG_IDS = torch.randint(2, 280, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
"""Longer than the texts that ROPE_SCALING is for without scaling."""


def saved(folder: Path, **shape: Any) -> RexForCausalLM:
    """A checkpoint at folder/rex, exported to folder/hf."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, **shape)
    model.save_pretrained(folder / "rex")
    tokenizer.save_pretrained(folder / "rex")
    export_checkpoint(folder / "rex", folder / "hf")
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_export_that_comes_back_is_the_same_to_the_bit(tmp_path: Path, layout: dict[str, Any], tied: bool) -> None:
    shape = {**layout, "tie_word_embeddings": tied}
    model = saved(tmp_path, **shape)
    original, back = load_file(tmp_path / "rex/model.safetensors"), read_weights(tmp_path / "hf")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)
    other = tiny_model(tiny_tokenizer(), seed=1, **shape)
    start_from(other, tmp_path / "hf", tiny_tokenizer())
    assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_a_stock_llama_in_several_files_and_half_precision_gives_its_own_logits(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    stock.save_pretrained(tmp_path / "llama", max_shard_size="20kB")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    model = tiny_model(tokenizer, post_norm=False)
    start_from(model, tmp_path / "llama", tokenizer)
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=0)


def test_embeddings_beyond_the_tokenizer_are_left_out_and_a_missing_file_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    stock.save_pretrained(tmp_path / "llama", max_shard_size="20kB")
    tokenizer.save_pretrained(tmp_path / "llama")
    model = tiny_model(tokenizer, post_norm=False)
    start_from(model, tmp_path / "llama", tokenizer)
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits[..., : len(tokenizer)], atol=1e-5, rtol=0)
    (lost := sorted((tmp_path / "llama").glob("model-*"))[1]).unlink()
    with pytest.raises(
        PipelineError, match=rf"^training.init_from is .*index.json names {lost.name}, which is not there"
    ):
        start_from(model, tmp_path / "llama", tokenizer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "qwen2"}, r"model_type 'qwen2': expected rex, llama, qwen3, glm4, glm"),
        ({"model_type": "qwen3"}, r"set model.qk_norm=true$"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2': expected rex, llama, qwen3, glm4, glm"),
        ({"attention_bias": True}, r"attention_bias True: expected False"),
        ({"mlp_bias": True}, r"mlp_bias True: expected False"),
        ({"sliding_window": 32}, r"sliding_window 32: expected None"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu': expected 'silu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"set '\+\+model.rope_scaling={rope_type:linear,factor:2.0}'$",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}},
            r"config.json: rope_parameters.factor is 0.5: expected at least 1, at most 1,048,576; take another model$",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            r"rope_parameters.rope_type is 'longrope': expected one of linear, dynamic, llama3, yarn; take another",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, r"Missing required keys .*; fetch the model"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5: expected 1.0, as REX computes nothing else"),
        ({"model_type": "glm", "partial_rotary_factor": 0.4}, r"0.4: expected an even share of a head's 8 numbers"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            r"quantized weights: expected full precision",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, r"set model.rope_theta=500.0$"),
        ({"rms_norm_eps": 1e-3}, r"set model.rms_norm_eps=0.001$"),
        ({"tie_word_embeddings": True}, r"lm_head.weight is missing there .*\(model.tie_word_embeddings=true\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_rex_or_the_experiment_does_not_compute_is_one_line_by_name(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    model = saved(tmp_path, post_norm=False)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = model(IDS).logits
    with pytest.raises(PipelineError, match=says) as caught:
        start_from(model, tmp_path / "hf", tiny_tokenizer())
    assert str(caught.value).startswith("training.init_from is ") and "\n" not in str(caught.value)
    assert torch.equal(model(IDS).logits, before)


def stock_model(folder: Path, kind: str, published: dict[str, Any]) -> PreTrainedModel:
    """A random stock model with a config.json as models are published: rope_scaling and rope_theta at the top."""
    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "attention_bias": False,
        "pad_token_id": 1,
        **published,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **shape}))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **shape}))
    tokenizer.save_pretrained(folder)
    return model.eval()


PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": {**ROPE_SCALING["llama3"]}, "rope_theta": 500_000.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama", {"rope_scaling": {**ROPE_SCALING["yarn"], "finetuned": True}, "tie_word_embeddings": True}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ("qwen3", {"rope_scaling": {**ROPE_SCALING["yarn"], "beta_fast": 8}, "rope_theta": 1e6}),
    ("qwen3", {"rope_scaling": {**ROPE_SCALING["yarn"], "attention_factor": 1.3, "truncate": False}}),
    ("glm4", {}),
    ("glm4", {"partial_rotary_factor": 0.25, "rope_scaling": ROPE_SCALING["yarn"]}),
    ("glm", {}),
]


@pytest.mark.parametrize(("kind", "published"), PUBLISHED, ids=str)
def test_a_stock_model_gives_its_own_logits_trains_on_and_comes_back_to_the_bit(
    tmp_path: Path, kind: str, published: dict[str, Any]
) -> None:
    stock = stock_model(tmp_path / "stock", kind, published)
    plain = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True}
    options = differing_options(tmp_path / "stock", tiny_model(tiny_tokenizer(), **plain).config)
    shape = {**plain, **adopted(options)}
    model = tiny_model(tiny_tokenizer(), seed=1, **shape)
    start_from(model, tmp_path / "stock", tiny_tokenizer())
    torch.testing.assert_close(model(LONG_IDS).logits, stock(LONG_IDS).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "rex")
    export_checkpoint(tmp_path / "rex", tmp_path / "back")
    first, back = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "back"))
    assert first.keys() == back.keys() and all(torch.equal(first[name], back[name]) for name in first)
    given, found = (AutoConfig.from_pretrained(tmp_path / name).rope_parameters for name in ("stock", "back"))
    assert {**given, "type": None, "finetuned": None} == {**found, "type": None, "finetuned": None}
    for each in (model, stock):
        each.train().requires_grad_(True)
        each(LONG_IDS, labels=LONG_IDS, use_cache=False).loss.backward()
        torch.optim.SGD(each.parameters(), lr=0.5).step()
    torch.testing.assert_close(model.eval()(LONG_IDS).logits, stock.eval()(LONG_IDS).logits, atol=1e-3, rtol=1e-3)


def adopted(options: list[str]) -> dict[str, Any]:
    """The fields of ModelSettings that overrides set, by Hydra's own reading of them."""
    overrides = OverridesParser.create().parse_overrides([part.strip("'") for part in " ".join(options).split()])
    return {override.key_or_group.removeprefix("model."): override.value() for override in overrides}


def test_a_llama_is_no_model_with_norms_after_its_branches(tmp_path: Path) -> None:
    saved(tmp_path, post_norm=False)
    with pytest.raises(PipelineError, match=r"missing there and .*\(model.post_norm=false\)"):
        start_from(tiny_model(tiny_tokenizer()), tmp_path / "hf", tiny_tokenizer())


def test_a_stock_qwen3_gives_its_own_logits_and_one_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    stock = Qwen3ForCausalLM(config).eval()
    for name, weight in stock.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    stock.save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    model = tiny_model(tokenizer, post_norm=False, qk_norm=True, head_dim=16)
    start_from(model, tmp_path / "qwen3", tokenizer)
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, atol=1e-5, rtol=0)
    path = tmp_path / "qwen3/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_sliding_window": True, "sliding_window": 8}))
    with pytest.raises(PipelineError, match=r"sliding_window 8: expected None"):
        start_from(model, tmp_path / "qwen3", tokenizer)
