"""A model's weights in the layout of the graphs step, and one pass over rows of tokens.

Projections that read the same input are one matrix: query, key and value, and gate and up. Each row is a token of some
slot; all sizes are fixed by the buffers, so that a CUDA graph can record the pass.

Shapes: N rows, R rows of logits, D hidden size, S slots and the spare one, or positions, J rotated numbers of a head, O
outputs and I inputs of a matrix.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from model.generation.steps.graphs.adjustments import Tables
from model.generation.steps.graphs.pages import PagedCache, Places
from model.weights.int8 import Int8Embedding, Int8Matrix, QuantizedMatrix, TiedInt8Head


class Rows(NamedTuple):
    """Inputs of a pass, on its device.

    id_N: tokens; -1 for the one last chosen for the slot. slot_N, position_N: where keys and values go. wanted_R: rows
    whose next token is chosen; target_R: their slots. changes_R: what changes their logits first, the sum of 1 for the
    slot's `Adjustment` and 2 for a mask of allowed tokens. draws_R5: how they are chosen, the numbers of a `Draw`,
    zeros for the most likely one. All int32 but the draws, float32.
    """

    id_N: Tensor
    slot_N: Tensor
    position_N: Tensor
    wanted_R: Tensor
    target_R: Tensor
    changes_R: Tensor
    draws_R5: Tensor

    def known(self, chosen_S: Tensor) -> "Rows":
        """The same with all tokens in `id_N`. chosen_S: the token last chosen for each slot."""
        return self._replace(id_N=torch.where(self.id_N < 0, chosen_S[self.slot_N], self.id_N).clamp(min=0))


class Matrix:
    """A projection's weights (O, I), in int8 with a scale for each output, or in the model's dtype."""

    def __init__(self, modules: list[Any], operations: ModuleType) -> None:
        self._operations = operations
        self._scale_O: Tensor | None = None
        if all(isinstance(module, Int8Matrix) for module in modules):
            self._weight_OI = torch.cat([module.weight for module in modules])
            self._scale_O = torch.cat([module.weight_scale for module in modules])
        else:
            parts = [m.dequantized() if isinstance(m, QuantizedMatrix) else m.weight for m in modules]
            self._weight_OI = parts[0].detach() if len(parts) == 1 else torch.cat(parts).detach()

    def __call__(self, x_NI: Tensor) -> Tensor:
        """The product (N, O)."""
        if self._scale_O is None:
            return functional.linear(x_NI, self._weight_OI)
        product_NO: Tensor = self._operations.int8_product(x_NI, self._weight_OI, self._scale_O)
        return product_NO


class _Layer:
    def __init__(self, layer: Any, operations: ModuleType) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Matrix([attention.q_proj, attention.k_proj, attention.v_proj], operations)
        self.output = Matrix([attention.o_proj], operations)
        self.gate_up = Matrix([mlp.gate_proj, mlp.up_proj], operations)
        self.down = Matrix([mlp.down_proj], operations)
        self.norm, self.mlp_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.branch_norm, self.mlp_branch_norm = (
            None if isinstance(norm, nn.Identity) else norm.weight
            for norm in (layer.post_self_attn_layernorm, layer.post_mlp_layernorm)
        )
        norms = (attention.q_norm, attention.k_norm)
        self.qk_norms = None if isinstance(norms[0], nn.Identity) else (norms[0].weight, norms[1].weight)


class Decoder:
    """Computes rows of tokens with `operations`, the module `kernels` or `plain`. The model's tensors are shared where
    their layout is the same. head: gives the logits of hidden states, in the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, operations: ModuleType) -> None:
        config, self._operations = model.config, operations
        self._eps, self._scale = config.rms_norm_eps, config.head_dim**-0.5
        base: Any = model.model
        self._embedding = base.embed_tokens
        self._layers = [_Layer(layer, operations) for layer in base.layers]
        self._norm = base.norm.weight
        head: Any = model.get_submodule("lm_head")
        self.head = Matrix([head._table[0] if isinstance(head, TiedInt8Head) else head], operations)
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        with torch.inference_mode():
            cos, sin = base.rotary_emb(torch.empty(0, device=model.device), positions)
        self._rotary = cos[0].contiguous(), sin[0].contiguous()

    def hidden_states(self, rows: Rows, cache: PagedCache) -> Tensor:
        """Hidden states after the final norm of the wanted rows, (R, D); fills the cache. rows: `known` ones."""
        operations, id_N = self._operations, rows.id_N
        if isinstance(self._embedding, Int8Embedding):
            x_ND = self._embedding.rows(id_N)
        else:
            x_ND = functional.embedding(id_N, self._embedding.weight)
        y_ND = operations.norm(x_ND, self._layers[0].norm, self._eps)
        for layer, following, (keys, values) in zip(self._layers, [*self._layers[1:], None], cache.data, strict=True):
            places = Places(keys, values, cache.table, rows.slot_N, rows.position_N)
            q_NHK = operations.rotate_store(layer.qkv(y_ND), self._rotary, layer.qk_norms, self._eps, places)
            if following is None:  # only the rows that are wanted go on
                x_ND, q_NHK = x_ND[rows.wanted_R], q_NHK[rows.wanted_R]
                slot_R, position_R = rows.slot_N[rows.wanted_R], rows.position_N[rows.wanted_R]
                places = places._replace(slot_N=slot_R, position_N=position_R)
            attended_NE = operations.attention(q_NHK, places, self._scale)
            branch_ND = layer.output(attended_NE)
            x_ND, y_ND = operations.add_norm(x_ND, branch_ND, layer.branch_norm, layer.mlp_norm, self._eps)
            branch_ND = layer.down(operations.silu_times(layer.gate_up(y_ND)))
            next_norm = self._norm if following is None else following.norm
            x_ND, y_ND = operations.add_norm(x_ND, branch_ND, layer.mlp_branch_norm, next_norm, self._eps)
        return y_ND

    def choose(self, logits_RV: Tensor, draws_R5: Tensor) -> Tensor:
        """The next token of each row, int32; -1 if the highest logit is not finite."""
        tokens_R: Tensor = self._operations.choose(logits_RV, draws_R5)
        return tokens_R

    def adjust(self, logits_RV: Tensor, rows: Rows, tables: Tables) -> None:
        """Change the logits of the wanted rows as their `changes_R` say, in place. rows: `known` ones."""
        where = rows.slot_N, rows.position_N, rows.id_N, rows.wanted_R, rows.changes_R
        self._operations.adjust(logits_RV, tables, *where)
