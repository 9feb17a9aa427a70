"""A tiny model, an engine on it, and a gate that holds an engine."""

from collections.abc import Callable, Iterator

import pytest

from model.generation.engine import Engine
from tests.model.generation.engines import Gate, start
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


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
