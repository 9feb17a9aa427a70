"""Causal attention for training on a CPU, in blocks of queries: the attention implementation "rex_causal_blocks".

Each block is two products with the keys and values up to its end, so that half of all scores are never computed; query
heads that share a key/value head are rows of one product. The backward pass recomputes the attention weights: memory
grows with the length, not with its square. PyTorch's flash kernel does the same and takes 1.2 to 2.4 times as long here
(`bench/LOG.md`); calls with a mask, dropout or a cache fall back to it.

Shapes: B windows, T tokens, H query heads, G key/value heads, r = H / G, K head dimension, n tokens of a block, S
tokens up to its end.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "rex_causal_blocks"
BLOCK = 128
"""Queries of a block: smaller blocks skip more scores, larger ones make larger products."""


class _CausalBlocks(torch.autograd.Function):
    """Causal attention; the output is (B, T, H, K), the layout that the output projection takes."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scaling: float) -> Tensor:  # type: ignore[override]
        batch, heads, length, size = q_BHTK.shape
        groups = k_BGTK.shape[1]
        q_BGrTK = (q_BHTK * scaling).reshape(batch, groups, heads // groups, length, size)
        k_XTK, v_XTK = k_BGTK.reshape(-1, length, size), v_BGTK.reshape(-1, length, size)  # X: B times G
        out_BTHK = q_BHTK.new_empty(batch, length, heads, size)
        out_BGrTK = _by_group(out_BTHK, groups)
        for start in range(0, length, BLOCK):
            block = slice(start, start + BLOCK)
            weights = _weights(_rows(q_BGrTK, block), k_XTK, start)
            attn_output = weights @ v_XTK[:, : start + BLOCK]
            out_BGrTK[..., block, :] = attn_output.view_as(out_BGrTK[..., block, :])
        ctx.save_for_backward(q_BGrTK, k_XTK, v_XTK)
        ctx.scaling = scaling
        return out_BTHK

    @staticmethod
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q_BGrTK, k_XTK, v_XTK = ctx.saved_tensors
        batch, groups, _, length, size = q_BGrTK.shape
        grad_BGrTK = _by_group(grad_BTHK, groups)
        grad_q_BGrTK = torch.empty_like(q_BGrTK)
        # Sums over blocks, so accumulated in float32 at least.
        accumulate = torch.promote_types(k_XTK.dtype, torch.float32)
        grad_k_XTK, grad_v_XTK = torch.zeros_like(k_XTK, dtype=accumulate), torch.zeros_like(v_XTK, dtype=accumulate)
        for start in range(0, length, BLOCK):
            block, seen = slice(start, start + BLOCK), slice(start + BLOCK)
            q_rows, grad_rows = _rows(q_BGrTK, block), _rows(grad_BGrTK, block)
            weights = _weights(q_rows, k_XTK, start)
            grad_v_XTK[:, seen] += weights.mT @ grad_rows
            grad_weights = grad_rows @ v_XTK[:, seen].mT
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_k_XTK[:, seen] += grad_scores.mT @ q_rows
            grad_q_BGrTK[..., block, :] = (grad_scores @ k_XTK[:, seen]).view_as(grad_q_BGrTK[..., block, :])
        shape = (batch, groups, length, size)
        return (
            grad_q_BGrTK.mul_(ctx.scaling).reshape(batch, -1, length, size),
            grad_k_XTK.to(k_XTK.dtype).view(shape),
            grad_v_XTK.to(v_XTK.dtype).view(shape),
            None,
        )


def _by_group(x_BTHK: Tensor, groups: int) -> Tensor:
    """A view with query heads grouped by key/value head, (B, G, r, T, K)."""
    return x_BTHK.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _rows(x_BGrTK: Tensor, block: slice) -> Tensor:
    """The tokens of a block of all heads of a group, concatenated: (B * G, r * n, K)."""
    return x_BGrTK[..., block, :].flatten(0, 1).flatten(1, 2)


def _weights(q_rows: Tensor, k_XTK: Tensor, start: int) -> Tensor:
    """Attention weights of the rows of a block over the S tokens up to its end, (B * G, r * n, S)."""
    k_XSK = k_XTK[:, : start + BLOCK]
    scores = q_rows @ k_XSK.mT
    tokens = k_XSK.shape[1] - start
    later = torch.full((tokens, tokens), float("-inf"), dtype=scores.dtype).triu(1)
    scores.unflatten(1, (-1, tokens))[..., start:] += later
    return torch.softmax(scores, dim=-1)


def causal_blocks_forward(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Output (B, T, H, K), for transformers' attention interface."""
    if attention_mask is not None or dropout or query_BHTK.shape[2] != key_BGSK.shape[2]:
        return sdpa_attention_forward(
            module, query_BHTK, key_BGSK, value_BGSK, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query_BHTK, key_BGSK, value_BGSK = query_BHTK.to(dtype), key_BGSK.to(dtype), value_BGSK.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return _CausalBlocks.apply(query_BHTK, key_BGSK, value_BGSK, scaling), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, causal_blocks_forward)
# The masks of SDPA: none for plain causal attention.
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
