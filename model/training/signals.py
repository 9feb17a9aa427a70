"""Termination that waits for the end of a step: what is half done cannot be saved, what is done can.

A SIGTERM (an orchestrator's or a scheduler's) or a SIGINT (Ctrl-C) is noted; the training loop saves at the end of the
running step and then delivers it to whoever had the handler before. A second signal is delivered at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class DeferredSignals:
    """Signals that arrived and were not delivered yet."""

    def __init__(self) -> None:
        self._arrived: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether a signal waits to be delivered."""
        return self._arrived is not None

    def deliver(self) -> None:
        """Put the earlier handlers back and send them the signal that waits, if there is one."""
        self._restore()
        if self._arrived is not None:
            number, self._arrived = self._arrived, None
            signal.raise_signal(number)

    def _hold(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN and before is not None:
                self._before[number] = before
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        second = self.pending
        self._arrived = number
        if second:
            self.deliver()

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, before)
        self._before.clear()


@contextmanager
def deferred_signals() -> Iterator[DeferredSignals]:
    """Hold SIGTERM and SIGINT back inside the block; one that was not delivered inside is delivered at its end.

    In a thread other than the main one, which gets no signals, nothing is held.
    """
    deferred = DeferredSignals()
    if threading.current_thread() is threading.main_thread():
        deferred._hold()
    try:
        yield deferred
    except BaseException:
        deferred._restore()  # the error that is on its way ends the training as well
        raise
    deferred.deliver()
