"""Progress of long work: log lines with an estimate of the time left, or dots where it reports none.

python -m model.progress LABEL COMMAND ...    # runs a command, with dots unless the output is a terminal
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, TypeVar

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
    """Run `work`, which reports no progress, and log `label, 0:05 so far` every `every_s` seconds."""
    started = time.monotonic()
    return _watched(work, every_s, lambda: log(f"{label}, {format_duration(time.monotonic() - started)} so far"))


class Dots:
    """Signs of life if the output is not a terminal: a label, and a dot for each EVERY_S in which nothing was printed.

    stream: receives the text; None means standard output.
    clock: seconds.
    """

    EVERY_S = 2.0
    WIDTH = 80

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stdout, clock
        self._column = 0
        self._last = clock()

    def tick(self, label: str, *, at_once: bool = False) -> None:
        """Print a dot if one is due, after `label` where it begins a line; to be called a few times a second.

        at_once: print it even if it is not due.
        """
        if not at_once and self._clock() - self._last < self.EVERY_S:
            return
        if self._column >= self.WIDTH:
            self.close()
        text = "." if self._column else f"{label[: self.WIDTH - 2]} ."
        self._stream.write(text)
        self._stream.flush()
        self._column += len(text)
        self._last = self._clock()

    def close(self) -> None:
        """End a line of dots, if there is one; to be called before anything else is printed."""
        if self._column:
            self._stream.write("\n")
        self._column = 0
        self._last = self._clock()


def with_dots(work: Callable[[], T], label: str) -> T:
    """Run `work`, which prints nothing, and print dots after `label` on standard output."""
    dots = Dots()
    try:
        return _watched(work, 0.1, lambda: dots.tick(label))
    finally:
        dots.close()


def _watched(work: Callable[[], T], every_s: float, meanwhile: Callable[[], None]) -> T:
    """Run `work`, and call `meanwhile` every `every_s` seconds until it ends.

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
    thread.start()
    while thread.is_alive():
        thread.join(every_s)
        if thread.is_alive():
            meanwhile()
    if errors:
        raise errors[0]
    return results[0]


def format_duration(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from one hour."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m model.progress", description=__doc__.split("\n")[0])  # type: ignore
    parser.add_argument("label", help="what the dots stand for")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    given = parser.parse_args()
    command = [given.program, *given.arguments]
    if sys.stdout.isatty():
        os.execvp(given.program, command)  # it shows its own progress there
    return with_dots(lambda: subprocess.run(command, check=False), given.label).returncode


if __name__ == "__main__":
    sys.exit(main())
