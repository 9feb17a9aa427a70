"""The step in CUDA graphs, for NVIDIA GPUs: one launch for a whole step, one step ahead of the host.

Before the host reads the tokens of a step it launches the next one, whose rows take their tokens on the device. What
the scheduler asks for next is then there already, or launched. What it never asks for is dropped: what its row wrote
lies behind the end of its text.
"""

import copy
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.errors import PipelineError, one_line
from model.generation.steps.cache import bytes_per_token
from model.generation.steps.draw import Adjustment, Draw
from model.generation.steps.graphs.decoder import Decoder
from model.generation.steps.graphs.pages import PAGE, PagedCache, to_device
from model.generation.steps.graphs.passes import MAX_ROWS, Pass, Passes, Row, Wanted
from model.generation.steps.graphs.self_check import check
from model.generation.steps.step import Segment, SegmentOutput, Step
from model.weights.int8 import precision_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Ahead(NamedTuple):
    """The next token of a text, computed in advance. id: the token that it follows."""

    launched: Pass
    start: int
    id: int
    draws: tuple[Draw, ...]
    is_adjusted: bool

    def computes(self, segment: Segment) -> bool:
        """Whether a segment asks for just this."""
        is_token = segment.logits == "token" and len(segment.ids) == 1 and segment.allowed_V is None
        asked = segment.start, int(segment.ids[0]), segment.draws, segment.is_adjusted
        return is_token and asked == self[1:]


