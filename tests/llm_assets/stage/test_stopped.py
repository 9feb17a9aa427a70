"""Processes that are stopped: what a run says of them, and that nothing is left of it once it is terminated."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llm_assets.artifacts.locks import acquire
from llm_assets.stage.stopped import watch
from model.errors import TransientError
from model.system.processes import is_stopped, lock_holders
from tests.e2e.workplace import REPO

pytestmark = pytest.mark.processes


def wait_for(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_stopped_process_is_named_once_and_again_when_it_goes_on(child: subprocess.Popen[bytes]) -> None:
    said: list[str] = []
    with watch(said.append, {child.pid: "trained_checkpoint"}):
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: said)
        child.send_signal(signal.SIGCONT)
        wait_for(lambda: len(said) == 2)
    waits = f"trained_checkpoint is stopped and the run waits for it: `kill -CONT {child.pid}` continues it, "
    assert said == [waits + "terminating the run ends it", "trained_checkpoint goes on"]


def test_a_run_that_is_terminated_continues_what_is_stopped(child: subprocess.Popen[bytes]) -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with watch(lambda _: None, {}):
            child.send_signal(signal.SIGSTOP)
            wait_for(lambda: is_stopped(child.pid))
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: not is_stopped(child.pid))
    finally:
        signal.signal(signal.SIGTERM, before)


HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
input()
"""


def test_a_stopped_process_that_holds_a_lock_is_named_and_not_waited_for(tmp_path: Path) -> None:
    from filelock import FileLock, Timeout

    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert lock_holders(path) == [holder.pid]
        with pytest.raises(Timeout):
            acquire(FileLock(path), 0.1)
        holder.send_signal(signal.SIGSTOP)
        wait_for(lambda: is_stopped(holder.pid))
        with pytest.raises(TransientError, match=f"process {holder.pid}, which holds {path}, is stopped: "):
            acquire(FileLock(path), 600)
        holder.kill()
    acquire(FileLock(path), 600)


PIPELINE = """
import os, time
import dagster as dg
from llm_assets.jobs.jobs import build_executor
from llm_assets.stage.interrupts import end_with_run
from llm_assets.terminal.file_logger import file_logger

@dg.op
def training(context: dg.OpExecutionContext) -> None:
    end_with_run()
    context.log.info(f"pid {os.getpid()}")
    time.sleep(600)

@dg.job(executor_def=build_executor([]), logger_defs={"file": file_logger})
def run() -> None:
    training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["terminated", "killed", "left by a killed run"])
def test_a_real_run_names_its_stopped_step_and_ends_with_it(tmp_path: Path, what: str) -> None:
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    log = tmp_path / "run.log"
    (tmp_path / "run.yaml").write_text(f'{{"loggers": {{"file": {{"config": {{"path": "{log}"}}}}}}}}')
    command = [sys.executable, "-m", "dagster", "job", "execute", "-f", "pipeline.py", "-j", "run", "-c", "run.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "DAGSTER_HOME": str(tmp_path)}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: log.exists() and "pid " in log.read_text())
    step = psutil.Process(int(log.read_text().partition(" pid ")[2].split()[0]))
    fork_server = step.parent()
    step.suspend()
    wait_for(lambda: f"training is stopped and the run waits for it: `kill -CONT {step.pid}`" in log.read_text())
    {"terminated": run.terminate, "killed": step.kill, "left by a killed run": run.kill}[what]()
    run.wait(120)
    assert ("its process was killed from outside" in log.read_text()) == (what == "killed")
    psutil.wait_procs([step, fork_server], timeout=120)
    assert not step.is_running() and not fork_server.is_running()
