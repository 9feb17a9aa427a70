"""Int4 weights: the nearest of sixteen values is stored, and a model keeps its values and scales wherever it moves."""

import pytest
import torch
from torch import nn

from model.weights import int4, int8
from model.weights.int4 import GROUP, ZERO, Int4Linear, quantize_weight
from model.weights.int8 import Int8Embedding, Int8Linear
from tests.support.tiny import tiny_model, tiny_tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int() - ZERO


def restored(packed: torch.Tensor, scale_NG: torch.Tensor) -> torch.Tensor:
    return unpacked(packed) * scale_NG.float().repeat_interleave(GROUP, dim=1)


def test_a_layer_returns_the_values_and_scales_that_are_stored():
    weight_NK = torch.randn(6, 96) * torch.logspace(-6, 3, 6)[:, None]
    layer = Int4Linear(6, 96, torch.float32, torch.device("cpu"))
    layer.set_weight(weight_NK)
    assert torch.equal(layer.dequantized(), restored(*quantize_weight(weight_NK)))
    x_MK = torch.randn(3, 96)
    torch.testing.assert_close(layer(x_MK), x_MK @ layer.dequantized().T)


def test_a_group_loses_no_more_than_with_any_plain_scale():
    weight_NK = torch.randn(64, 4 * GROUP)
    groups_NGI = weight_NK.reshape(64, 4, GROUP)
    ours = (restored(*quantize_weight(weight_NK)).reshape_as(groups_NGI) - groups_NGI).square().sum(-1)
    largest = torch.gather(groups_NGI, 2, groups_NGI.abs().argmax(-1, keepdim=True))
    for scale in (largest / -8, groups_NGI.abs().amax(-1, keepdim=True) / 7):
        scale = scale.to(torch.bfloat16).float()
        plain = (groups_NGI / scale).round().clamp(-8, 7) * scale
        assert ours.mean() < (plain - groups_NGI).square().sum(-1).mean()


def test_values_that_sixteen_steps_can_hold_are_kept_exactly():
    values = torch.arange(-8, 8).repeat(2).float()
    weight_NK = torch.stack([values * 0.5, values * -0.25, torch.zeros(32), values.clamp(-7, 7) * 0.125])
    packed, scale_NG = quantize_weight(weight_NK)
    assert torch.equal(restored(packed, scale_NG), weight_NK)
    assert scale_NG.isfinite().all()


def test_other_inputs_than_whole_groups_are_refused_and_such_layers_are_int8():
    with pytest.raises(ValueError, match="48 inputs: int4 needs a multiple of 32"):
        quantize_weight(torch.zeros(2, 48))
    model = int4.quantize(tiny_model(tiny_tokenizer(), hidden_size=64, intermediate_size=48))
    assert isinstance(model.model.layers[0].mlp.down_proj, Int8Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)


def test_embedding_and_head_are_int8_tied_or_not():
    untied = int4.quantize(tiny_model(tiny_tokenizer(), **SHAPE))
    tied = int4.quantize(tiny_model(tiny_tokenizer(), tie_word_embeddings=True, **SHAPE))
    assert isinstance(untied.lm_head, Int8Linear) and isinstance(tied.model.embed_tokens, Int8Embedding)
    assert isinstance(tied.lm_head, int8.TiedInt8Head)
    assert {int8.precision_name(untied), int8.precision_name(tied)} == {"int4"}
    assert int8.precision_name(untied.to(torch.bfloat16)) == "int4, bfloat16"
    assert int8.count_parameters(untied) == int8.count_parameters(tiny_model(tiny_tokenizer(), **SHAPE))


def test_another_type_of_activations_keeps_the_scales_and_dequantizing_gives_plain_layers():
    model = int4.quantize(tiny_model(tiny_tokenizer(), **SHAPE))
    layer = model.model.layers[0].mlp.up_proj
    before, values = layer.weight_scale.clone(), layer.dequantized()
    model.to(torch.float16).to(torch.float32)
    assert layer.weight_scale.dtype == torch.bfloat16 and torch.equal(layer.weight_scale, before)
    int8.dequantize(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, values)
