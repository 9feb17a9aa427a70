"""Engines for tests: what one is asked, what it says, and what `generate()` would have said."""

import threading

import torch

from model.generation.engine import Engine
from model.generation.requests import Finished, Generation, SamplingParameters, TextPiece

GREEDY = SamplingParameters(temperature=0)
PROMPT = [40, 90, 17, 200]


def start(model, tokenizer, **options) -> Engine:
    """An engine that no token stops, so that lengths are known: a model with random weights stops anywhere."""
    return Engine(model, tokenizer, **{"max_batch_size": 4, "end_of_text_ids": frozenset(), **options})


class Gate:
    """Holds an engine at each forward pass until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        self._handle = engine.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.reached.set()
        assert self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()
        self._handle.remove()


def tokens(generation: Generation) -> list[int]:
    return [token for event in generation if isinstance(event, TextPiece) for token in event.token_ids]


def last(generation: Generation) -> Finished:
    *_, event = generation
    assert isinstance(event, Finished)
    return event


def reference(model, prompt: list[int], count: int, **options) -> list[int]:
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, **{"do_sample": False, **options})
    return made[0, len(prompt) :].tolist()
