import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model.errors import PipelineError
from model.system.commands import run

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[3]


def test_the_output_comes_back_and_errors_are_logged() -> None:
    lines: list[str] = []
    program = "import sys; print('made'); print('working', file=sys.stderr)"
    assert run([sys.executable, "-c", program], "making", log=lines.append, name="maker") == "made\n"
    assert lines == ["maker: working"]


def test_a_command_that_fails_is_one_line_with_its_last_one() -> None:
    program = "import sys; print('building'); sys.exit('no space')"
    with pytest.raises(PipelineError, match=r"^making failed \(exit status 1\): no space$"):
        run([sys.executable, "-c", program], "making")
    with pytest.raises(PipelineError, match=r"^making failed: there is no command 'no-such-program'$"):
        run(["no-such-program"], "making")


def test_a_command_ends_with_the_process_that_runs_it_when_that_is_killed(tmp_path: Path) -> None:
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import sys; from model.system.commands import run; run([sys.executable, '-c', {sleeper!r}], 'sleeping')"
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(REPO)}) as parent:
        while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        parent.kill()
    child.wait(30)
