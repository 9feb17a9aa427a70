"""The sampler's distribution is that of transformers' own logits processors, and seeds make it reproducible."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.errors import PipelineError
from model.generation.requests import SamplingParameters
from model.generation.sampler import Sampler, score_rows, token_logprobs
from model.generation.steps.draw import candidates

V = 50
CPU = torch.device("cpu")
PROMPT = [3, 7, 7, 11]


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def draws(parameters: SamplingParameters, count: int = 40) -> list[int]:
    sampler = Sampler(parameters, PROMPT, V, CPU)
    return [sampler.next(logits(step)) for step in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.999, "temperature": 30.0},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
        {"top_k": V + 1},
        {"logit_bias": {4: 5.0, 9: -100.0}, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [V, 1000], ids=["few tokens", "more than the candidates"])
def test_probabilities_equal_those_of_transformers_processors(options, vocab_size):
    parameters = SamplingParameters(**options)
    scores_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty)]
    biases = [[[token], bias] for token, bias in parameters.logit_bias.items()]
    processors += [SequenceBiasLogitsProcessor(biases)] if biases else []
    processors += [TemperatureLogitsWarper(parameters.temperature)]
    processors += [TopKLogitsWarper(parameters.top_k)] if parameters.top_k else []
    processors += [TopPLogitsWarper(parameters.top_p)] if parameters.top_p < 1 else []
    processors += [MinPLogitsWarper(parameters.min_p)] if parameters.min_p else []
    expected = scores_V[None]
    for processor in processors:
        expected = processor(torch.tensor([PROMPT]), expected)
    sampler = Sampler(parameters, PROMPT, vocab_size, CPU)
    ids, probabilities = candidates(sampler.scores(scores_V), sampler.draw())
    mine = torch.zeros(vocab_size, dtype=torch.double)
    mine[ids] = torch.from_numpy(probabilities / probabilities.sum())
    torch.testing.assert_close(mine.float(), expected[0].softmax(-1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("top_k", [0, 7, 300])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.999999])
def test_the_candidates_are_those_of_a_stable_sort(temperature: float, top_k: int, top_p: float) -> None:
    """With many equal logits, of which the first by id are kept, and some that are minus infinity."""
    scores_V = (torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 8).round() / 2
    scores_V[100:110] = -torch.inf
    sampler = Sampler(SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p), [], 1000, CPU)
    ids, weights = candidates(scores_V, sampler.draw())
    expected_V = ((scores_V.double() - scores_V.max()) / temperature).exp()
    sorted_C, order = expected_V.sort(descending=True, stable=True)
    sorted_C = sorted_C[: top_k or None]
    kept = int((sorted_C.cumsum(0) - sorted_C < top_p * sorted_C.sum()).sum())
    assert ids.tolist() == sorted(order[:kept].tolist())
    torch.testing.assert_close(torch.from_numpy(weights), expected_V[torch.from_numpy(ids)], rtol=1e-12, atol=0)


def test_draws_come_as_often_as_their_probabilities_say():
    scores_V, count = logits(), 20_000
    sampler = Sampler(SamplingParameters(seed=0, top_k=6), [], V, CPU)
    found = torch.bincount(torch.tensor([sampler.next(scores_V) for _ in range(count)]), minlength=V) / count
    expected = TopKLogitsWarper(6)(torch.zeros(1, 0, dtype=torch.long), scores_V[None])[0].softmax(-1)
    # Five standard deviations of a binomial count: a right sampler misses them once in a million runs.
    assert torch.all((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt())


def test_presence_and_frequency_penalties_count_what_was_generated_but_not_the_prompt():
    scores_V = torch.zeros(V)
    scores_V[[3, 20, 21]] = torch.tensor([5.0, 4.5, 4.0])
    sampler = Sampler(SamplingParameters(temperature=0, presence_penalty=0.6, frequency_penalty=0.3), [3, 3], V, CPU)
    # 3: 5.0, then 5 - 0.9 = 4.1; 20: 4.5, then 3.6; 3 again: 5 - 1.2 = 3.8; 21: 4.0, then 3.1; 3: 3.5; 20: 3.6
    assert [sampler.next(scores_V) for _ in range(6)] == [3, 20, 3, 21, 3, 20]


def test_forbidden_tokens_are_not_chosen():
    sampler = Sampler(SamplingParameters(temperature=0), [], V, CPU)
    first = sampler.next(logits())
    assert sampler.next(logits(), [first]) == int(logits().argsort()[-2])


def test_log_probabilities_name_the_token_and_the_most_likely_ones():
    rows_RV = torch.stack([logits(0), logits(1)])
    found = token_logprobs(rows_RV, [4, 9], 3)
    for row, token, score in zip(rows_RV.log_softmax(-1), [4, 9], found, strict=True):
        assert score.token_id == token and score.logprob == pytest.approx(row[token].item())
        assert [i for i, _ in score.top] == row.argsort(descending=True)[:3].tolist()
    assert [score.top for score in token_logprobs(rows_RV, [4, 9], 0)] == [(), ()]


def test_rows_that_are_scored_together_have_the_bits_of_each_alone():
    rows_V = [logits(number) for number in range(40)]
    together = [row.of(7) for row in score_rows(rows_V, 3)]
    assert together == [score_rows([row_V], 3)[0].of(7) for row_V in rows_V]
    assert together == token_logprobs(torch.stack(rows_V), [7] * 40, 3)


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
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {3: 101.0}},
        {"logit_bias": {3: math.nan}},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_a_parameter_out_of_range_is_named(wrong):
    with pytest.raises(PipelineError, match=next(iter(wrong))):
        SamplingParameters(**wrong)