class GraphStep(Step):
    """Computes with Triton kernels, recorded in a CUDA graph for each of a few numbers of rows."""

    name = "graphs"
    runs_ahead = True
    page_tokens = PAGE
    operations: ClassVar[str] = "model.generation.steps.graphs.kernels"
    """The module of the operations."""

    def __init__(self, model: PreTrainedModel, slots: int, cache_tokens: int | None = None) -> None:
        config = model.config
        self._decoder = Decoder(model, importlib.import_module(self.operations))
        self._new_cache = partial(
            PagedCache,
            *(config.num_hidden_layers, config.num_key_value_heads, config.head_dim),
            slots=slots,
            context_length=config.max_position_embeddings,
            tokens=cache_tokens or slots * config.max_position_embeddings,
            dtype=model.dtype,
            device=model.device,
        )
        self.slots, self.context_length = slots, config.max_position_embeddings
        self.vocab_size: int = config.vocab_size
        self.precision, self.logits_device = precision_name(model), model.device
        self.bytes_per_token = bytes_per_token(config, model.dtype)
        self._no_logits = torch.empty(0, self.vocab_size, device=model.device)
        self._start()

    @torch.inference_mode()
    def _start(self) -> None:
        self._cache = self._new_cache()
        self._passes = Passes(self._decoder, self._cache, self.vocab_size)
        self._ahead: dict[int, _Ahead] = {}
        """By slot."""
        self._had_others = False

    @classmethod
    def unavailable(cls, model: PreTrainedModel) -> str | None:
        """Why the step cannot run the model, in one line; None if it can."""
        if model.device.type != "cuda":
            return f"the model is on {model.device}, not on a GPU"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if model.config.model_type != "rex":
            return f"it supports models of the type 'rex', not {model.config.model_type!r}"
        if any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules()):
            return "a linear layer has a bias"
        if model.dtype not in DTYPES:
            return f"the model is in {str(model.dtype).removeprefix('torch.')}"
        return None

    @classmethod
    def create(
        cls, model: PreTrainedModel, slots: int, cache_tokens: int | None = None, threads: int | None = None
    ) -> Self:
        """The step for a model. Raises PipelineError if its results differ from the reference's on this machine."""
        try:
            step = cls(model, slots, cache_tokens)
            check(step, model, min(slots, step._cache.pages))
        except PipelineError:
            raise
        except Exception as error:
            # Compilers and drivers fail in many ways.
            raise PipelineError(f"the step {cls.name!r} cannot start on this machine: {one_line(error)}") from error
        return step

    def renewed(self) -> Self:
        """The same weights with an empty cache and new graphs."""
        other = copy.copy(self)
        other._start()
        return other

    def cache_bytes(self, held_tokens: int) -> int:
        """Pages in use; slots with a common prefix share them."""
        return self._cache.used_pages * PAGE * self.bytes_per_token

    @torch.inference_mode()
    def adjust(self, slot: int, adjustment: Adjustment) -> bool:
        """Take a text's penalties and biases to the device, unless the biases are too many."""
        self._ahead.pop(slot, None)
        return self._passes.adjustments.set(slot, adjustment)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Share the first `length` tokens of a slot with another."""
        self._ahead.pop(target, None)
        self._cache.share(source, target, length)

    def clear(self, slot: int) -> None:
        """Empty a slot. Attention never reads positions that a text has not written, so nothing is zeroed."""
        self.truncate(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Free the pages after position `length`, and drop what was computed ahead."""
        self._ahead.pop(slot, None)
        self._cache.truncate(slot, length)

    @torch.inference_mode()
    def compute(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """As `Step.compute`; segments whose logits or hidden states are all wanted take passes of their own."""
        launched = self._computed_ahead(segments)
        outputs = {i: self._whole(s) for i, s in enumerate(segments) if s.logits in ("all", "hidden")}
        rest = {i: s for i, s in enumerate(segments) if i not in launched and i not in outputs}
        logits = self._launch(rest, launched)
        # While each step has prompts, or texts with masks, all are cheaper in one pass than the next tokens in another.
        has_others = any(len(segment.ids) > 1 or segment.following is None for segment in rest.values())
        following = {} if has_others and self._had_others else self._following(segments, launched)
        self._had_others = has_others
        ahead = self._launch_ahead(following) if following else None
        for i, segment in enumerate(segments):
            tokens: tuple[int | None, ...] = ()
            if i in launched:
                token = launched[i].tokens()[segment.slot]
                tokens = (token if token >= 0 else None,)
                if ahead is not None and i in following:
                    start, draws = segment.start + len(segment.ids), segment.following or ()
                    self._ahead[segment.slot] = _Ahead(ahead, start, token, draws, segment.is_adjusted)
            outputs.setdefault(i, SegmentOutput(logits.get(i, self._no_logits), tokens))
        return [outputs[i] for i in range(len(segments))]

    def _computed_ahead(self, segments: Sequence[Segment]) -> dict[int, Pass]:
        """The passes that have computed segments ahead, by the segments' numbers; drops what else is no longer of use.

        A result stays for a text that the step does not have, unless it took a page: the text may have ended.
        """
        found = {}
        for number, segment in enumerate(segments):
            ahead = self._ahead.get(segment.slot)
            if ahead is not None and ahead.computes(segment):
                found[number] = ahead.launched
                del self._ahead[segment.slot]
        asked = {segment.slot for segment in segments}
        for slot, ahead in list(self._ahead.items()):
            if slot in asked or ahead.start % PAGE == 0:
                self.truncate(slot, ahead.start)
        return found

    def _launch(self, segments: Mapping[int, Segment], launched: dict[int, Pass]) -> dict[int, Tensor]:
        """Launch segments, by their numbers, in as many passes as their tokens take: the logits of those that want
        them. launched: gets the pass of each segment that gets a token.
        """
        rows: list[Row] = []
        wanted: dict[int, Wanted] = {}
        logits: dict[int, Tensor] = {}

        def launch() -> None:
            launched.update(dict.fromkeys(wanted, self._passes.launch(rows, [*wanted.values()])))
            numbers = {i: number for number, i in enumerate(wanted) if segments[i].logits == "last"}
            if numbers:
                logits.update(zip(numbers, self._passes.logits([*numbers.values()]).split(1), strict=True))
            rows.clear()
            wanted.clear()

        for i, segment in segments.items():
            self._cache.hold(segment.slot, segment.start, segment.start + len(segment.ids))
            last = len(segment.ids) - 1
            for offset, token in enumerate(segment.ids.tolist()):
                rows.append(Row(segment.slot, segment.start + offset, token))
                if offset == last and segment.logits != "none":
                    draw = segment.draws[0] if segment.draws else None
                    wanted[i] = Wanted(len(rows) - 1, draw, segment.is_adjusted, segment.allowed_V)
                if len(rows) == MAX_ROWS or len(wanted) == self._passes.most_wanted:
                    launch()
        if rows:
            launch()
        return logits

    def _following(self, segments: Sequence[Segment], launched: Mapping[int, Pass]) -> dict[int, Segment]:
        """The segments whose next tokens one pass can compute ahead, by their numbers; each gets a place for it."""
        found: dict[int, Segment] = {}
        for i in launched:
            position = segments[i].start + len(segments[i].ids)
            if segments[i].following is not None and len(found) < self._passes.most_wanted:
                with suppress(PipelineError):  # without a free page it is computed with the next step
                    self._cache.hold(segments[i].slot, position, position + 1)
                    found[i] = segments[i]
        return found

    def _launch_ahead(self, segments: Mapping[int, Segment]) -> Pass:
        """Start the tokens after those that the segments choose."""
        rows, wanted = [], []
        for row, segment in enumerate(segments.values()):
            rows.append(Row(segment.slot, segment.start + len(segment.ids), -1))
            wanted.append(Wanted(row, segment.following[0] if segment.following else None, segment.is_adjusted))
        return self._passes.launch(rows, wanted)

    def _whole(self, segment: Segment) -> SegmentOutput:
        """The logits or hidden states of all tokens of a segment."""
        rows = [Row(segment.slot, segment.start + i, token) for i, token in enumerate(segment.ids.tolist())]
        self._cache.hold(segment.slot, segment.start, segment.start + len(rows))
        parts = [self._passes.hidden_states(rows[i : i + MAX_ROWS]) for i in range(0, len(rows), MAX_ROWS)]
        if segment.logits == "hidden":
            return SegmentOutput(self._no_logits, hidden_RD=torch.cat(parts).float())
        logits_RV = torch.cat([self._decoder.head(part_RD).float() for part_RD in parts])
        draws = [segment.draws[0] if segment.draws else (0.0,) * len(Draw._fields)]
        draw = to_device(draws, torch.float32, logits_RV.device)
        token = int(self._decoder.choose(logits_RV[-1:], draw))
        return SegmentOutput(logits_RV, (token if token >= 0 else None,))
