"""Programs that train, each in a process forked from one that has imported torch, transformers and the training.

A new interpreter takes 5 to 10 s of a core for these imports, and a test that ends a training in the middle starts
several. The server that forks them is Python's; each worker of the tests has one, from its first program on. Where a
test looks at the imports themselves, it starts an interpreter.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]
PRELOADED = ["model.training.train"]
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """How a program ended. status: its exit status, or the negative number of the signal that killed it.

    left: ids of processes of its session that outlive it.
    """

    status: int
    said: str
    left: list[int]


def start(program: str | Path, *arguments: object, log: Path) -> BaseProcess:
    """Start a file, or a text of Python, as the interpreter does: with these arguments, in the repository's folder.

    log: the file of its output and errors. The process leads a session, to which those that it starts belong.
    """
    if isinstance(program, str):
        text, program = program, log.with_suffix(".py")
        program.write_text(text)
    _CONTEXT.set_forkserver_preload(PRELOADED)
    process = _CONTEXT.Process(target=_run, args=([program, *arguments], log, dict(os.environ)))
    process.start()
    return process


def run(program: str | Path, *arguments: object, log: Path, seconds: float = 800) -> Ended:
    """Start a program and wait for its end. Raises TimeoutError after `seconds`, and kills its session."""
    process = start(program, *arguments, log=log)
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        raise TimeoutError(f"not ended after {seconds:.0f} s: {log.read_text()[-3000:]}")
    return Ended(process.exitcode, log.read_text(), [one for one in psutil.pids() if _session(one) == process.pid])


def _session(process: int) -> int:
    """The process that leads a process's session, or 0 for one that has ended."""
    try:
        return os.getsid(process) if psutil.Process(process).status() != psutil.STATUS_ZOMBIE else 0
    except (OSError, psutil.Error):
        return 0


def _run(command: list[object], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPO)
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = [str(word) for word in command]
    runpy.run_path(sys.argv[0], run_name="__main__")
