"""glibc's allocator, configured to keep the memory that a decoding or training step frees for the next step.

By default glibc returns large blocks to the system, and each step faults their pages in again: 200,000 page faults and
a tenth of the time for sixteen prompts of 512 tokens (`bench/LOG.md`).
"""

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAX_BLOCK_BYTES = 32 << 20  # glibc takes no higher limit
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let this process keep blocks of up to 32 MiB that it frees. Its memory stays at its peak until `trim`."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def trim() -> None:
    """Give freed memory back to the system now."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
