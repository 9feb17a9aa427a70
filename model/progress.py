"""Progress of long work as log lines with an estimate of the time left, at most one every few seconds."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
Log = Callable[[str], None]
"""Receives the progress lines of a stage: `print`, a logger's `info`, or `silent` in tests."""


def silent(message: str) -> None:
    """Drop a progress line."""


class Progress:
    """Counts work done and logs `label: 12 of 40 documents (30 %), 0:08 left` at most every `every_s` seconds.

    total: the amount of work in `unit`; None if it is not known, and then no estimate is given.
    The first line comes only after `every_s` seconds, so short work stays quiet.
    """

    def __init__(self, log: Log, label: str, total: float | None, unit: str, every_s: float = 5.0) -> None:
        self._log, self._label, self._total, self._unit, self._every_s = log, label, total, unit, every_s
        self._done = 0.0
        self._started = self._last = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        """Add finished work and log a line when one is due."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < self._every_s:
            return
        self._last = now
        if self._total:
            left_s = (now - self._started) * max(self._total - self._done, 0.0) / self._done
            percent = 100 * self._done / self._total
            self._log(
                f"{self._label}: {self._done:,.0f} of {self._total:,.0f} {self._unit} ({percent:.0f} %), "
                f"{format_duration(left_s)} left"
            )
        else:
            self._log(f"{self._label}: {self._done:,.0f} {self._unit}")


def with_lines(work: Callable[[], T], log: Log, label: str, every_s: float = 5.0) -> T:
    """Run `work`, which reports no progress, and log `label, 0:05 so far` every `every_s` seconds.

    It runs in a thread that does not outlive the process, so that an interrupt ends the wait at once.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    started = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(every_s)
        if thread.is_alive():
            log(f"{label}, {format_duration(time.monotonic() - started)} so far")
    if errors:
        raise errors[0]
    return results[0]


def format_duration(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from one hour."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
