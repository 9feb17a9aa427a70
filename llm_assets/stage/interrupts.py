"""Signals in steps: re-raises a termination that Python dropped; ends a step whose run process died.

Dagster ends a step with an exception that a signal handler raises, once. Python drops an exception raised in a
finalizer or in a weak reference's callback, and training runs both all the time: the step would then run to its end.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import dagster as dg

from model.system.lifeline import interrupt, signal_at_parents_end

WATCH_EVERY_S, GRACE_S = 1.0, 60.0
"""Interval at which a step checks for its run and its fork server, and time to save before it is killed."""


def end_with_run() -> None:
    """Watch the run's process and the fork server from a thread; this step ends when either is gone.

    A killed run would otherwise leave an orphaned training that blocks the next run. If the fork server dies, the run
    loses its step and retries it: both would then wait for each other.
    Does nothing in a step that runs in its run's own process.
    """
    run = multiprocessing.parent_process()
    if run is None:
        return
    fork_server = os.getppid()
    # No thread of a step that is stopped (SIGSTOP) could notice: the kernel continues it.
    signal_at_parents_end(signal.SIGCONT)

    def watch() -> None:
        while os.getppid() == fork_server and run.is_alive():
            run.join(WATCH_EVERY_S)
        interrupt(signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="run-watch", daemon=True).start()


@contextmanager
def noticed_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises DagsterExecutionInterruptedError if a signal has arrived and the step still runs.

    The existing handlers are still called. In a thread other than the main one, which gets no signals, the
    function does nothing.
    """
    arrived: list[int] = []
    before: dict[int, Any] = {}

    def notice(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        before[number](number, frame)

    def check() -> None:
        if arrived:
            arrived.clear()
            raise dg.DagsterExecutionInterruptedError

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, notice)
    try:
        yield check
    finally:
        for caught, handler in before.items():
            # Dagster installs its own handlers around each part of a step: keep those.
            if signal.getsignal(caught) is notice:
                signal.signal(caught, handler)
