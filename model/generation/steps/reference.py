"""The reference step: `modeling_rex.py` in eager PyTorch, on any device and in any precision.

All tokens of a step are concatenated into one sequence, so each weight is read once per step; only attention is
computed per sequence: single tokens of neighboring slots in one call, longer segments one by one. Attention goes
through transformers' attention interface, so the architecture is defined only in `modeling_rex.py`.

Shapes: N tokens of all segments, n queries of one attention call, H query heads, G key/value heads, r = H / G, K head
dimension, S positions, R rows of logits, V vocabulary.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.generation.steps.cache import KeyValueCache, bytes_per_token
from model.generation.steps.draw import draw_token
from model.generation.steps.step import Segment, SegmentOutput, Step
from model.weights.int8 import precision_name
from model.weights.packed import pack

SLOT_ATTENTION = "rex_slots"
"""Name of the attention implementation in transformers' registry."""


@dataclass(frozen=True)
class AttentionBatch:
    """One call of attention: queries first to last of the sequence, over positions up to `length` of slots a to b."""

    first: int
    last: int
    a: int
    b: int
    length: int
    mask: Tensor | None
    """Added to the scores: (n, 1, 1, S) for single tokens, (r * n, S) for one slot's segment."""


@dataclass(frozen=True)
class AttentionMetadata:
    """Attention metadata of a step, passed through the model's forward as the argument `slots`."""

    cache: KeyValueCache
    slot_N: Tensor
    position_N: Tensor
    batches: tuple[AttentionBatch, ...]
    last_batches: tuple[AttentionBatch, ...]
    """Calls of the last layer, which computes queries only for tokens whose logits are needed."""


class ReferenceStep(Step):
    """Runs a model on the slots of a cache.

    It copies the model's modules but shares the weights: the caller's model stays usable.
    """

    name: ClassVar[str] = "reference"

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, shared).eval()
        self.model.config._attn_implementation = SLOT_ATTENTION
        self.cache = KeyValueCache(model.config, slots, dtype=model.dtype, device=model.device)
        self.slots, self.context_length = slots, model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.precision, self.logits_device = precision_name(model), model.device
        self.bytes_per_token = bytes_per_token(model.config, model.dtype)
        self._group = model.config.num_attention_heads // model.config.num_key_value_heads
        # transformers passes a 4-D mask through; this dummy avoids building a causal mask that slot attention ignores.
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device)

    @classmethod
    def grows(cls, model: PreTrainedModel) -> bool:
        """True on a CPU, whose memory is committed page by page; elsewhere the cache is allocated whole."""
        return model.device.type == "cpu"

    @classmethod
    def create(
        cls, model: PreTrainedModel, slots: int, cache_tokens: int | None = None, threads: int | None = None
    ) -> "ReferenceStep":
        """The step for a model, its layers packed for decoding."""
        step = cls(model, slots)
        pack(step.model)
        return step

    def renewed(self) -> "ReferenceStep":
        """The same modules on an empty cache."""
        other = copy.copy(self)
        other.cache = KeyValueCache(self.model.config, self.slots, dtype=self.model.dtype, device=self.model.device)
        return other

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens of a slot to another."""
        self.cache.copy(source, target, length)

    def clear(self, slot: int) -> None:
        """Set the keys and values of a slot to zeros."""
        self.cache.clear(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Give an emptied slot's memory back; a shortened one keeps it, since its next tokens follow at once."""
        if not length:
            self.cache.release(slot)

    def compute(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """Compute all segments in one forward pass; segments whose hidden states are requested take a second pass."""
        embedded = [segment for segment in segments if segment.logits == "hidden"]
        if embedded:
            hidden = iter(self.hidden_states(embedded))
            others = [segment for segment in segments if segment.logits != "hidden"]
            rest = iter(self.compute(others) if others else ())
            no_logits = torch.empty(0, self.vocab_size)
            return [
                SegmentOutput(no_logits, hidden_RD=next(hidden)) if segment.logits == "hidden" else next(rest)
                for segment in segments
            ]
        logits = self.logits(segments)
        last = [logits_RV[-segment.rows :] for segment, logits_RV in zip(segments, logits, strict=True)]
        highest, likeliest = (iter(values.tolist()) for values in torch.cat(last).max(dim=-1))
        outputs = []
        for segment, logits_RV, last_RV in zip(segments, logits, last, strict=True):
            tokens: list[int | None] = []
            for row, row_V in enumerate(last_RV):
                token = next(likeliest)
                if not math.isfinite(next(highest)):
                    token = None
                elif segment.draws:
                    token = draw_token(row_V, segment.draws[row])
                tokens.append(token)
            outputs.append(SegmentOutput(logits_RV, tokens))
        return outputs

    def logits(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Logits (R, V) of each segment, float32; fills the cache with keys and values."""
        return self._forward(segments, lambda **arguments: self.model(**arguments).logits[0])

    def hidden_states(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Hidden states (R, D) of all tokens of each segment, float32; fills the cache with keys and values."""
        return self._forward(segments, lambda **arguments: self.model.model(**arguments).last_hidden_state[0])

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], compute: Callable[..., Tensor]) -> list[Tensor]:
        """The outputs of `compute` for the requested rows, by segment."""
        order = sorted(range(len(segments)), key=lambda i: (len(segments[i].ids) > 1, segments[i].slot))
        row = [segments[i] for i in order]
        device = self.model.device
        ids_N = torch.from_numpy(np.concatenate([segment.ids for segment in row])).to(device)
        positions = [np.arange(segment.start, segment.start + len(segment.ids)) for segment in row]
        slots = [np.full(len(segment.ids), segment.slot) for segment in row]
        position_N = torch.from_numpy(np.concatenate(positions)).to(device)
        slot_N = torch.from_numpy(np.concatenate(slots)).to(device)
        batches = last_batches = tuple(self._attention_batches(row))
        selected, counts = _selected_rows(row)
        output_indices = None
        if len(selected) < len(ids_N):
            output_indices = torch.tensor(selected, dtype=torch.long, device=device)
            queries = [_selected_part(segment) for segment in row if segment.logits != "none"]
            last_batches = tuple(self._attention_batches(queries))
        rows = compute(
            input_ids=ids_N[None],
            position_ids=position_N[None],
            attention_mask=self._no_mask,
            use_cache=False,
            output_indices=output_indices,
            slots=AttentionMetadata(self.cache, slot_N, position_N, batches, last_batches),
        )
        by_segment: list[Tensor] = [rows] * len(segments)
        for i, part in zip(order, rows.float().split(counts), strict=True):
            by_segment[i] = part
        return by_segment

    def _attention_batches(self, row: list[Segment]) -> list[AttentionBatch]:
        batches, first = [], 0
        for _, run in itertools.groupby(enumerate(row), key=lambda at: _run_key(*at)):
            segments = [segment for _, segment in run]
            tokens = sum(len(segment.ids) for segment in segments)
            length = max(segment.start + len(segment.ids) for segment in segments)
            is_decode = tokens == len(segments)
            mask = self._decode_mask(segments, length) if is_decode else self._causal_mask(segments[0], length)
            batches.append(AttentionBatch(first, first + tokens, segments[0].slot, segments[-1].slot + 1, length, mask))
            first += tokens
        return batches

    def _decode_mask(self, segments: list[Segment], length: int) -> Tensor | None:
        starts = np.array([segment.start for segment in segments])
        if starts.min() == starts.max():
            return None
        hidden = torch.from_numpy(np.arange(length) > starts[:, None]).to(self.model.device)
        return self._additive(hidden)[:, None, None]

    def _causal_mask(self, segment: Segment, length: int) -> Tensor:
        last_seen = torch.arange(segment.start, length, device=self.model.device).repeat(self._group)
        return self._additive(torch.arange(length, device=self.model.device) > last_seen[:, None])

    def _additive(self, hidden: Tensor) -> Tensor:
        dtype = self.cache.keys[0].dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _run_key(index: int, segment: Segment) -> tuple[int, int]:
    """Grouping key: equal for single tokens in consecutive slots, different for all other segments."""
    return (0, segment.slot - index) if len(segment.ids) == 1 else (1, index)


