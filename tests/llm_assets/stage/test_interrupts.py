"""A termination that Python drops, because it came up in a finalizer, still ends the step."""

import os
import signal
import subprocess
import sys
import threading

import dagster as dg
import psutil
import pytest

from llm_assets.stage.interrupts import noticed_interrupts
from tests.e2e.workplace import REPO


class KillsInItsFinalizer:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000):  # the handler runs at one of these
            pass


@pytest.fixture
def raising_handler():
    """What Dagster has in place while a step runs."""

    def handler(number, frame):
        raise dg.DagsterExecutionInterruptedError

    before = signal.signal(signal.SIGINT, handler)
    yield handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_termination_lost_in_a_finalizer_is_raised_at_the_next_check(raising_handler):
    with noticed_interrupts() as check:
        check()
        lost = KillsInItsFinalizer()
        del lost
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            check()
        check()
    assert signal.getsignal(signal.SIGINT) is raising_handler


def test_a_termination_is_raised_where_it_comes(raising_handler):
    with pytest.raises(dg.DagsterExecutionInterruptedError), noticed_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000):
            pass
        pytest.fail("the step ran on")
    assert signal.getsignal(signal.SIGINT) is raising_handler


def test_a_thread_that_gets_no_signals_runs_unhindered():
    checked = []

    def work():
        with noticed_interrupts() as check:
            check()
            checked.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert checked


PARENT = """
import multiprocessing, sys, time
from llm_assets.stage.interrupts import end_with_run

def step():
    end_with_run()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process(target=step).start()
    time.sleep(60)
"""


@pytest.mark.processes
@pytest.mark.parametrize("killed", ["the run", "the fork server"])
def test_a_step_ends_with_the_process_that_was_killed(tmp_path, killed):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout
    step = psutil.Process(int(parent.stdout.readline()))
    if killed == "the run":
        parent.kill()
        parent.wait()
    else:
        step.parent().kill()
    step.wait(120)
    parent.kill()
    parent.wait()
