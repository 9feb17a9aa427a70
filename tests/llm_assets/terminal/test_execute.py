"""Running a job in a terminal: what is said when the run itself cannot say it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llm_assets.paths import REPOSITORY
from tests.model.system.test_cluster import needs_ray

pytestmark = [pytest.mark.processes, pytest.mark.slow]
ALONE = ["unshare", "--mount", "--map-root-user"]


def run_on_disk(size: str, output: Path) -> subprocess.CompletedProcess[str]:
    """`smoke` on a file system of that size at `output`."""
    if subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this kernel lets no process mount a small file system of its own")
    home = output / "dagster"
    run = f"mkdir {home} && cp {REPOSITORY}/dagster.yaml {home} && exec {sys.executable} -m llm_assets.terminal.execute"
    output.mkdir(parents=True)
    return subprocess.run(
        [*ALONE, "sh", "-c", f"mount -t tmpfs -o size={size} none {output} && {run} smoke"],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "LLM_ASSETS_VAR": str(output), "DAGSTER_HOME": str(home)},
    )


def test_a_run_that_finds_a_full_disk_says_so_in_one_line(tmp_path: Path) -> None:
    ended = run_on_disk("200k", tmp_path / "var")
    lines = (ended.stdout + ended.stderr).splitlines()
    assert ended.returncode == 1
    assert [line for line in lines if "no disk space left while writing to" in line]
    assert len(lines) <= 2


def test_a_disk_that_fills_while_the_run_writes_is_said_in_one_line(tmp_path: Path) -> None:
    ended = run_on_disk("2m", tmp_path / "var")
    lines = (ended.stdout + ended.stderr).splitlines()
    assert ended.returncode == 1
    assert not [line for line in lines if "Traceback" in line]
    error, log = lines[-2:]
    assert error.startswith("error: ") and "no disk space left while writing to" in error
    assert log.startswith("log: ")


def test_a_stage_that_fails_after_a_retry_says_why(tmp_path: Path) -> None:
    home = tmp_path / "dagster"
    home.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    overrides = ["corpus.source=huggingface", "corpus.dataset=owner/missing"]
    environment = {"LLM_ASSETS_VAR": str(tmp_path), "DAGSTER_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "llm_assets.terminal.execute", "smoke", *overrides],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
    )
    assert ended.returncode == 1
    assert re.search(r"^corpus +retrying", ended.stdout, re.MULTILINE), ended.stdout
    errors = [line for line in ended.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: corpus: corpus.dataset 'owner/missing'")


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


@pytest.mark.parametrize(
    ("engine", "killed"),
    [
        pytest.param("ray", "what shows the run", marks=needs_ray),
        ("torchrun", "the run"),
        pytest.param("ray", "the run", marks=[needs_ray, pytest.mark.nightly]),
        pytest.param("torchrun", "what shows the run", marks=pytest.mark.nightly),
    ],
)
def test_no_process_of_a_divided_training_outlives_the_killed_run(tmp_path: Path, engine: str, killed: str) -> None:
    command = [sys.executable, "-m", "llm_assets.terminal.execute", "smoke", f"compute={engine}", "compute.processes=2"]
    command += ["training.max_steps=100000", "training.save_steps=10"]
    home = tmp_path / "dagster"
    home.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    environment = {**os.environ, "LLM_ASSETS_VAR": str(tmp_path), "DAGSTER_HOME": str(home)}
    shown = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    run: list[psutil.Process] = []
    try:
        while not list((tmp_path / "scratch/trained_checkpoint").glob("*/*/*/checkpoint-*")):
            assert shown.poll() is None
            run = psutil.Process(shown.pid).children()
            time.sleep(0.2)
        left = of_this_state(tmp_path)
        lines = [" ".join(process.cmdline()) for process in left]
        assert sum("launch.worker" in line for line in lines) >= 2
        assert engine != "ray" or any("raylet" in line for line in lines)
        os.kill(shown.pid if killed == "what shows the run" else run[0].pid, signal.SIGKILL)
        shown.wait(60)
        _, alive = psutil.wait_procs(left, timeout=60)
        assert not alive and not of_this_state(tmp_path)
    finally:
        for process in of_this_state(tmp_path):
            process.kill()
        shown.wait()


def of_this_state(var: Path) -> list[psutil.Process]:
    """The processes whose environment names this folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("LLM_ASSETS_VAR") == str(var):
                found.append(process)
    return found
