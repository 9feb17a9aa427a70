"""Running a job in a terminal: what is said when the run itself cannot say it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_assets.paths import REPOSITORY

pytestmark = [pytest.mark.processes, pytest.mark.slow]
ALONE = ["unshare", "--mount", "--map-root-user"]


def test_a_run_that_finds_a_full_disk_says_so_in_one_line(tmp_path: Path) -> None:
    if subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this kernel lets no process mount a small file system of its own")
    home = tmp_path / "var" / "dagster"
    run = f"mkdir {home} && cp {REPOSITORY}/dagster.yaml {home} && exec {sys.executable} -m llm_assets.terminal.execute"
    home.parent.mkdir()
    ended = subprocess.run(
        [*ALONE, "sh", "-c", f"mount -t tmpfs -o size=200k none {home.parent} && {run} smoke"],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "LLM_ASSETS_VAR": str(home.parent), "DAGSTER_HOME": str(home)},
    )
    lines = (ended.stdout + ended.stderr).splitlines()
    assert ended.returncode == 1
    assert [line for line in lines if "no disk space left while writing to" in line]
    assert len(lines) <= 2
