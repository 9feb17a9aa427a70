"""Tasks for Ray, whose processes import this module alone: torch and what else the tests import would take seconds."""

import os
import signal
from pathlib import Path

from model.errors import PipelineError


def double(item: int) -> int:
    if item == 7:
        raise PipelineError("7 is not doubled here")
    return 2 * item


def die_once(mark: Path) -> int:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def die(item: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
