"""The step in CUDA graphs, for NVIDIA GPUs: one launch for a whole step, one step ahead of the host.

While the host reads the tokens of a step of single tokens, the device computes the next one, whose rows take their
tokens on the device. If that is what the scheduler asks for next, its results are there; else it is dropped: what it
wrote lies behind the end of every text.
"""

import copy
import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from model.errors import PipelineError, one_line
from model.generation.steps.cache import bytes_per_token
from model.generation.steps.draw import Adjustment, Draw
from model.generation.steps.graphs.decoder import Decoder
from model.generation.steps.graphs.pages import PAGE, PagedCache
from model.generation.steps.graphs.passes import MAX_ROWS, Pass, Passes, Row, Wanted
from model.generation.steps.graphs.self_check import check
from model.generation.steps.step import Segment, SegmentOutput, Step
from model.weights.int8 import precision_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Expected(NamedTuple):
    """A row of the step ahead, and the segment that it computes."""

    number: int
    start: int
    id: int
    draws: tuple[Draw, ...]
    is_adjusted: bool


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
        self._ahead: dict[int, _Expected] = {}
        """By slot."""
        self._ahead_pass: Pass | None = None

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
        numbers = self._computed_ahead(segments)
        self._free_ahead(kept={segment.slot for segment in segments} if numbers is not None else set())
        if numbers is not None and self._ahead_pass is not None:
            return self._read(segments, self._ahead_pass, numbers)
        outputs = {i: self._whole(s) for i, s in enumerate(segments) if s.logits in ("all", "hidden")}
        return self._launch(segments, outputs)

    def _computed_ahead(self, segments: Sequence[Segment]) -> list[int] | None:
        """The rows of the step ahead that compute the segments; None if one is missing."""
        numbers = []
        for segment in segments:
            expected = self._ahead.get(segment.slot)
            if expected is None or segment.logits != "token" or len(segment.ids) > 1 or segment.allowed_V is not None:
                return None
            if (segment.start, int(segment.ids[0]), segment.draws, segment.is_adjusted) != expected[1:]:
                return None
            numbers.append(expected.number)
        return numbers

    def _free_ahead(self, kept: set[int]) -> None:
        """Free the pages that the step ahead has taken for texts that have ended or go on otherwise."""
        for slot, expected in self._ahead.items():
            if slot not in kept:
                self._cache.truncate(slot, expected.start)
        self._ahead = {}

    def _launch(self, segments: Sequence[Segment], outputs: dict[int, SegmentOutput]) -> list[SegmentOutput]:
        """Compute the segments that are not in `outputs`, in as many passes as their tokens take."""
        is_decode = not outputs and len(segments) <= self._passes.most_wanted
        # A mask of allowed tokens follows from the token before: such a step is not computed ahead.
        is_decode = is_decode and all(s.logits == "token" and len(s.ids) == 1 and s.allowed_V is None for s in segments)
        rows: list[Row] = []
        wanted: dict[int, int] = {}
        """Row, by segment."""

        def run() -> None:
            chosen = [segments[i] for i in wanted]
            ends = [
                Wanted(row, segment.draws[0] if segment.draws else None, segment.is_adjusted, segment.allowed_V)
                for segment, row in zip(chosen, wanted.values(), strict=True)
            ]
            launched = self._passes.launch(rows, ends)
            results = self._read(chosen, launched, list(range(len(chosen))), runs_ahead=is_decode)
            outputs.update(zip(wanted, results, strict=True))
            rows.clear()
            wanted.clear()

        for i, segment in enumerate(segments):
            if i in outputs:
                continue
            outputs[i] = SegmentOutput(self._no_logits)
            self._cache.hold(segment.slot, segment.start, segment.start + len(segment.ids))
            last = len(segment.ids) - 1
            for offset, token in enumerate(segment.ids.tolist()):
                rows.append(Row(segment.slot, segment.start + offset, token))
                if offset == last and segment.logits != "none":
                    wanted[i] = len(rows) - 1
                if len(rows) == MAX_ROWS or len(wanted) == self._passes.most_wanted:
                    run()
        if rows:
            run()
        return [outputs[i] for i in range(len(segments))]

    def _read(
        self, segments: Sequence[Segment], launched: Pass, numbers: Sequence[int], *, runs_ahead: bool = True
    ) -> list[SegmentOutput]:
        """Results of a launched pass, after the launch of the next one. numbers: of the segments' rows of logits."""
        if not segments:
            return []  # nothing to wait for
        with_logits = [number for segment, number in zip(segments, numbers, strict=True) if segment.logits == "last"]
        logits_RV = iter(self._passes.logits(with_logits).split(1) if with_logits else ())
        texts = list(zip(segments, numbers, strict=True))
        ahead = [(segment, number) for segment, number in texts if runs_ahead and segment.following is not None]
        self._ahead_pass = self._launch_ahead(ahead) if ahead else None
        tokens = launched.tokens()
        for row, (segment, number) in enumerate(ahead):
            following, is_adjusted = segment.following or (), segment.is_adjusted
            expected = _Expected(row, segment.start + 1, tokens[number], following, is_adjusted)
            self._ahead[segment.slot] = expected
        outputs = []
        for segment, number in texts:
            rows_RV = next(logits_RV) if segment.logits == "last" else self._no_logits
            outputs.append(SegmentOutput(rows_RV, (tokens[number] if tokens[number] >= 0 else None,)))
        return outputs

    def _launch_ahead(self, texts: Sequence[tuple[Segment, int]]) -> Pass:
        """Start the step after the one just launched. texts: their segments and rows in that one."""
        for segment, _ in texts:
            self._cache.hold(segment.slot, segment.start + 1, segment.start + 2)
        rows = [Row(segment.slot, segment.start + 1, 0, number) for segment, number in texts]
        wanted = [
            Wanted(row, segment.following[0] if segment.following else None, segment.is_adjusted)
            for row, (segment, _) in enumerate(texts)
        ]
        return self._passes.launch(rows, wanted)

    def _whole(self, segment: Segment) -> SegmentOutput:
        """The logits or hidden states of all tokens of a segment."""
        rows = [Row(segment.slot, segment.start + i, token) for i, token in enumerate(segment.ids.tolist())]
        self._cache.hold(segment.slot, segment.start, segment.start + len(rows))
        parts = [self._passes.hidden_states(rows[i : i + MAX_ROWS]) for i in range(0, len(rows), MAX_ROWS)]
        if segment.logits == "hidden":
            return SegmentOutput(self._no_logits, hidden_RD=torch.cat(parts).float())
        logits_RV = torch.cat([self._decoder.head(part_RD).float() for part_RD in parts])
        draw = torch.tensor(
            [segment.draws[0] if segment.draws else (0.0,) * len(Draw._fields)], device=logits_RV.device
        )
        token = int(self._decoder.choose(logits_RV[-1:], draw))
        return SegmentOutput(logits_RV, (token if token >= 0 else None,))
