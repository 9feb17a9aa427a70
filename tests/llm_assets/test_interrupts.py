"""A termination that Python drops, because it came up in a finalizer, still ends the step."""

import os
import signal
import threading

import dagster as dg
import pytest

from llm_assets.interrupts import noticed_interrupts


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
