import os
import signal

import pytest

from model.training.signals import deferred_signals


@pytest.fixture
def delivered():
    """Signals that reach the handler that was there before, in order."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGTERM, before)


def test_a_signal_waits_until_it_is_delivered(delivered):
    with deferred_signals() as deferred:
        os.kill(os.getpid(), signal.SIGTERM)
        assert deferred.pending and delivered == []
        deferred.deliver()
        assert delivered == [signal.SIGTERM] and not deferred.pending
    assert delivered == [signal.SIGTERM]


def test_a_signal_that_waits_at_the_end_of_the_block_is_delivered(delivered):
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert delivered == [signal.SIGTERM]


def test_a_second_signal_does_not_wait(delivered):
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert delivered == [signal.SIGTERM]


def test_after_an_error_the_handlers_are_those_of_before(delivered):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="broken"), deferred_signals():
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGTERM) is handler
