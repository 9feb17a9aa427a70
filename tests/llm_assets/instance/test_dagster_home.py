import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[3]
COMMANDS = {
    "the check": ["-m", "llm_assets.instance.dagster_home"],
    "the sweep": ["-m", "llm_assets.sweep", "experiment=smoke"],
    "the pages": ["-m", "llm_assets.ui"],
}


def run(home: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *command]
    if os.getuid() == 0:  # root may write all the same, unless it gives that right up
        program = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *program]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "LLM_ASSETS_VAR": str(home.parent / "var")}
    return subprocess.run(program, cwd=REPO, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_dagster_home_is_one_line(name: str, tmp_path: Path) -> None:
    home = tmp_path / "dagster"
    home.mkdir()
    home.chmod(0o555)
    done = run(home, COMMANDS[name])
    home.chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: DAGSTER_HOME {home} cannot be written (Permission denied: ")
    assert done.stderr.count("\n") == 1 and "make it writable" in done.stderr


@pytest.mark.parametrize("command", [["-m", "llm_assets.terminal.execute", "smoke"], COMMANDS["the pages"]])
def test_a_read_only_var_is_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "var").mkdir(mode=0o555)
    done = run(tmp_path / "dagster", command)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr and f"{tmp_path}/var/" in done.stderr


def test_a_database_of_another_user_and_a_file_in_its_place_are_one_line(tmp_path: Path) -> None:
    home = tmp_path / "dagster"
    (home / "history").mkdir(parents=True)
    (home / "history" / "runs.db").write_bytes(b"")
    (home / "history" / "runs.db").chmod(0o444)
    assert "(Permission denied: " in run(home, COMMANDS["the check"]).stderr
    (tmp_path / "file").write_text("")
    assert "(File exists: " in run(tmp_path / "file", COMMANDS["the check"]).stderr


def test_a_home_that_can_be_written_stays_as_it_was(tmp_path: Path) -> None:
    assert run(tmp_path / "new", COMMANDS["the check"]).returncode == 0
    assert list((tmp_path / "new").iterdir()) == []
