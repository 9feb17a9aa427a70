"""The one error that a stage raises for bad input: one line that a person can act on."""

import errno
import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")


class PipelineError(Exception):
    """Wrong input, found where it enters: not worth a retry.

    The message is one line: what was found where, what was expected, what to do. The orchestrator shows it as a
    permanent failure, the service as a start-up failure; neither shows a traceback.
    """


class TransientError(PipelineError):
    """A PipelineError of a network or a disk: another try may find it well. The orchestrator's retries hold for it."""


def ends_in_one_line(main: Callable[P, int]) -> Callable[P, int]:
    """A command's `main`, which returns an exit status: a PipelineError is printed as one line and gives status 1."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run


@contextmanager
def full_disk_as_error(directory: Path) -> Iterator[None]:
    """Turn "no space left on device" (or a spent quota) while writing below `directory` into a PipelineError."""
    try:
        yield
    except Exception as error:
        # Rust extensions (tokenizers, safetensors) raise their own types, with the system's message in the text.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left on device" not in str(error):
            raise
        existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
        free = shutil.disk_usage(existing).free
        raise PipelineError(
            f"no disk space left while writing to {directory} ({free:,} bytes free): free some or choose another "
            "folder, then run again"
        ) from error
