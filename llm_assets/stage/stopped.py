"""Reports the processes of a run that are stopped (SIGSTOP, Ctrl-Z): they neither work nor fail, and the run waits.

A continued process resumes where it was. A run that is terminated continues its stopped processes itself, since they do
not act on the signal that should end them.
"""

import os
import select
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

from model.progress import Log
from model.system.processes import stopped_descendants

POLL_EVERY_S = 1.0
REPORT_AFTER = 3
"""Polls that find a process stopped before it is reported, since some tools stop processes for moments."""
_END = b"\0"  # no signal has this number


@contextmanager
def watch(log: Log, names: Mapping[int, str]) -> Iterator[None]:
    """Log a line for each descendant that is stopped, and one when it resumes; continue them after SIGINT or SIGTERM.

    names: of processes by their id. In a thread other than the main one, signals are not noticed.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = None
    with suppress(ValueError):  # not the main thread
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, log, names), name="stopped-processes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if before is not None:
            signal.set_wakeup_fd(before)
        os.write(writer, _END)
        thread.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, log: Log, names: Mapping[int, str]) -> None:
    polls: dict[int, int] = {}
    is_ending = False
    while True:
        if select.select([reader], [], [], POLL_EVERY_S)[0]:
            received = os.read(reader, 64)
            if _END in received:
                return
            is_ending = is_ending or bool({signal.SIGINT, signal.SIGTERM} & set(received))
        found = {process.pid: process for process in stopped_descendants()}
        for pid, process in found.items():
            if is_ending:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
                continue
            polls[pid] = polls.get(pid, 0) + 1
            if polls[pid] == REPORT_AFTER:
                log(
                    f"{names.get(pid, 'a process of the run')} is stopped and the run waits for it: `kill -CONT {pid}` "
                    "continues it, terminating the run ends it"
                )
        for pid in [pid for pid in polls if pid not in found]:
            if polls.pop(pid) >= REPORT_AFTER and psutil.pid_exists(pid):
                log(f"{names.get(pid, f'process {pid}')} goes on")
