"""glibc's allocator, configured to keep the memory that a decoding or training step frees for the next step.

By default glibc returns large blocks to the system, and each step faults their pages in again: 200,000 page faults and
a tenth of the time for sixteen prompts of 512 tokens (`bench/LOG.md`).
"""

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST_BLOCK = 32 << 20  # glibc takes no higher limit
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let this process keep blocks of up to 32 MiB that it frees. Its memory stays at its peak until `trim`."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def share_arenas(most: int = 2) -> None:
    """Let the threads of this process share `most` pools of freed memory; to be called before it starts many.

    By default glibc gives each thread a pool of its own, up to eight for each core, and each keeps what the largest
    piece of work of its threads took.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, most)


def trim() -> None:
    """Give freed memory back to the system now."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
