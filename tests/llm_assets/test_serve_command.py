"""`bentoml serve` of what is not there; that it serves what is there, `tests/bento/test_service.py` shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
BENTOML = Path(sys.executable).with_name("bentoml")


def bentoml(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {"BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    return subprocess.run(
        [BENTOML, *arguments],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("bento", ["rex-stdlib:never", "rex-stdlib", "nothing.service:service", "./nothing"])
def test_what_is_not_there_is_one_line_with_the_next_step(tmp_path: Path, bento: str) -> None:
    done = bentoml(tmp_path, "serve", bento)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert repr(bento) in done.stderr and str(tmp_path / "home/bentos") in done.stderr and "bentoml list" in done.stderr


def test_a_module_that_fails_keeps_bentomls_own_account(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    done = bentoml(tmp_path, "serve", "broken:service")
    assert done.returncode == 1
    assert "nothing_of_this_name" in done.stderr


def test_the_options_are_those_of_bentoml(tmp_path: Path) -> None:
    text = bentoml(tmp_path, "serve", "--help").stdout
    assert all(text.count(option) == 1 for option in ("--port", "--host", "--reload  ", "--verbose", "--do-not-track"))
