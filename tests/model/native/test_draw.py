"""A sample of the native step is the one that `steps/draw.py` takes of the same logits, by every instruction set."""

import numpy as np
import pytest
import torch

from model.generation.steps.draw import Draw, candidates
from model.native.library import NativeModel, NativeSession
from tests.support.tiny import tiny_model, tiny_tokenizer

V, ROWS = 3001, 48
ROUNDING = 1e-5
"""Of a cumulative probability: the native step's weights are float32."""
OPTIONS = [
    {},
    {"temperature": 1e-3},
    {"temperature": 1e-40},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 2000, "temperature": 20.0},
    *({"top_k": count} for count in (1023, 1024, 1025)),  # as many as are looked at first, to find where to search
    {"temperature": 0.05, "top_p": 0.9},
    {"temperature": 0.1, "top_k": 7, "top_p": 0.8},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 300, "top_p": 0.9, "min_p": 0.02},
]


@pytest.fixture(scope="module")
def model():
    """Every second token has the weights, and so the logit, of the one before it."""
    made = tiny_model(tiny_tokenizer(), vocab_size=V)
    made.lm_head.weight[1::2] = made.lm_head.weight[:-1:2]
    return made


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_is_that_of_the_reference(model, instructions, options, threads):
    native = NativeModel(model, instructions=instructions)
    session = NativeSession(native, 1, threads=threads)
    ids = np.random.default_rng(1).integers(2, V, ROWS)
    uniform = [0.0, 1 - 2**-53, *np.random.default_rng(2).random(ROWS - 2)]
    draws = [
        Draw(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options, "uniform": u}) for u in uniform
    ]
    logits, chosen, _ = session.step_over([(0, 0, ROWS, ROWS)], [ids], logits=True, draws=np.array(draws))
    for row, token, draw in zip(torch.from_numpy(logits), chosen, draws, strict=True):
        kept, weights = candidates(row, draw)
        assert token in kept
        place = int(np.searchsorted(kept, token))
        sums = np.concatenate([[0.0], weights.cumsum()]) / weights.sum()
        assert weights[place] > 0
        assert sums[place] - ROUNDING <= draw.uniform <= sums[place + 1] + ROUNDING


def test_rows_are_chosen_each_in_its_own_way(model, fastest):
    native, ids = NativeModel(model, instructions=fastest), np.arange(2, 2 + ROWS)
    greedy = NativeSession(native, 1).step_over([(0, 0, ROWS, ROWS)], [ids], logits=False)[1]
    draws = np.zeros((ROWS, len(Draw._fields)))
    draws[::3] = Draw(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.999)
    mixed = NativeSession(native, 1).step_over([(0, 0, ROWS, ROWS)], [ids], logits=False, draws=draws)[1]
    is_drawn = np.arange(ROWS) % 3 == 0
    assert np.array_equal(mixed[~is_drawn], greedy[~is_drawn])
    assert (mixed[is_drawn] > V // 2).all()  # the last ids, in which the cumulative distribution ends


def test_a_row_of_broken_numbers_is_told_by_its_highest_logit(model, fastest):
    model.lm_head.weight[7] = torch.nan
    try:
        native = NativeModel(model, instructions=fastest)
    finally:
        model.lm_head.weight[7] = model.lm_head.weight[6]
    draws = np.array([Draw(1.0, 5, 0.9, 0.1, 0.5)])
    _, _, highest = NativeSession(native, 1).step_over([(0, 0, 3, 1)], [np.arange(3)], logits=False, draws=draws)
    assert np.isnan(highest).all()
