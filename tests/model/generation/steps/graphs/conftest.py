"""What the tests of the graphs step share."""

import pytest

from model.generation.steps.graphs.passes import Passes


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of each pass that is launched."""
    launched: list[int] = []
    launch = Passes.launch
    monkeypatch.setattr(
        Passes, "launch", lambda self, rows, *more: launched.append(len(rows)) or launch(self, rows, *more)
    )
    return launched
