"""Engines for tests: what one is asked, what it says, and what `generate()` would have said."""

import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch

from model.generation.engine import Engine
from model.generation.requests import Finished, Generation, GenerationRequest, SamplingParameters, TextPiece
from tests.support.tiny import CONTEXT, tiny_model

GREEDY = SamplingParameters(temperature=0)
PROMPT = [40, 90, 17, 200]


STEP = "auto"
"""The implementation that `start` takes; the fixture `each_step` sets it to one after the other."""


def start(model, tokenizer, **options) -> Engine:
    """An engine that no token stops, so that lengths are known: a model with random weights stops anywhere."""
    defaults = {"max_batch_size": 4, "max_queue": 64, "end_of_text_ids": frozenset(), "step": STEP}
    return Engine(model, tokenizer, **{**defaults, **options})


class StepHook:
    """Calls `before` and `after` with the segments of each step of an engine, also after a restart, until removed."""

    _active: ClassVar[list["StepHook"]] = []

    def __init__(
        self, engine: Engine, before: Callable = lambda segments: None, after: Callable = lambda segments: None
    ):
        self._engine, self._before, self._after = weakref.ref(engine), before, after
        StepHook._active.append(self)
        kind = type(engine._step)
        if not hasattr(kind.compute, "is_hooked"):
            kind.compute = self._hooked(kind.compute)

    @staticmethod
    def _hooked(compute: Callable) -> Callable:
        def with_hooks(step, segments):
            mine = [hook for hook in StepHook._active if (engine := hook._engine()) and engine._step is step]
            for hook in mine:
                hook._before(segments)
            outputs = compute(step, segments)
            for hook in mine:
                hook._after(segments)
            return outputs

        with_hooks.is_hooked = True
        return with_hooks

    def remove(self) -> None:
        if self in StepHook._active:
            StepHook._active.remove(self)


class Gate:
    """Holds an engine before each step until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        self._hook = StepHook(engine, before=self._wait)

    def _wait(self, segments: object) -> None:
        self.reached.set()
        assert self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()
        self._hook.remove()


def tokens(generation: Generation) -> list[int]:
    return [token for event in generation if isinstance(event, TextPiece) for token in event.token_ids]


def last(generation: Generation) -> Finished:
    *_, event = generation
    assert isinstance(event, Finished)
    return event


_references: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def reference(model, prompt: list[int], count: int, **options) -> list[int]:
    """Tokens of `generate()`: greedy ones are computed once, as each implementation of a step is held to the same."""
    arguments = {"do_sample": False, **options}
    known = _references.setdefault(model, {})
    key = (tuple(prompt), count, *sorted(arguments.items()))
    if arguments["do_sample"] or key not in known:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=count, **arguments)
        known[key] = made[0, len(prompt) :].tolist()
    return list(known[key])


def repeating_model(tokenizer, **shape):
    """Tied random weights mostly repeat what they read."""
    return tiny_model(tokenizer, tie_word_embeddings=True, head_dim=16, **shape)


def requests_of_all_kinds() -> list[GenerationRequest]:
    """With prompts that share a beginning or not, up to the end of the context."""
    numbers, made = random.Random(5), []
    for number in range(24):
        length = numbers.choice([1, 4, 20, 50])
        prompt = [numbers.randrange(2, 40) for _ in range(length)] if number % 3 else [*range(30, 60), number + 2]
        sampling = SamplingParameters(
            temperature=numbers.choice([0.0, 0.2, 0.7, 1.2]),
            top_k=numbers.choice([0, 20]),
            top_p=numbers.choice([1.0, 0.9]),
            seed=number,
        )
        count = numbers.choice([1, 17, 40, CONTEXT])
        made.append(GenerationRequest(prompt, min(count, CONTEXT - len(prompt)), sampling))
    made[3] = replace(made[3], logprobs=2)
    made[7] = replace(made[7], sampling=replace(made[7].sampling, frequency_penalty=0.3))
    made[9] = replace(made[9], min_tokens=5, stop_token_ids=frozenset(range(2, 30)))
    made[11] = replace(made[11], allowed_token_ids=frozenset(range(2, 90)))
    return made


def run(engine: Engine, asked: list[GenerationRequest]) -> list[tuple]:
    """Text, tokens, log-probabilities and end of each answer."""
    found = []
    for generation in [engine.submit(request) for request in asked]:
        *pieces, end = generation
        assert all(isinstance(piece, TextPiece) for piece in pieces) and isinstance(end, Finished)
        ids = [token for piece in pieces for token in piece.token_ids]
        scores = [score for piece in pieces for score in piece.logprobs]
        found.append(("".join(piece.text for piece in pieces), ids, scores, replace(end, cached_tokens=0)))
    return found
