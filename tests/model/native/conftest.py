"""The instruction sets that the tests of the native library run on."""

import pytest

from model.native.build import LIBRARY
from model.native.library import available_instructions

INSTRUCTIONS = available_instructions()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `instructions` runs once for each instruction set of this processor."""
    if "instructions" in metafunc.fixturenames:
        missing = pytest.mark.skip(reason=f"no C++ compiler and no {LIBRARY.name}: install g++")
        metafunc.parametrize("instructions", INSTRUCTIONS or [pytest.param("none", marks=missing)])


@pytest.fixture
def fastest() -> str:
    """The instruction set that a user of this machine gets."""
    if not INSTRUCTIONS:
        pytest.skip(f"no C++ compiler and no {LIBRARY.name}: install g++")
    return INSTRUCTIONS[-1]
