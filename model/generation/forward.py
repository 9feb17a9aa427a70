"""One pass of the model over pieces of many texts at once, each continuing what its slot of the cache holds.

All tokens stand in one row, so that each weight is read once for everybody; only attention looks at them apart: single
tokens of neighbouring slots in one call, longer pieces one by one. It goes through transformers' attention interface, so
the architecture stands in `modeling_rex.py` alone.

Shapes: N tokens of all pieces, n rows of one call, H query heads, G key/value heads, r = H / G, K head dimension,
S positions, R rows of logits, V vocabulary.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.generation.cache import SlotCache

ATTENTION = "rex_slots"


@dataclass(frozen=True)
class Piece:
    """Tokens that follow the first `start` of a slot. logits: for which of them: the last one, all, or none."""

    slot: int
    start: int
    ids: np.ndarray
    logits: Literal["last", "all", "none"] = "last"


@dataclass(frozen=True)
class _Call:
    """One call of attention: queries first to last of the row, over positions up to `length` of slots a to b."""

    first: int
    last: int
    a: int
    b: int
    length: int
    mask: Tensor | None
    """Added to the scores: (n, 1, 1, S) for single tokens, (r * n, S) for one slot's piece."""


@dataclass(frozen=True)
class _Plan:
    """How the layers attend in this pass: travels through the model's forward as the argument `slots`."""

    cache: SlotCache
    slot_N: Tensor
    position_N: Tensor
    calls: tuple[_Call, ...]
    last_calls: tuple[_Call, ...]
    """Those of the last layer, where only tokens whose logits are wanted ask."""


class RaggedForward:
    """Runs a model on the slots of a cache.

    It has its own copy of the model's modules, which shares the weights: whoever gave the model may go on using it.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, shared).eval()
        self.model.config._attn_implementation = ATTENTION
        self.cache = cache
        self._group = model.config.num_attention_heads // model.config.num_key_value_heads
        # A mask of four dimensions is taken as it is: no time goes into a mask that nobody reads.
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device)

    def with_cache(self, cache: SlotCache) -> "RaggedForward":
        """The same modules on another cache."""
        other = copy.copy(self)
        other.cache = cache
        return other

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Logits of each piece, float32, shape (R, V) with R = 1, len(ids) or 0; keys and values are now in the cache.

        What the cache says of its slots stays: append the tokens once the pass is good. Running a piece again is
        harmless. Raises whatever the model raises.
        """
        order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].ids) > 1, pieces[i].slot))
        row = [pieces[i] for i in order]
        device = self.model.device
        ids_N = torch.from_numpy(np.concatenate([piece.ids for piece in row])).to(device)
        positions = [np.arange(piece.start, piece.start + len(piece.ids)) for piece in row]
        slots = [np.full(len(piece.ids), piece.slot) for piece in row]
        position_N = torch.from_numpy(np.concatenate(positions)).to(device)
        slot_N = torch.from_numpy(np.concatenate(slots)).to(device)
        calls = last_calls = tuple(self._calls(row))
        kept, counts = _kept(row)
        logits_indices = None
        if len(kept) < len(ids_N):
            logits_indices = torch.tensor(kept, dtype=torch.long, device=device)
            last_calls = tuple(self._calls([_kept_part(piece) for piece in row if piece.logits != "none"]))
        logits_RV = self.model(
            input_ids=ids_N[None],
            position_ids=position_N[None],
            attention_mask=self._no_mask,
            use_cache=False,
            logits_indices=logits_indices,
            slots=_Plan(self.cache, slot_N, position_N, calls, last_calls),
        ).logits[0]
        by_piece: list[Tensor] = [logits_RV] * len(pieces)
        for i, part_RV in zip(order, logits_RV.float().split(counts), strict=True):
            by_piece[i] = part_RV
        return by_piece

    def _calls(self, row: list[Piece]) -> list[_Call]:
        calls, first = [], 0
        for _, run in itertools.groupby(enumerate(row), key=lambda at: _run_key(*at)):
            pieces = [piece for _, piece in run]
            tokens = sum(len(piece.ids) for piece in pieces)
            length = max(piece.start + len(piece.ids) for piece in pieces)
            mask = self._row_mask(pieces, length) if tokens == len(pieces) else self._piece_mask(pieces[0], length)
            calls.append(_Call(first, first + tokens, pieces[0].slot, pieces[-1].slot + 1, length, mask))
            first += tokens
        return calls

    def _row_mask(self, pieces: list[Piece], length: int) -> Tensor | None:
        starts = np.array([piece.start for piece in pieces])
        if starts.min() == starts.max():
            return None
        hidden = torch.from_numpy(np.arange(length) > starts[:, None]).to(self.model.device)
        return self._additive(hidden)[:, None, None]

    def _piece_mask(self, piece: Piece, length: int) -> Tensor:
        last_seen = torch.arange(piece.start, length, device=self.model.device).repeat(self._group)
        return self._additive(torch.arange(length, device=self.model.device) > last_seen[:, None])

    def _additive(self, hidden: Tensor) -> Tensor:
        dtype = self.cache.keys[0].dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _run_key(index: int, piece: Piece) -> tuple[int, int]:
    """Equal for single tokens whose slots follow each other, different for everything else."""
    return (0, piece.slot - index) if len(piece.ids) == 1 else (1, index)


def _kept(row: list[Piece]) -> tuple[list[int], list[int]]:
    """Places in the row whose logits are wanted, and how many of them are each piece's."""
    kept: list[int] = []
    counts = []
    end = 0
    for piece in row:
        end += len(piece.ids)
        count = {"last": 1, "all": len(piece.ids), "none": 0}[piece.logits]
        kept += range(end - count, end)
        counts.append(count)
    return kept, counts


def _kept_part(piece: Piece) -> Piece:
    if piece.logits == "all":
        return piece
    return Piece(piece.slot, piece.start + len(piece.ids) - 1, piece.ids[-1:])


def attend_to_slots(
    module: Any,
    query_1HNK: Tensor,
    key_1GNK: Tensor,
    value_1GNK: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slots: _Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers for `RaggedForward`: output (1, N, H, K), no weights."""
    assert slots is not None, f"the attention implementation {ATTENTION} needs the engine's forward pass"
    keys, values = slots.cache.keys[module.layer_idx], slots.cache.values[module.layer_idx]
    keys[slots.slot_N, :, slots.position_N] = key_1GNK[0].transpose(0, 1)
    values[slots.slot_N, :, slots.position_N] = value_1GNK[0].transpose(0, 1)
    heads, _, head_dim = query_1HNK.shape[1:]
    groups = keys.shape[1]
    mixed = []
    for call in slots.last_calls if module.layer_idx == len(slots.cache.keys) - 1 else slots.calls:
        # The heads of a group stand as rows of one query: keys are read once and never repeated.
        query_HnK = query_1HNK[0, :, call.first : call.last]
        n = call.last - call.first
        if call.b - call.a == n:
            query = query_HnK.transpose(0, 1).reshape(n, groups, -1, head_dim)
        else:
            query = query_HnK.reshape(1, groups, -1, head_dim)
        out = functional.scaled_dot_product_attention(
            query,
            keys[call.a : call.b, :, : call.length],
            values[call.a : call.b, :, : call.length],
            attn_mask=call.mask,
            scale=scaling,
        )
        if call.b - call.a == n:
            mixed.append(out.reshape(n, heads, head_dim))
        else:
            mixed.append(out.reshape(heads, n, head_dim).transpose(0, 1))
    if not mixed:
        return query_1HNK.transpose(1, 2), None
    joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
    return joined[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend_to_slots)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
