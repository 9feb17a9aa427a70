"""The instruction sets that the tests of the native library run on."""

import pytest

from model.native.library import available_instructions
from tests.support.native import IS_MISSING, MISSING

INSTRUCTIONS = available_instructions()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `instructions` runs once for each instruction set of this processor."""
    if "instructions" in metafunc.fixturenames:
        missing = [pytest.mark.skip(reason=MISSING)] if IS_MISSING else []
        metafunc.parametrize("instructions", INSTRUCTIONS or [pytest.param("none", marks=missing)])


@pytest.fixture
def fastest() -> str:
    """The instruction set that a user of this machine gets."""
    if IS_MISSING:
        pytest.skip(MISSING)
    assert INSTRUCTIONS, "the native library does not load"
    return INSTRUCTIONS[-1]
