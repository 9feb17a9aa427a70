"""Launches passes of the decoder: fixed buffers for each size of a pass and, on a GPU, its CUDA graph.

A pass is one copy of its inputs to the device, one launch and one copy of the chosen tokens back, so that the next one
may be launched before the host has read the tokens: its rows take those of their slots on the device.

Shapes: N rows, R rows of logits, S slots and the spare one, V vocabulary.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.generation.steps.draw import Draw
from model.generation.steps.graphs.adjustments import Adjustments, packed, words
from model.generation.steps.graphs.decoder import Decoder, Rows
from model.generation.steps.graphs.pages import PagedCache, to_device

MAX_ROWS = 256
"""Rows of the largest pass: more take several."""
MOST_CHAINED = 4
"""Passes of one call, one after the other; as many are launched in advance."""
_IN_FLIGHT = 2 * MOST_CHAINED + 1
_DRAW = len(Draw._fields)
_MOST_LIKELY = (0.0,) * _DRAW
_RECORDING = threading.Lock()
"""PyTorch records one graph at a time, and a challenger may be loaded while a champion is."""


class Row(NamedTuple):
    """One token of a slot. id: -1 for the token that the latest pass chose for the slot."""

    slot: int
    position: int
    id: int


class Wanted(NamedTuple):
    """A row whose next token is chosen, by a draw or as the most likely one; the rest as of a `Segment`."""

    row: int
    draw: Draw | None = None
    is_adjusted: bool = False
    allowed_V: np.ndarray | None = None


class Pass:
    """A launched pass."""

    def __init__(self, staging: "_Staging") -> None:
        self._staging = staging
        self._tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        """The token last chosen for each slot, after the end of the pass; -1 if its highest logit was not finite."""
        if self._tokens is None:
            self._staging.wait()
            self._tokens = self._staging.chosen_S.tolist()
        return self._tokens


class _Staging:
    """The host's memory for the inputs and results of a pass on their way to the device and back."""

    def __init__(self, sizes: tuple[int, int], cache: PagedCache, vocab_size: int) -> None:
        on_gpu = cache.data.is_cuda
        rows, wanted = sizes
        self.table = torch.zeros(cache.table.shape, dtype=torch.int32, pin_memory=on_gpu)
        """Takes the page table on its way to the device, so that the host need not wait for the passes before."""
        self.chosen_S = torch.zeros(cache.spare_slot + 1, dtype=torch.int32, pin_memory=on_gpu)
        self._ints = torch.zeros(_length(rows, wanted), dtype=torch.int32, pin_memory=on_gpu)
        self._allowed = torch.zeros(wanted, words(vocab_size), dtype=torch.int32, pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None
        self._latest: Pass | None = None

    def launched(self) -> Pass:
        """The pass that this is now for; its results come here."""
        self._latest = Pass(self)
        return self._latest

    def fill(
        self,
        sizes: tuple[int, int],
        rows: Sequence[Row],
        wanted: Sequence[Wanted],
        spare: int,
    ) -> Tensor:
        """The inputs of a pass, int32, on the host. spare: slot of the rows that only fill it up."""
        if self._latest is not None:
            self._latest.tokens()  # before others overwrite them
        size, size_wanted = sizes
        ints = self._ints[: _length(*sizes)]
        table = ints.numpy()
        columns = table[: 3 * size].reshape(3, size)
        columns[:, len(rows) :] = np.array([[0], [spare], [0]])
        if rows:
            slots, positions, ids = zip(*rows, strict=True)
            columns[:, : len(rows)] = ids, slots, positions
        count, columns = len(wanted), table[3 * size : 3 * (size + size_wanted)].reshape(3, size_wanted)
        columns[:, count:] = np.array([[0], [spare], [0]])
        numbers = table[3 * (size + size_wanted) :].view(np.float32).reshape(size_wanted, _DRAW)
        numbers[count:] = 0.0
        if wanted:
            changes = [one.is_adjusted + 2 * (one.allowed_V is not None) for one in wanted]
            columns[:, :count] = [one.row for one in wanted], [rows[one.row].slot for one in wanted], changes
            numbers[:count] = [one.draw or _MOST_LIKELY for one in wanted]
        for index, one in enumerate(wanted):
            if one.allowed_V is not None:
                self._allowed.numpy()[index] = packed(one.allowed_V)
        return ints

    def copy_allowed(self, target_RW: Tensor, wanted: Sequence[Wanted]) -> None:
        """Copy the masks of allowed tokens to the device, if there are any."""
        rows = max((index + 1 for index, row in enumerate(wanted) if row.allowed_V is not None), default=0)
        if rows:
            target_RW[:rows].copy_(self._allowed[:rows], non_blocking=True)

    def copy_tokens(self, chosen_S: Tensor) -> None:
        """Copy the tokens to the host when the pass ends."""
        self.chosen_S.copy_(chosen_S, non_blocking=True)
        if self._event is not None:
            self._event.record()

    @property
    def is_done(self) -> bool:
        """Whether the pass has ended."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait for the end of the pass; other threads of the process run meanwhile."""
        if self._event is not None:
            self._event.synchronize()


def _length(rows: int, wanted: int) -> int:
    return 3 * rows + wanted * (3 + _DRAW)


class Passes:
    """Passes of up to MAX_ROWS rows over a decoder, `_IN_FLIGHT` at most before the host waits for one."""

    def __init__(self, decoder: Decoder, cache: PagedCache, vocab_size: int) -> None:
        self._decoder, self._cache, self._device = decoder, cache, cache.data.device
        self._most_wanted = min(MAX_ROWS, _power_of_2(cache.spare_slot))
        largest = self.sizes(MAX_ROWS)
        self._staging = [_Staging(largest, cache, vocab_size) for _ in range(_IN_FLIGHT)]
        self._turn = 0
        self._ints = torch.zeros(_length(*largest), dtype=torch.int32, device=self._device)
        self._chosen_S = torch.zeros(cache.spare_slot + 1, dtype=torch.int32, device=self._device)
        self._logits = torch.zeros(self._most_wanted, vocab_size, device=self._device)
        self.adjustments = Adjustments(
            cache.spare_slot, cache.context_length, self._most_wanted, vocab_size, self._device
        )
        self._launches: dict[int, Callable[[], None]] = {}
        if self._device.type == "cuda":
            self._record()

    @property
    def are_done(self) -> bool:
        """Whether the device has ended all that was launched, so that it waits for the host."""
        return self._staging[self._turn - 1].is_done

    @property
    def most_wanted(self) -> int:
        """Most rows of a pass whose next token is chosen."""
        return self._most_wanted

    def sizes(self, rows: int) -> tuple[int, int]:
        """Rows, and rows of logits, of the smallest pass that takes `rows`."""
        size = min(MAX_ROWS, _power_of_2(rows))
        return size, min(size, self._most_wanted)

    def launch(self, rows: Sequence[Row], wanted: Sequence[Wanted]) -> Pass:
        """Start a pass."""
        sizes = self.sizes(len(rows))
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % _IN_FLIGHT
        ints = staging.fill(sizes, rows, wanted, self._cache.spare_slot)
        self._ints[: len(ints)].copy_(ints, non_blocking=True)
        staging.copy_allowed(self.adjustments.tables.allowed_RW, wanted)
        self._cache.upload(staging.table)
        self.replay(len(rows))
        staging.copy_tokens(self._chosen_S)
        return staging.launched()

    def replay(self, rows: int) -> None:
        """Start the pass for this many rows on the inputs that the device has."""
        sizes = self.sizes(rows)
        if sizes[0] in self._launches:
            self._launches[sizes[0]]()
        else:
            self._compute(sizes)

    def logits(self, indices: Sequence[int]) -> Tensor:
        """A copy of the logits of some wanted rows of the latest pass, by their number among them."""
        return self._logits[to_device(indices, torch.int32, self._device)]

    def hidden_states(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of up to MAX_ROWS rows, without a graph."""
        # Kernels are compiled for few sizes, and for rows whose columns are aligned.
        size = max(4, self.sizes(len(rows))[0])
        filled = [*rows, *[Row(self._cache.spare_slot, 0, 0)] * (size - len(rows))]
        slot_N, position_N, id_N = to_device(filled, torch.int32, self._device).T.contiguous()
        every = torch.arange(size, device=self._device)
        on_gpu = self._device.type == "cuda"
        self._cache.upload(torch.empty_like(self._cache.table, device="cpu", pin_memory=on_gpu))
        wanted = Rows(id_N, slot_N, position_N, every, every, every, torch.empty(0))
        return self._decoder.hidden_states(wanted, self._cache)[: len(rows)]

    def _compute(self, sizes: tuple[int, int]) -> None:
        size, wanted = sizes
        table = self._ints[: _length(*sizes)]
        id_N, slot_N, position_N = table[: 3 * size].view(3, size)
        wanted_R, target_R, changes_R = table[3 * size : 3 * (size + wanted)].view(3, wanted)
        draws_R5 = table[3 * (size + wanted) :].view(torch.float32).view(wanted, _DRAW)
        rows = Rows(id_N, slot_N, position_N, wanted_R, target_R, changes_R, draws_R5).known(self._chosen_S)
        hidden_RD = self._decoder.hidden_states(rows, self._cache)
        logits_RV = self._logits[:wanted].copy_(self._decoder.head(hidden_RD))
        self._decoder.adjust(logits_RV, rows, self.adjustments.tables)
        self._chosen_S[target_R] = self._decoder.choose(logits_RV, draws_R5)

    def _record(self) -> None:
        """Record the CUDA graph of each size, the largest first: the others share its memory.

        On a stream of its own: cuBLAS has a workspace for each stream, and it is freed with any graph recorded there.
        An engine that is replaced would take the memory of the one that serves. That one goes on meanwhile, so only
        calls of this thread belong to the recording.
        """
        pool = torch.cuda.graph_pool_handle()
        self._stream, serving = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        size = MAX_ROWS
        while size:
            sizes = self.sizes(size)
            # Rows that only fill a pass up: they write to the spare slot.
            self._ints[: _length(*sizes)].copy_(self._staging[0].fill(sizes, [], [], self._cache.spare_slot))
            self._compute(sizes)  # compiles the kernels, which a recording cannot
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            try:
                with (
                    _RECORDING,
                    torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
                ):
                    self._compute(sizes)
            finally:
                torch.cuda.set_stream(serving)  # a recording that fails leaves its own
            self._launches[size] = graph.replay
            size //= 2


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
