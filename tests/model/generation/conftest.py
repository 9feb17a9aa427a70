"""A tiny model, an engine on it, and a gate that holds an engine."""

from collections.abc import Callable, Iterator

import pytest

from model.generation.engine import Engine
from tests.model.generation import engines
from tests.model.generation.engines import Gate, start
from tests.support.graphs import EVERY_STEP, use_graphs_on_cpu
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(params=EVERY_STEP)
def each_step(request, monkeypatch) -> str:
    """The test runs once for each implementation of a step, that for GPUs as it runs on a CPU."""
    use_graphs_on_cpu(monkeypatch)
    monkeypatch.setattr(engines, "STEP", request.param)
    return request.param


@pytest.fixture
def engine(model, tokenizer) -> Iterator[Engine]:
    made = start(model, tokenizer)
    yield made
    made.stop()


@pytest.fixture
def gate() -> Iterator[Callable[[Engine], Gate]]:
    made = []

    def close(engine: Engine) -> Gate:
        made.append(Gate(engine))
        return made[-1]

    yield close
    for each in made:
        each.open()
