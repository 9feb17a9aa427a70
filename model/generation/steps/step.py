"""The interface between the engine and the computation of one step: segments of sequences in, logits and tokens out.

Scheduling, prefix reuse, sampling and failure isolation use only this interface. A step owns the model's weights, in
its own layout, and the KV cache, one slot per sequence. `steps.py` chooses among the implementations; tests compare
each with `reference.py`.

Shapes: R rows of logits of one segment, V vocabulary, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.generation.steps.draw import Adjustment, Draw

Wanted = Literal["none", "token", "last", "all", "hidden"]


class Segment(NamedTuple):
    """Tokens scheduled for one sequence in one step: they follow the first `start` positions of its slot.

    ids: int64, at least one. logits: which rows the step computes: none, only the chosen next token, the last token's
    logits, the logits of all tokens, or the hidden states of all tokens instead. rows: for "token", the number of last
    tokens after each of which the next one is chosen. draws: how they are chosen, one for each of `rows`, if they are
    not the most likely ones; only for "token" and "last". following: for a "token" of one row, how each of the tokens
    after it that may be computed in advance will be chosen, None for the most likely; only for steps that run ahead.
    is_adjusted: whether the slot's `Adjustment` changes the logits before the token is chosen; allowed_V: the only
    tokens that may be chosen, bool; both only for a "token" of one row, of a step that adjusts. steps: tokens to
    choose, each after the one before, for a single "token", as many as `Step.chained` says; `draws` has one for each.
    """

    slot: int
    start: int
    ids: np.ndarray
    logits: Wanted = "last"
    draws: tuple[Draw, ...] = ()
    rows: int = 1
    following: tuple[Draw | None, ...] = ()
    is_adjusted: bool = False
    allowed_V: np.ndarray | None = None
    steps: int = 1


class SegmentOutput(NamedTuple):
    """The results of a step for one segment.

    logits_RV: float32, R = 1 for "last", len(ids) for "all", 0 for "none"; for "token" 0 or `rows`, up to the step.
    hidden_RD: float32, hidden states after the final norm, R = len(ids), for "hidden"; else None.
    tokens: after each of the segment's last `rows` tokens, the one that its draw chooses, or the most likely, the
    lowest id among equals; None if the highest logit is not finite. Empty for "none" and "hidden"; `steps` of a chain.
    """

    logits_RV: Tensor
    tokens: Sequence[int | None] = ()
    hidden_RD: Tensor | None = None


class Step(ABC):
    """Computes steps of one model over `slots` sequences of up to `context_length` tokens.

    All methods are called from one thread at a time. Each slot's positions below `start` of a segment have been
    computed by earlier calls or copied; computing a segment again is harmless.
    """

    name: ClassVar[str]
    is_batch_invariant: ClassVar[bool] = False
    """Whether a token's results have the same bits whatever other tokens, of its own segment too, are in the step."""
    runs_ahead: ClassVar[bool] = False
    """Whether it computes the next token of each text before the last one is taken."""
    slots: int
    context_length: int
    vocab_size: int
    precision: str
    """Precision of the weights and, if different, of activations: "float32", "bfloat16", "int8"."""
    logits_device: torch.device
    bytes_per_token: int
    """Memory of one token's keys and values over all layers."""
    page_tokens: ClassVar[int] = 1
    """Allocation unit of a slot, in tokens."""

    @classmethod
    def unavailable(cls, model: PreTrainedModel) -> str | None:
        """Why this step cannot run the model on this machine, in one line; None if it can."""
        return None

    @classmethod
    def grows(cls, model: PreTrainedModel) -> bool:
        """Whether slots allocate memory on demand instead of a whole context in advance."""
        return True

    @classmethod
    @abstractmethod
    def create(
        cls, model: PreTrainedModel, slots: int, cache_tokens: int | None = None, threads: int | None = None
    ) -> "Step":
        """The step for a model, with a KV cache for `slots` sequences; does not modify the model.

        cache_tokens: most tokens that all slots hold together, at least one context; None: as many as they can.
        threads: of a step that has its own, at most; None: as many as torch has.
        """

    @abstractmethod
    def compute(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """Compute all segments, at most one per slot, and cache their keys and values.

        Outputs are in the order of the segments. Logits are valid until the next call. The model's exceptions
        propagate; a failed call may leave arbitrary values in the positions from `start` on.
        """

    def chained(self, most: int, left: Sequence[int]) -> Sequence[int]:
        """How many tokens of each text one call had better compute, one after the other (`Segment.steps`): at most
        `most`. left: tokens that the answers may still have.
        """
        return [1] * len(left)

    def adjust(self, slot: int, adjustment: Adjustment) -> bool:
        """Take what changes the logits of a slot's new text, for segments that are `is_adjusted` or have `allowed_V`;
        False if the step leaves both to the caller.
        """
        return False

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens of a slot to another."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Empty a slot so that no value in it, not even NaN, affects a later sequence."""

    def truncate(self, slot: int, length: int) -> None:  # noqa: B027  a step with fixed memory has nothing to do
        """Drop the keys and values from position `length` on; a step that `grows` frees their memory."""

    def cache_bytes(self, held_tokens: int) -> int:
        """Memory that keys and values hold now, bytes. held_tokens: of all slots, in whole pages."""
        return held_tokens * self.bytes_per_token

    @abstractmethod
    def renewed(self) -> "Step":
        """The same weights with new, empty slots: a hanging thread may still write to the old ones."""
