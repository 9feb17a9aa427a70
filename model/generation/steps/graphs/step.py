"""The step in CUDA graphs, for NVIDIA GPUs: one launch for a pass of all texts, ahead of the host.

Before the host reads the tokens of a call it launches the next ones, whose rows take their tokens on the device. What
the scheduler asks for next is then there already, or launched. What it never asks for is dropped: what its row wrote
lies behind the end of its text. While the device waits for the host, calls have several tokens of each text.
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
from model.generation.steps.graphs.passes import MAX_ROWS, MOST_CHAINED, Pass, Passes, Row, Wanted
from model.generation.steps.graphs.self_check import check
from model.generation.steps.step import Segment, SegmentOutput, Step
from model.weights.int8 import precision_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORTENED_AFTER = 64
"""Calls in a row for which the device did not wait, until fewer tokens of each text are computed in one."""


class _Ahead:
    """Tokens of a text that have been launched in advance. start, id: the token that the first of them follows."""

    def __init__(self, start: int, *, is_adjusted: bool) -> None:
        self.start, self.id, self._is_adjusted = start, -1, is_adjusted
        self._tokens: list[tuple[Pass, Draw | None]] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, launched: Pass, draw: Draw | None) -> None:
        """One more token."""
        self._tokens.append((launched, draw))

    def take(self, segment: Segment) -> list[Pass]:
        """The passes of a segment's tokens, as far as they are just what it asks for; the `id` is then unknown."""
        asked = segment.start, int(segment.ids[0]), segment.is_adjusted
        if segment.logits != "token" or segment.allowed_V is not None or len(segment.ids) > 1:
            return []
        if asked != (self.start, self.id, self._is_adjusted):
            return []
        taken = []
        for draw, (launched, how) in zip(segment.draws or [None] * segment.steps, self._tokens, strict=False):
            if draw != how:
                break
            taken.append(launched)
        del self._tokens[: len(taken)]
        self.start, self.id = self.start + len(taken), -1
        return taken

    @property
    def takes_a_page(self) -> bool:
        """Whether one of the tokens is the first of a page."""
        return -self.start % PAGE < len(self._tokens)


