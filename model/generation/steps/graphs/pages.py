"""The paged KV cache of the graphs step: memory for the tokens that slots hold, at fixed addresses.

Each slot has a row of the page table, which kernels read on the device. Slots with a common prefix share its pages; a
slot that writes to a shared page gets a copy of it first.

Shapes: N rows of a pass, P pages, G key/value heads, K head dimension.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.errors import PipelineError

PAGE = 64
"""Tokens of a page, which attention reads at once."""


def to_device(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on a device, for which the host need not wait until the device has computed what was launched."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Places(NamedTuple):
    """Where a layer's keys and values are, (P, G, PAGE, K), and where those of rows belong among them.

    table: pages of each slot. slot_N, position_N: of each row, int32.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    slot_N: Tensor
    position_N: Tensor


class PagedCache:
    """Keys and values of `slots` sequences of up to `context_length` tokens, `tokens` of them together.

    One more slot takes what rows without a text write. Raises PipelineError if the device's memory does not hold it.
    """

    def __init__(
        self,
        layers: int,
        groups: int,
        head_dim: int,
        *,
        slots: int,
        context_length: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spare_slot, self.context_length = slots, context_length
        width = -(-context_length // PAGE)
        pages = slots * width if tokens >= slots * context_length else max(width, tokens // PAGE)
        shape = (layers, 2, pages + 1, groups, PAGE, head_dim)
        try:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
            """Keys and values of each layer, (layers, 2, P, G, PAGE, K)."""
        except torch.OutOfMemoryError:
            size = 2 * layers * (pages + 1) * groups * PAGE * head_dim * dtype.itemsize
            raise PipelineError(
                f"keys and values of {pages * PAGE:,} tokens take {size >> 20:,} MiB, more than {device} has free: "
                "lower max_batch_size or kv_cache_mib"
            ) from None
        self._pages = np.full((slots + 1, width), pages, dtype=np.int32)
        self._held = [0] * (slots + 1)
        """Pages of each slot."""
        self._users = np.zeros(pages + 1, dtype=np.int32)
        """Slots that hold each page."""
        self._free = list(range(pages))[::-1]
        self.table = torch.from_numpy(self._pages).to(device, copy=True)
        """Pages of each slot, int32, (slots + 1, pages of a context)."""
        self._is_changed = False

    @property
    def pages(self) -> int:
        """Pages of all slots together."""
        return len(self._users) - 1

    @property
    def used_pages(self) -> int:
        """Pages that slots hold."""
        return self.pages - len(self._free)

    def hold(self, slot: int, start: int, end: int) -> None:
        """Give a slot pages of its own for positions `start` to `end`. Raises PipelineError if none is left."""
        for number in range(start // PAGE, (end - 1) // PAGE + 1):
            if number >= self._held[slot]:
                self._set(slot, number, self._take())
                self._held[slot] = number + 1
            elif self._users[page := int(self._pages[slot, number])] > 1:
                copied = self._take()
                self.data[:, :, copied] = self.data[:, :, page]
                self._users[page] -= 1
                self._set(slot, number, copied)

    def share(self, source: int, target: int, length: int) -> None:
        """Give a slot the first `length` tokens of another; takes no page, as nothing is copied before one writes."""
        self.truncate(target, 0)
        self._held[target] = -(-length // PAGE)
        for number in range(self._held[target]):
            page = int(self._pages[source, number])
            self._users[page] += 1
            self._set(target, number, page)

    def truncate(self, slot: int, length: int) -> None:
        """Free the pages from position `length` on."""
        kept = -(-length // PAGE)
        for number in range(kept, self._held[slot]):
            page = int(self._pages[slot, number])
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        self._held[slot] = min(self._held[slot], kept)

    def upload(self, staging: Tensor) -> None:
        """Bring the table on the device up to date, after all that has been launched. staging: the table's shape, on
        the host; it stays as it is until the device has read it.
        """
        if self._is_changed:
            staging.numpy()[:] = self._pages
            self.table.copy_(staging, non_blocking=True)
            self._is_changed = False

    def _take(self) -> int:
        if not self._free:
            raise PipelineError(f"the KV cache has no free page: all {self.pages:,} are in use")
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _set(self, slot: int, number: int, page: int) -> None:
        self._pages[slot, number] = page
        self._is_changed = True
