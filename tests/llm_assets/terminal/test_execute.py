"""Running a job in a terminal: what is said when the run itself cannot say it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_run_ends_with_the_killed_process_that_shows_it(tmp_path: Path, is_stopped: bool) -> None:
    command = [sys.executable, "-m", "llm_assets.terminal.execute", "smoke", "training.max_steps=100000"]
    home = tmp_path / "dagster"
    home.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    environment = {**os.environ, "LLM_ASSETS_VAR": str(tmp_path), "DAGSTER_HOME": str(home)}
    shown = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    started = psutil.Process(shown.pid)
    try:
        while not list((tmp_path / "scratch/trained_checkpoint").glob("*/*/*/*")):
            assert shown.poll() is None
            time.sleep(0.2)
        run = started.children()[0]
        left = started.children(recursive=True)
        assert len(left) >= 3  # the run, its fork server and the step
        if is_stopped:
            run.suspend()
        shown.kill()
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive
    finally:
        for process in started.children(recursive=True) if started.is_running() else []:
            process.kill()
        shown.kill()
        shown.wait()
