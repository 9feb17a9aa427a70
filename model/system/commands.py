"""Runs other programs, each in a separate process group, which ends with the caller; their output is logged."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO

from model.errors import PipelineError
from model.progress import Log, silent


def ending_with_parent(command: Sequence[str], signal: str = "KILL") -> list[str]:
    """The command, killed by the kernel when the thread that starts it ends, also by SIGKILL.

    signal: the name of the one that it gets; TERM for a program that has to end others.
    Uses the program setpriv instead of `preexec_fn`, which is unsafe in a process with threads; without setpriv the
    command is unchanged.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", signal, *command] if setpriv else list(command)


def finding_modules() -> dict[str, str]:
    """The environment in which a Python process finds the modules that this one finds, and those of this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


def run(
    command: Sequence[str],
    what: str,
    *,
    cwd: str | None = None,
    environment: Mapping[str, str] | None = None,
    log: Log = silent,
    name: str = "",
    logs_output: bool = False,
) -> str:
    """Standard output of a command; its standard error goes to the log line by line, prefixed with `name`.

    logs_output: log standard output as well.
    Raises PipelineError with the command's last line if it fails or does not exist; `what` names its purpose.
    """
    lines: list[str] = []
    printed: list[str] = []
    prefix = f"{name}: " if name else ""

    def relay(stream: IO[str]) -> None:
        for line in stream:
            lines.append(line.strip())
            log(prefix + line.rstrip())

    if shutil.which(command[0], path=(environment or os.environ).get("PATH")) is None:
        raise PipelineError(f"{what} failed: there is no command {command[0]!r}")
    with subprocess.Popen(
        ending_with_parent(command),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        reader = Thread(target=relay, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            for line in process.stdout:
                printed.append(line)
                if logs_output:
                    log(prefix + line.rstrip())
            process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a terminated step leaves no build behind
            raise
        reader.join()
    if process.returncode:
        # make's own last line only says that it failed.
        output = [line.strip() for line in [*printed, *lines] if line.strip() and not line.startswith("make")]
        reason = output[-1] if output else "no output"
        raise PipelineError(f"{what} failed (exit status {process.returncode}): {reason}")
    return "".join(printed)