def _selected_rows(row: list[Segment]) -> tuple[list[int], list[int]]:
    """Indices of the tokens whose logits are needed, and how many of them each segment has."""
    selected: list[int] = []
    counts = []
    end = 0
    for segment in row:
        end += len(segment.ids)
        whole = len(segment.ids)
        count = {"none": 0, "all": whole, "hidden": whole}.get(segment.logits, segment.rows)
        selected += range(end - count, end)
        counts.append(count)
    return selected, counts


def _selected_part(segment: Segment) -> Segment:
    if segment.logits in ("all", "hidden"):
        return segment
    return Segment(segment.slot, segment.start + len(segment.ids) - segment.rows, segment.ids[-segment.rows :])


def slot_attention_forward(
    module: Any,
    query_1HNK: Tensor,
    key_1GNK: Tensor,
    value_1GNK: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slots: AttentionMetadata | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers for `ReferenceStep`: output (1, N, H, K), no weights."""
    assert slots is not None, f"the attention implementation {SLOT_ATTENTION} needs the engine's metadata"
    keys, values = slots.cache.keys[module.layer_idx], slots.cache.values[module.layer_idx]
    keys[slots.slot_N, :, slots.position_N] = key_1GNK[0].transpose(0, 1)
    values[slots.slot_N, :, slots.position_N] = value_1GNK[0].transpose(0, 1)
    heads, _, head_dim = query_1HNK.shape[1:]
    groups = keys.shape[1]
    attn_outputs = []
    for batch in slots.last_batches if module.layer_idx == len(slots.cache.keys) - 1 else slots.batches:
        # The query heads of a group become rows of one query, so each key is read once for all of them.
        query_HnK = query_1HNK[0, :, batch.first : batch.last]
        n = batch.last - batch.first
        if batch.b - batch.a == n:
            query = query_HnK.transpose(0, 1).reshape(n, groups, -1, head_dim)
        else:
            query = query_HnK.reshape(1, groups, -1, head_dim)
        out = functional.scaled_dot_product_attention(
            query,
            keys[batch.a : batch.b, :, : batch.length],
            values[batch.a : batch.b, :, : batch.length],
            attn_mask=batch.mask,
            scale=scaling,
        )
        if batch.b - batch.a == n:
            attn_outputs.append(out.reshape(n, heads, head_dim))
        else:
            attn_outputs.append(out.reshape(heads, n, head_dim).transpose(0, 1))
    if not attn_outputs:
        return query_1HNK.transpose(1, 2), None
    attn_output_NHK = attn_outputs[0] if len(attn_outputs) == 1 else torch.cat(attn_outputs)
    return attn_output_NHK[None], None


ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
