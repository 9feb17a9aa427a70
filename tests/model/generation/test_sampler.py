"""The sampler's distribution is that of transformers' own logits processors, and seeds make it reproducible."""

import math

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.errors import PipelineError
from model.generation.requests import SamplingParameters
from model.generation.sampler import Sampler

V = 50
CPU = torch.device("cpu")
PROMPT = [3, 7, 7, 11]


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def draws(parameters: SamplingParameters, count: int = 40) -> list[int]:
    sampler = Sampler(parameters, PROMPT, V, CPU)
    return [sampler.next(logits(step)) for step in range(count)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(1.0, 0, 1.0, 1.0), (0.7, 0, 1.0, 1.0), (1.5, 5, 1.0, 1.0), (1.0, 0, 0.8, 1.0), (1.3, 20, 0.9, 1.4)],
)
def test_draws_equal_those_of_transformers_processors(temperature, top_k, top_p, penalty):
    mine = draws(SamplingParameters(temperature, top_k, top_p, penalty, seed=5))
    processors = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    generator, ids = torch.Generator().manual_seed(5), list(PROMPT)
    for step in range(len(mine)):
        scores = logits(step)[None]
        for processor in processors:
            scores = processor(torch.tensor([ids]), scores)
        ids.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
    assert mine == ids[len(PROMPT) :]


def test_temperature_zero_takes_the_most_likely_token():
    assert draws(SamplingParameters(temperature=0)) == [int(logits(step).argmax()) for step in range(40)]


def test_the_repetition_penalty_holds_when_greedy_too():
    sampler = Sampler(SamplingParameters(temperature=0, repetition_penalty=1000.0), [], V, CPU)
    drawn = [sampler.next(logits().abs()) for _ in range(V)]
    assert sorted(drawn) == list(range(V))


def test_one_seed_gives_one_sequence_and_no_seed_gives_another_each_time():
    assert draws(SamplingParameters(seed=1)) == draws(SamplingParameters(seed=1))
    assert draws(SamplingParameters(seed=1)) != draws(SamplingParameters(seed=2))
    assert draws(SamplingParameters()) != draws(SamplingParameters())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draws(SamplingParameters())
    assert torch.equal(before, torch.get_rng_state())


def test_top_p_near_zero_and_top_k_of_one_are_greedy():
    greedy = draws(SamplingParameters(temperature=0))
    assert draws(SamplingParameters(top_p=1e-9)) == greedy
    assert draws(SamplingParameters(top_k=1)) == greedy


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    broken = logits()
    broken[4] = bad
    with pytest.raises(ValueError, match="highest logit"):
        Sampler(SamplingParameters(temperature=temperature), [], V, CPU).next(broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_a_parameter_out_of_range_is_named(wrong):
    with pytest.raises(PipelineError, match=next(iter(wrong))):
        SamplingParameters(**wrong)
