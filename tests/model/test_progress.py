"""A command that prints nothing is seen to be alive, and ends as it would alone."""

import re
import subprocess
import sys

import pytest

from llm_assets.paths import REPOSITORY

PROGRESS = [sys.executable, "-m", "model.progress"]


@pytest.mark.processes
@pytest.mark.parametrize("status", [0, 3])
def test_a_silent_command_has_dots_and_its_status(status: int) -> None:
    program = f"import sys, time; time.sleep(3.2); sys.stderr.write('the end\\n'); sys.exit({status})"
    command = [*PROGRESS, "waiting", sys.executable, "-c", program]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == status
    assert re.fullmatch(r"waiting \.+\n", ended.stdout) and ended.stderr == "the end\n"


@pytest.mark.processes
def test_a_short_command_has_none() -> None:
    command = [*PROGRESS, "waiting", sys.executable, "-c", "print('done')", "--help"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert (ended.returncode, ended.stdout) == (0, "done\n")
