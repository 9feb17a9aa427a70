"""The step in C++ for CPUs (`model/native/`): int8, bfloat16 and float32 weights, one call per step.

A sequence's results are bit-identical whatever other sequences are in the step. Keys and values are stored in pages
that a slot allocates as its text grows; sequences with a common prefix share pages.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from transformers import PreTrainedModel

from model.generation.steps.draw import Draw
from model.generation.steps.step import Segment, SegmentOutput, Step
from model.native import library
from model.native.library import NativeModel, NativeSession, unsupported

SHARED_FROM = 1_000_000
"""Weights times tokens of a pass below which handing a part to another thread costs more than it saves."""


class NativeStep(Step):
    """Computes with the native library. threads: of a step that has enough to compute for more than one."""

    name = "native"
    is_batch_invariant = True
    logits_device = torch.device("cpu")
    page_tokens = library.PAGE_TOKENS

    def __init__(self, model: NativeModel, slots: int, threads: int) -> None:
        self._model, self._threads = model, threads
        self._session = NativeSession(model, slots, threads=threads, shared_from=SHARED_FROM)
        self.slots, self.context_length, self.vocab_size = slots, model.context_length, model.vocab_size
        self.precision = model.precision
        self.bytes_per_token = self._session.bytes_per_token
        self._no_logits = torch.empty(0, self.vocab_size)

    @classmethod
    def unavailable(cls, model: PreTrainedModel) -> str | None:
        """Why the library cannot run the model, in one line; None if it can."""
        return unsupported(model)

    @classmethod
    def create(
        cls, model: PreTrainedModel, slots: int, cache_tokens: int | None = None, threads: int | None = None
    ) -> Self:
        """The step for a model; the library copies the weights, so the model may be freed."""
        return cls(NativeModel(model), slots, threads or torch.get_num_threads())

    def cache_bytes(self, held_tokens: int) -> int:
        """Pages in use; slots with a common prefix share them, and a free one is used again."""
        return self._session.cache_bytes

    def compute(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """As `Step.compute`; raises PipelineError if a segment does not fit or memory runs out."""
        if segments[0].steps > 1:
            return self._chain(segments)
        if any(s.logits == "hidden" for s in segments):
            embedded = [s for s in segments if s.logits == "hidden"]
            hidden = iter(self._hidden(embedded))
            others = [s for s in segments if s.logits != "hidden"]
            rest = iter(self.compute(others) if others else ())
            return [next(hidden) if s.logits == "hidden" else next(rest) for s in segments]
        wanted = [{"all": len(s.ids), "none": 0}.get(s.logits, s.rows) for s in segments]
        logits_RV, chosen_R, highest_R = self._session.step_over(
            [(s.slot, s.start, len(s.ids), rows) for s, rows in zip(segments, wanted, strict=True)],
            [s.ids for s in segments],
            logits=any(s.logits in ("last", "all") for s in segments),
            draws=_draws(segments, wanted) if any(s.draws for s in segments) else None,
        )
        tokens = _tokens(chosen_R, highest_R)
        outputs, end = [], 0
        all_RV = None if logits_RV is None else torch.from_numpy(logits_RV)
        for s, rows in zip(segments, wanted, strict=True):
            start, end = end, end + rows
            segment_RV = self._no_logits if all_RV is None else all_RV[start:end]
            outputs.append(SegmentOutput(segment_RV, tokens[end - s.rows : end] if rows else ()))
        return outputs

    def chained(self, most: int, left: Sequence[int]) -> Sequence[int]:
        """As many for each text."""
        return [max(1, min(most, *left))] * len(left)

    def _chain(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """Several tokens of each segment, which has one."""
        steps, draws = segments[0].steps, None
        if any(s.draws for s in segments):
            of_texts = _draws(segments, [steps] * len(segments)).reshape(len(segments), steps, -1)
            draws = np.ascontiguousarray(of_texts.swapaxes(0, 1))
        texts = [(s.slot, s.start, int(s.ids[0])) for s in segments]
        chosen, highest = self._session.decode(texts, steps, draws)
        return [SegmentOutput(self._no_logits, _tokens(*row)) for row in zip(chosen.T, highest.T, strict=True)]

    def _hidden(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        hidden_RD = self._session.hidden_states([library.Segment(s.slot, s.start, s.ids, len(s.ids)) for s in segments])
        parts = torch.from_numpy(hidden_RD).split([len(s.ids) for s in segments])
        return [SegmentOutput(self._no_logits, hidden_RD=part_RD) for part_RD in parts]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a prefix of one slot to another; whole pages are shared, not copied."""
        self._session.copy_prefix(source, target, length)

    def clear(self, slot: int) -> None:
        """Empty a slot. Attention never reads positions that a sequence has not written, so nothing is zeroed."""
        self._session.truncate(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Free the pages after position `length`."""
        self._session.truncate(slot, length)

    def renewed(self) -> "NativeStep":
        """The same weights with empty slots and new threads."""
        return NativeStep(self._model, self.slots, self._threads)


def _tokens(chosen_R: np.ndarray, highest_R: np.ndarray) -> list[int | None]:
    """The chosen tokens, with None for each whose highest logit is not finite."""
    tokens: list[int | None] = chosen_R.tolist()
    is_finite_R = np.isfinite(highest_R)
    if is_finite_R.all():
        return tokens
    return [token if is_finite else None for token, is_finite in zip(tokens, is_finite_R.tolist(), strict=True)]


def _draws(segments: Sequence[Segment], rows: Sequence[int]) -> np.ndarray:
    """The `Draw` of each row of logits, shape (R, 5); rows whose token is the most likely one are zero."""
    nothing = (0.0,) * len(Draw._fields)
    table = [draw for s, count in zip(segments, rows, strict=True) for draw in (s.draws or [nothing] * count)]
    return np.array(table, dtype=np.float64)
