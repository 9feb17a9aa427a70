"""Processes that end with the one that started them, however that ends: a pipe to their standard input closes with it.

A kernel's death signal (`ending_with_parent`) would leave no time to save. `Presence` tells when all are gone.
"""

import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

GRACE_S = 60.0
"""Time to save for a process that has to end, before it is killed."""
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


def signal_at_parents_end(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when the thread that started it ends, however it does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def interrupt(number: signal.Signals) -> None:
    """Send this process a signal from one of its threads: to the main thread, as only that one runs Python's handlers.

    The kernel may otherwise choose another thread, and a system call of the main thread would go on.
    """
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def end_with_input(*, after_parent: bool = False) -> None:
    """Watch standard input, an empty pipe, in a thread: at its end this process gets SIGTERM, GRACE_S later SIGKILL.

    after_parent: SIGTERM only once the parent is gone too, for a child that gets it from its parent: a second one would
    end it without saving.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.read(0, 1024):
            pass
        ends_s = time.monotonic() + GRACE_S
        while after_parent and os.getppid() == parent and time.monotonic() < ends_s:
            time.sleep(0.2)
        interrupt(signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


class Presence:
    """A lock file that every process of a group holds while it lives; the system releases it when one is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def hold(self) -> None:
        """Hold the lock until this process ends."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def wait_for_none(self, seconds: float) -> bool:
        """Wait until no process of the group is left; false if one still is after `seconds`."""
        ends_s = time.monotonic() + seconds
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    if time.monotonic() > ends_s:
                        return False
                    time.sleep(0.1)
        finally:
            os.close(descriptor)
