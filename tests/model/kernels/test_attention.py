"""Causal attention in blocks: what PyTorch's gives, forward and backward, and where it is left to PyTorch's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.build import build_config, build_model
from model.kernels.attention import ATTENTION, BLOCK, causal_blocks_forward
from model.settings import ModelSettings


def heads(count: int, length: int, dtype: torch.dtype, seed: int) -> Tensor:
    """As the model gives them: (B, T, heads, K) seen as (B, heads, T, K)."""
    drawn = torch.randn(2, length, count, 16, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_blocks_give_the_output_and_gradients_of_whole_attention(length, dtype, near):
    query, key, value = (heads(count, length, dtype, seed) for seed, count in enumerate((6, 2, 2)))
    exact = [given.detach().double().requires_grad_() for given in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True, scale=0.3)
    found, _ = causal_blocks_forward(torch.nn.Module(), query, key, value, None, scaling=0.3)
    assert found.shape == (2, length, 6, 16) and found.dtype == dtype
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected.backward(slope)
    found.backward(slope.transpose(1, 2).to(dtype))
    pairs = [(found.transpose(1, 2), expected)]
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip((query, key, value), exact, strict=True)]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= near * (theirs.norm() + 1)  # of one token, gradients are 0


def test_a_model_with_blocks_has_the_logits_of_one_without_also_padded_and_with_a_cache():
    settings = ModelSettings(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    plain, blocks = (build_model(build_config(settings, 300, 0, 0, 1), seed=0).eval() for _ in range(2))
    blocks.config._attn_implementation = ATTENTION
    ids_BT = torch.randint(2, 300, (2, BLOCK + 20), generator=torch.Generator().manual_seed(0))
    padding_BT = torch.ones_like(ids_BT)
    padding_BT[0, :5] = 0
    with torch.inference_mode():
        for inputs in ({"input_ids": ids_BT}, {"input_ids": ids_BT, "attention_mask": padding_BT}):
            torch.testing.assert_close(blocks(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
        made = [model.generate(ids_BT, max_new_tokens=4, do_sample=False) for model in (plain, blocks)]  # type: ignore[operator]
    assert torch.equal(*made)
