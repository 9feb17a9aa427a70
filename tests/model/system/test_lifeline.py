"""Processes end with the one that started them, and are known to be gone."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.system.lifeline import Presence

PROGRAM = """
import sys, time
from pathlib import Path
from model.system.lifeline import Presence, end_with_input
end_with_input(after_parent=len(sys.argv) > 2)
presence = Presence(Path(sys.argv[1]))
presence.hold()
print("holds", flush=True)
time.sleep(600)
"""


@pytest.mark.processes
def test_a_process_gets_a_termination_when_its_input_ends_and_is_known_to_be_gone(tmp_path: Path) -> None:
    presence = Presence(tmp_path / "lock")
    assert presence.wait_for_none(0)
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin and child.stdout and child.stdout.readline() == b"holds\n"
    assert not presence.wait_for_none(0)
    child.stdin.close()
    assert child.wait(60) == -signal.SIGTERM
    assert presence.wait_for_none(0)
    child.stdout.close()


@pytest.mark.processes
def test_a_child_whose_parent_ends_it_is_not_ended_twice(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "lock"), "after parent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin and child.stdout and child.stdout.readline() == b"holds\n"
    child.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):  # this process, its parent, lives
        child.wait(1)
    child.kill()
    child.wait()
    child.stdout.close()
    assert Presence(tmp_path / "lock").wait_for_none(0)
