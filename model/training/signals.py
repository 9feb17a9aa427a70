"""Defers SIGTERM and SIGINT to the end of the optimizer step, where a checkpoint can be saved.

The training loop saves at the end of the current step and then delivers the signal to the previous handler. A second
signal is delivered at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class DeferredSignals:
    """Received signals that are not yet delivered."""

    def __init__(self) -> None:
        self._arrived: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether a signal is deferred."""
        return self._arrived is not None

    def deliver(self) -> None:
        """Restore the previous handlers and raise the deferred signal, if any."""
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
    """Defer SIGTERM and SIGINT inside the block; an undelivered signal is delivered at its end.

    Does nothing outside the main thread, which alone receives signals.
    """
    deferred = DeferredSignals()
    if threading.current_thread() is threading.main_thread():
        deferred._hold()
    try:
        yield deferred
    except BaseException:
        deferred._restore()  # the error ends the training as well
        raise
    deferred.deliver()
