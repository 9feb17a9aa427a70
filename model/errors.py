"""The one error that a stage raises for bad input: one line that a person can act on."""

import errno
import functools
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")


_MAX_LENGTH = 2000
"""Longest message, in characters; longer ones, with text from a file or another program, are cut in the middle."""


class PipelineError(Exception):
    """Invalid input, reported where it enters; a retry cannot help.

    The message is one line of at most `_MAX_LENGTH` characters, however long the input: what was found
    where, what was expected, what to do. The orchestrator shows it as a permanent failure, the service as a start-up
    failure; neither shows a traceback.
    """

    def __init__(self, message: str) -> None:
        message = "\\n".join(message.splitlines())
        if len(message) > _MAX_LENGTH:
            message = f"{message[: _MAX_LENGTH // 2]} [...] {message[-_MAX_LENGTH // 2 :]}"
        super().__init__(message)


class TransientError(PipelineError):
    """A PipelineError that may be temporary, of a network or a disk: the orchestrator retries it."""


def ends_in_one_line(main: Callable[P, int]) -> Callable[P, int]:
    """A command's `main`, which returns an exit status: an error of the user's or the system's is one line, status 1.

    That is a PipelineError, what the system refuses (`limits_as_error`), and the last line of a program that failed.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            with limits_as_error(Path()):
                return main(*args, **kwargs)
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:
            print(f"error: {PipelineError(_failure(error))}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # `head` and its like have read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return run


def _failure(error: subprocess.CalledProcessError) -> str:
    """A failed program's command, and the last line that it wrote, if that was captured."""
    said = error.stderr or b""
    lines = (said if isinstance(said, str) else said.decode(errors="replace")).strip().splitlines()
    command = error.cmd if isinstance(error.cmd, str) else shlex.join(map(str, error.cmd))
    reason = [lines[-1].removeprefix("error: ")] if lines else []
    return ": ".join([f"{command} ended with status {error.returncode}", *reason])


def json_type(value: object) -> str:
    """What JSON calls a value's type, for a message."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


def one_line(error: BaseException) -> str:
    """An error's text in one line; the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def not_json(error: ValueError | RecursionError) -> str:
    """Why `json.loads` refused a text, in one line: a RecursionError for its depth, a ValueError for all else."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return "a number of thousands of digits" if "integer string conversion" in str(error) else one_line(error)


def names_of(found: Iterable[object]) -> str:
    """The names of fields or columns, sorted, the first few of many, for a message; "none" if there are none."""
    names = sorted(map(str, found))
    shown = [name if name.isprintable() and len(name) <= 50 else repr(name[:50]) for name in names[:_NAMES_SHOWN]]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (", ".join(shown) or "none") + more


_NAMES_SHOWN = 20
_JSON_TYPES = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "list",
    dict: "object",
}
OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Limits of a process or its machine: whatever file it works on, that file is not at fault."""
_SPACE = (errno.ENOSPC, errno.EDQUOT)
_MEMORY = re.compile(r"can't allocate memory|std::bad_alloc|cannot allocate memory", re.IGNORECASE)
_THREADS = re.compile(r"can't start new thread|failed to (spawn|create) thread", re.IGNORECASE)
_NUMBER = re.compile(r"(?:errno|os error) (\d+)", re.IGNORECASE)
_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "disk I/O error": errno.EIO,
}
_PASSING = (errno.ENFILE, errno.EIO, errno.ESTALE, errno.EAGAIN)
"""Errors that may be temporary: of another process, a disk or a network."""
_FIXED = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n 1024`)",
    errno.ENFILE: "the whole machine has too many open files: end other programs, or raise fs.file-max",
    errno.EROFS: "mount it for writing, or choose another folder",
    errno.EACCES: "give this user the right to it, or choose another folder",
    errno.EPERM: "give this user the right to it, or choose another folder",
    errno.EIO: "the disk or its connection failed (`dmesg` may say more): repair it, or choose another folder",
    errno.ESTALE: "the network folder was exported again: mount it again",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f unlimited`), or choose another file system",
    errno.ENAMETOOLONG: "choose a shorter name or folder",
    errno.EISDIR: "a folder is in the place of a file: move it away, or choose another folder",
    errno.EEXIST: "a file is in the place of a folder: move it away, or choose another folder",
    errno.ELOOP: "a symbolic link leads to itself: remove it, or choose another folder",
    errno.ENOTDIR: "a file is in the place of a folder: move it away, or choose another folder",
    errno.EAGAIN: "raise the limit of processes and threads (`ulimit -u`, a container's pids), or end other programs",
}


@contextmanager
def limits_as_error(directory: Path) -> Iterator[None]:
    """Turn errors of the system's limits (space, memory, files, threads, rights) into one line.

    directory: named if the error names no file. Raises PipelineError, or TransientError for errors that may be
    temporary; other errors pass.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if (line := _refusal(error, directory)) is None:
            raise
        raise line from error


def _refusal(error: BaseException, directory: Path) -> PipelineError | None:
    cause, number = _cause(error)
    if number in _SPACE:
        return no_space(directory)
    if number == errno.ENOMEM:
        return PipelineError(
            f"out of memory while working on {directory} ({_memory()}): raise the limit (`ulimit -v`, a container's "
            "memory), end other programs, or make the work smaller, then run again"
        )
    if number not in _FIXED:
        return None
    named = getattr(cause, "filename", None)
    where = directory if named is None else os.fsdecode(named) if isinstance(named, bytes | str) else named
    kind = TransientError if number in _PASSING else PipelineError
    return kind(f"{where}: {os.strerror(number)}; {_FIXED[number]}, then run again")


def _cause(error: BaseException | None) -> tuple[BaseException | None, int]:
    """The error or cause that has a system error number, and that number; 0 if none has.

    Rust extensions (tokenizers, safetensors), SQLite and torch raise their own types, with the system's message in the
    text.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            return error, errno.ENOMEM
        if isinstance(error, OSError) and error.errno is not None:
            return error, error.errno
        if number := _number_in(str(error)):
            return error, number
        error = error.__cause__
    return None, 0


def _number_in(text: str) -> int:
    if _MEMORY.search(text):
        return errno.ENOMEM
    if _THREADS.search(text):
        return errno.EAGAIN
    for words, number in _SQLITE.items():
        if words in text:
            return number
    if found := _NUMBER.search(text):
        return int(found[1])
    for number in (*_SPACE, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO):
        if os.strerror(number) in text:
            return number
    return 0


def free_bytes(directory: Path) -> int:
    """Free bytes of the disk that holds `directory`, which may not exist yet."""
    existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free


def no_space(directory: Path) -> PipelineError:
    """The error of a full disk that holds `directory`."""
    return PipelineError(
        f"no disk space left while writing to {directory} ({free_bytes(directory):,} bytes free): free some or choose "
        "another folder, then run again"
    )


def _memory() -> str:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    held = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:,.0f} MB held at most"
    return held if limit == resource.RLIM_INFINITY else f"{held}, limit {limit / 1e6:,.0f} MB"
