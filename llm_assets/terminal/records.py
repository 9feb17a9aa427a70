"""The log of a run as a text file, which the terminal's view follows.

Each record is one line: time, level, stage, kind of event, text. Every process of a run appends to the same file
(`file_logger.py`). Imports no Dagster, which would keep a terminal silent for seconds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NONE = "-"
"""Stands for a stage or an event that a record does not have."""
_LINE = re.compile(r"(?P<time>\S+) (?P<level>\S+) +(?P<stage>\S+) +(?P<event>\S+) +(?P<text>.*)")


@dataclass(frozen=True)
class Record:
    """One line. stage, event: empty if the record has none."""

    level: str
    stage: str
    event: str
    text: str


class Follower:
    """Reads the complete lines that were appended to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self._file, self._rest = path.open(encoding="utf-8", errors="replace"), ""

    def records(self) -> Iterator[Record]:
        """The new records; lines in another format are skipped."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            if found := _LINE.fullmatch(line):
                stage, event = (
                    found[name].replace(NONE, "") if found[name] == NONE else found[name] for name in ("stage", "event")
                )
                yield Record(found["level"], stage, event, found["text"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()
