"""Locks of a folder of artifacts: one publication at a time, and no removal of a version that a process reads.

All are `flock`s, which the kernel releases when their process ends. On a file system without locks, versions are read
and removed without this protection.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import TransientError
from model.system.processes import stopped_holder

if TYPE_CHECKING:
    from filelock import BaseFileLock

POLL_EVERY_S = 3.0
"""How often a process that waits for a lock checks whether its holder is stopped."""
WAIT_S = 600.0
"""Longest wait for another process, which verifies and copies one artifact."""
_held: dict[Path, int] = {}
"""Descriptor of each version's folder that this process reads."""


def acquire(lock: "BaseFileLock", wait_s: float = WAIT_S) -> None:
    """Wait for a lock. Raises filelock's Timeout after `wait_s`, TransientError if the holder is stopped."""
    from filelock import Timeout

    end = time.monotonic() + wait_s
    while True:
        left_s = end - time.monotonic()
        try:
            lock.acquire(timeout=max(min(POLL_EVERY_S, left_s), 0.0))
        except Timeout:
            if said := stopped_holder(Path(lock.lock_file)):
                raise TransientError(f"{said}; then run again") from None
            if left_s <= POLL_EVERY_S:
                raise
        else:
            return


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is never deleted: a process waiting on a deleted file would not exclude others.

    Raises TransientError, one line, if another process holds it for WAIT_S.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        acquire(lock, WAIT_S)
    except Timeout:
        raise TransientError(
            f"another process has held {path} for {WAIT_S:.0f} s: expected it to publish, fetch or package one "
            "artifact; end it and run again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def hold(directory: Path) -> None:
    """Keep `directory` from being removed while this process lives. Raises FileNotFoundError if it is gone."""
    if directory in _held:
        if os.fstat(_held[directory]).st_ino == directory.stat().st_ino:
            return
        os.close(_held.pop(directory))  # that version was damaged and has been replaced
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileNotFoundError(f"{directory} is being removed") from None
    except OSError:
        os.close(descriptor)  # a file system without locks
        return
    _held[directory] = descriptor


@contextmanager
def unread(directory: Path) -> Iterator[bool]:
    """Whether no process reads `directory`; inside the context no process can start to."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _is_unread(descriptor)
    finally:
        os.close(descriptor)


def _is_unread(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