class _Further(NamedTuple):
    """Tokens to launch after one that a launched pass chooses. position: of that one. draws: how each is chosen.
    of_call, ahead: what takes the pass of each, the first `own` of them and the rest.
    """

    slot: int
    position: int
    draws: Sequence[Draw | None]
    is_adjusted: bool
    own: int
    of_call: list[Pass]
    ahead: _Ahead | None


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
        self._most_chained, self._busy_calls = 1, 0

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

    def chained(self, most: int, left: Sequence[int]) -> Sequence[int]:
        """More than one while the device waits for the host."""
        most = min(most, self._most_chained)
        return [min(most, count) for count in left]

    @torch.inference_mode()
    def compute(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """As `Step.compute`; segments whose logits or hidden states are all wanted take passes of their own."""
        was_waiting = self._passes.are_done
        launched = self._computed_ahead(segments)
        if len(launched) == len(segments):
            self._note(was_waiting)
        outputs = {i: self._whole(s) for i, s in enumerate(segments) if s.logits in ("all", "hidden")}
        rest = {i: s for i, s in enumerate(segments) if i not in launched and i not in outputs}
        logits = self._launch(rest, launched)
        # While each step has prompts, or texts with masks, all are cheaper in one pass than the next tokens in another.
        has_others = any(len(segment.ids) > 1 or not segment.following for segment in rest.values())
        self._launch_further(segments, launched, is_ahead=not (has_others and self._had_others))
        self._had_others = has_others
        for i, segment in enumerate(segments):
            tokens = [one.tokens()[segment.slot] for one in launched.get(i, ())]
            if tokens and (ahead := self._ahead.get(segment.slot)):
                ahead.id = tokens[-1]
            chosen = tuple([token if token >= 0 else None for token in tokens])
            outputs.setdefault(i, SegmentOutput(logits.get(i, self._no_logits), chosen))
        return [outputs[i] for i in range(len(segments))]

    def _note(self, was_waiting: bool) -> None:
        """Count a call with tokens alone: whether the device waited for it."""
        self._busy_calls = 0 if was_waiting else self._busy_calls + 1
        if was_waiting:
            self._most_chained = min(self._most_chained + 1, MOST_CHAINED)
        elif self._busy_calls % SHORTENED_AFTER == 0:
            self._most_chained = max(self._most_chained - 1, 1)

    def _computed_ahead(self, segments: Sequence[Segment]) -> dict[int, list[Pass]]:
        """The passes that have computed segments ahead, by the segments' numbers; drops what else is no longer of use.

        What was computed stays for a text that the step does not have, unless it took a page: the text may have ended.
        """
        found, asked = {}, set()
        for number, segment in enumerate(segments):
            asked.add(segment.slot)
            if ahead := self._ahead.get(segment.slot):
                passes = ahead.take(segment)
                if passes:
                    found[number] = passes
                if not ahead:
                    del self._ahead[segment.slot]
                elif len(passes) < segment.steps:
                    self.truncate(segment.slot, ahead.start)
        for slot in self._ahead.keys() - asked:
            if (ahead := self._ahead[slot]).takes_a_page:
                self.truncate(slot, ahead.start)
        return found

    def _launch(self, segments: Mapping[int, Segment], launched: dict[int, list[Pass]]) -> dict[int, Tensor]:
        """Launch segments, by their numbers, in as many passes as their tokens take: the logits of those that want
        them. launched: gets the pass of each segment that gets a token.
        """
        rows: list[Row] = []
        wanted: dict[int, Wanted] = {}
        logits: dict[int, Tensor] = {}

        def launch() -> None:
            one = self._passes.launch(rows, [*wanted.values()])
            launched.update((i, [one]) for i in wanted)
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

    def _launch_further(
        self, segments: Sequence[Segment], launched: Mapping[int, list[Pass]], *, is_ahead: bool
    ) -> None:
        """Launch the tokens after those that passes choose: the rest of each segment's `steps`, then, if is_ahead,
        those that follow it and are not on their way yet.
        """
        waiting = [self._further(segments[i], passes, is_ahead=is_ahead) for i, passes in launched.items()]
        for number in range(max((len(text.draws) for text in waiting), default=0)):
            waiting = [text for text in waiting if number < len(text.draws)]
            for first in range(0, len(waiting), self._passes.most_wanted):
                texts = waiting[first : first + self._passes.most_wanted]
                one = self._passes.launch(
                    [Row(text.slot, text.position + number, -1) for text in texts],
                    [Wanted(row, text.draws[number], text.is_adjusted) for row, text in enumerate(texts)],
                )
                for text in texts:
                    if number < text.own:
                        text.of_call.append(one)
                    elif text.ahead is not None:
                        text.ahead.append(one, text.draws[number])

    def _further(self, segment: Segment, passes: list[Pass], *, is_ahead: bool) -> _Further:
        """The further tokens of a segment, each of which gets a place in the cache."""
        slot, ahead = segment.slot, self._ahead.get(segment.slot) or None
        own, known = segment.steps - len(passes), len(ahead) if ahead else 0
        position = segment.start + len(segment.ids) - 1 + len(passes) + known
        draws: Sequence[Draw | None] = (segment.draws or (None,) * segment.steps)[len(passes) :] if own else ()
        if draws:
            self._cache.hold(slot, position, position + len(draws))
        following = segment.following[known:] if is_ahead else ()
        if following:
            with suppress(PipelineError):  # without free pages they are computed with the next steps
                self._cache.hold(slot, position + len(draws), position + len(draws) + len(following))
                draws = (*draws, *following)
                if ahead is None:
                    ahead = _Ahead(position + own, is_adjusted=segment.is_adjusted)
                    self._ahead[slot] = ahead
        return _Further(slot, position, draws, segment.is_adjusted, own, passes, ahead)

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
