"""Processes of this machine that are stopped (SIGSTOP, Ctrl-Z), and which process holds the lock of a file.

A stopped process neither works nor fails nor gives up its locks until it is continued (SIGCONT) or killed.
"""

import os
from contextlib import suppress
from pathlib import Path

import psutil

_LOCKS = Path("/proc/locks")


def is_stopped(pid: int) -> bool:
    """Whether a process exists and is stopped."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def stopped_descendants(pid: int | None = None) -> list[psutil.Process]:
    """The stopped descendants of a process, by default of this one."""
    with suppress(psutil.Error):
        return [one for one in psutil.Process(pid).children(recursive=True) if is_stopped(one.pid)]
    return []


def lock_holders(path: Path) -> list[int]:
    """Ids of the processes that hold a lock of a file; none if the system does not tell."""
    found = []
    with suppress(OSError, ValueError):
        file = path.stat()
        place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
        for line in _LOCKS.read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF; "->" before the kind marks one that waits
            fields = line.split()
            if fields[1] != "->" and fields[5] == place:
                found.append(int(fields[4]))
    return found


def stopped_holder(path: Path) -> str | None:
    """A message about a stopped process that holds a lock of a file; None if there is none."""
    for pid in lock_holders(path):
        if is_stopped(pid):
            return (
                f"process {pid}, which holds {path}, is stopped: `kill -CONT {pid}` continues it, `kill {pid}` ends it"
            )
    return None
