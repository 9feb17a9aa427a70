"""The reason in the standard error of a process that failed, for one line.

Python prints it as the last traceback's last line, but warnings and messages of other processes may follow, and vLLM
prints each line of its own processes after a prefix: `(EngineCore pid=7) ERROR 11-28 04:00:00 [core.py:9] Traceback`.
"""

import re
import signal
from collections.abc import Iterator
from contextlib import suppress

TRACEBACK = "Traceback (most recent call last):"
MAX_LENGTH = 400
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(:|$)")
_FAILS = re.compile(r"error|fail|assert|abort|invalid|cannot", re.IGNORECASE)


def reason_of(stderr: str, status: int) -> str:
    """The exception that ended a process, or what its standard error says instead; at most MAX_LENGTH characters.

    status: its exit status, negative for a signal. An exception that refers to another process's is passed over.
    """
    exceptions = list(_exceptions(stderr.splitlines()))
    # vLLM: "Engine core initialization failed. See root cause above."
    roots = [line for line in exceptions if "root cause" not in line]
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    failing = [line for line in lines if _FAILS.search(line)]
    found = next((kind[-1] for kind in (roots, exceptions, failing, lines) if kind), "")
    how = f"exit status {status}"
    if status < 0:
        how = f"signal {-status}"
        with suppress(ValueError):
            how = signal.Signals(-status).name
    if not found or (status < 0 and not exceptions):
        found = f"{found} ({how})" if found else how
    return found if len(found) <= MAX_LENGTH else f"{found[:MAX_LENGTH]}..."


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The last line of each traceback, with indented lines after it, as pydantic's errors have them."""
    for number, first in enumerate(lines):
        prefix, mark, rest = first.partition(TRACEBACK)
        if not mark or rest.strip():
            continue
        block = (line.removeprefix(prefix) for line in lines[number + 1 :] if line.startswith(prefix))
        found = ""
        for line in block:
            is_indented = line.startswith((" ", "\t"))
            if found and not is_indented:
                break
            if found:
                found += " " + line.strip()
            elif not is_indented and _EXCEPTION.match(line):
                found = line.strip()
        if found:
            yield found
