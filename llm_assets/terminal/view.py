"""Displays a run's records: a live status line on a terminal, plain lines elsewhere.

On a terminal, a running stage is one live line, which becomes one permanent line when the stage ends; warnings are
printed. Elsewhere each message is a line, progress is printed every PROGRESS_EVERY_S, and dots in between show that the
run is alive. A stage prints at most STAGE_LINES messages, and no line is wider than 80 columns, except for a path.
"""

import re
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from llm_assets.terminal.records import Record
from model.progress import Dots, format_duration

WIDTH = 80
STAGE_LINES = 16
"""Limit of the messages shown for a stage; the log file has all of them."""
PROGRESS_EVERY_S = 30.0
ERRORS = ("ERROR", "CRITICAL")
WARNINGS = ("WARNING", *ERRORS)
_PERCENT = re.compile(r" \((\d+) %\)")
_LEFT = re.compile(r"^(.*), (\S+ left)$")
_BAR = 10


class View:
    """Displays the records of one run, given in order."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._started: dict[str, float] = {}
        self._shown: dict[str, int] = {}
        self._outcome: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._last_progress = -PROGRESS_EVERY_S
        self._began = clock()
        self.failures: list[str] = []
        self._status = Status("starting", console=console, spinner="line") if console.is_terminal else None
        self._dots = None if self._status else Dots(console.file, clock)

    def live(self) -> AbstractContextManager[object]:
        """A context in which the run's progress is shown: by the live line on a terminal, else by dots."""
        if self._dots:
            self._dots.tick("starting", at_once=True)  # imports have taken seconds already
        return self._status or closing(self)

    def close(self) -> None:
        """End a line of dots."""
        if self._dots:
            self._dots.close()

    def take(self, record: Record) -> None:
        """Show a record."""
        if record.event in ("STEP_START", "STEP_RESTARTED"):
            self._started[record.stage] = self._clock()
            if not self._status:
                self._print(f"{record.stage}: started")
        elif record.event in ("STEP_SUCCESS", "STEP_FAILURE", "STEP_UP_FOR_RETRY"):
            self._end(record)
        elif not record.event and not record.stage and record.level in ERRORS:
            self.failures.append(record.text)
        elif not record.event and (record.stage or record.level in WARNINGS):
            self._message(record)

    def tick(self) -> None:
        """Refresh the live line or print a dot if one is due; to be called a few times a second."""
        idle = "running" if self._said else "starting"  # also between two stages, and after the last
        if self._dots:
            self._dots.tick(", ".join(self._started) or idle)
        if self._status:
            working = [self._working(stage) for stage in self._started]
            self._status.update("\n  ".join(working) or f"{idle}  {format_duration(self._clock() - self._began)}")

    def _working(self, stage: str) -> str:
        said = self._said.get(stage, "")
        found = _PERCENT.search(said)
        bar = ""
        if found:
            filled = min(int(found[1]), 100) * _BAR // 100
            bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] "
            # The time left comes first: the end of the line may be cut.
            said = _LEFT.sub(r"\2, \1", said.replace(found[0], ""))
        line = f"{stage:18} {format_duration(self._clock() - self._started[stage])}  {bar}{said}"
        return escape(_cut(line, min(WIDTH, self._console.width) - 4))

    def _message(self, record: Record) -> None:
        text = record.text
        if text.startswith(
            ("MLflow run: ", "Dependencies for step ")
        ):  # the stage that failed is named once, at the end
            return
        if text.startswith("unchanged: "):  # not computed, or computed with an equal result
            reused = text.startswith(f"unchanged: {record.stage} of ")
            self._outcome[record.stage] = "unchanged" if reused else "same result"
        self._said[record.stage] = text.removeprefix(f"{record.stage}: ")
        is_warning = record.level in WARNINGS or text.startswith("warning: ")
        if _PERCENT.search(text) and not is_warning:
            if self._clock() - self._last_progress < PROGRESS_EVERY_S:
                return
            self._last_progress = self._clock()
        if self._status and not is_warning:
            return
        count = self._shown[record.stage] = self._shown.get(record.stage, 0) + 1
        if count < STAGE_LINES:
            self._print(text if text.startswith(record.stage) else f"{record.stage}: {text}")
        elif count == STAGE_LINES:
            self._print(f"{record.stage}: further messages are in the log")

    def _end(self, record: Record) -> None:
        if record.stage not in self._started:  # a step whose process died is reported twice
            return
        took = self._clock() - self._started.pop(record.stage)
        how = {"STEP_FAILURE": "failed", "STEP_UP_FOR_RETRY": "retrying"}.get(record.event, "done")
        if how == "done":
            how = self._outcome.get(record.stage, how)
        lasted = f"{took:.1f} s" if took < 100 else format_duration(took)
        self._print(f"{record.stage:18} {how:11} {lasted:>8}")
        if record.event == "STEP_FAILURE":
            self.failures.append(f"{record.stage}: {record.text}")

    def _print(self, text: str) -> None:
        self.close()
        width = min(WIDTH, self._console.width)
        # A path stays whole, so that it can be copied.
        lines = textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
        for line in lines or [""]:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
