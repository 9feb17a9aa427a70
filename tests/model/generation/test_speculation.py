"""Proposed tokens change how many steps a text takes, and nothing else."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from model.errors import PipelineError
from model.generation import scheduler, sequence
from model.generation.requests import GenerationRequest, SamplingParameters, TextPiece
from model.generation.speculation.length import proposal_length
from model.generation.speculation.repetition import FIRST_RATE, Proposer
from model.generation.steps.choose import available_steps, step_class
from model.generation.steps.draw import Draw
from model.generation.steps.step import Segment
from model.weights import int4, int8
from tests.model.generation.engines import GREEDY, StepHook, repeating_model, requests_of_all_kinds, run, start, tokens
from tests.support.native import needs_native
from tests.support.tiny import CONTEXT, tiny_model, tiny_tokenizer

MOST = 8


def test_what_followed_the_last_occurrence_is_proposed():
    proposer = Proposer([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert proposer.propose(3) == [4, 5, 9]
    proposer.extend([4])
    assert proposer.propose(2) == [5, 9]
    proposer.extend([7])
    assert proposer.propose(2) == []
    proposer.extend([2, 3, 4])
    assert proposer.propose(1) == [7]  # the later occurrence, not the first


def test_a_text_that_goes_round_in_a_circle_is_continued_to_any_length():
    assert Proposer([8, 5, 6, 5, 6, 5, 6]).propose(5) == [5, 6, 5, 6, 5]
    assert Proposer([7] * 4).propose(3) == [7] * 3


@pytest.mark.parametrize("ids", [[1], [1, 2], [1, 1], [1, 2, 3]], ids=str)
def test_a_text_without_repetition_has_no_proposal(ids):
    assert Proposer(ids).propose(4) == []


def test_the_rate_is_that_of_right_proposals_and_none_does_not_count():
    proposer = Proposer([1, 2, 3])
    proposer.extend([4])
    assert proposer.rate == FIRST_RATE
    right, wrong = Proposer([1, 2, 3, 4, 1, 2, 3]), Proposer([1, 2, 3, 4, 1, 2, 3])
    right.extend([4])
    wrong.extend([5])
    assert wrong.rate < FIRST_RATE < right.rate


def test_more_is_proposed_the_surer_it_is_and_the_fewer_texts_run():
    rates = [0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0]
    by_rate = [proposal_length(rate, 1, MOST) for rate in rates]
    assert by_rate == sorted(by_rate) and by_rate[0] == 0 and by_rate[-1] == MOST
    by_texts = [proposal_length(0.9, texts, MOST) for texts in (1, 2, 4, 8, 16, 64)]
    assert by_texts == sorted(by_texts, reverse=True) and by_texts[-1] == 0
    assert proposal_length(0.5, 4, MOST) == 0


class Mistaken(Proposer):
    """Has one wrong token in each proposal, at any place."""

    def propose(self, count):
        proposal = super().propose(count)
        if proposal:
            proposal[random.Random(len(self._ids)).randrange(len(proposal))] = 2
        return proposal


@pytest.fixture(params=["as it pays", "always", "with mistakes"])
def proposals(request, monkeypatch) -> None:
    if request.param != "as it pays":
        monkeypatch.setattr(sequence, "proposal_length", lambda rate, texts, most: most)
    if request.param == "with mistakes":
        monkeypatch.setattr(sequence, "Proposer", Mistaken)


def stopped_within(asked: list[GenerationRequest], answers: list[tuple]) -> list[GenerationRequest]:
    """The same with a stop string or a stop token from within each answer."""
    found = []
    for number, (request, (text, ids, _, _)) in enumerate(zip(asked, answers, strict=True)):
        if len(ids) > 8:
            stop = {"stop": (text[6:9],)} if number % 2 else {"stop_token_ids": frozenset(ids[5:6])}
            found.append(replace(request, **stop, min_tokens=number % 5, include_stop=number % 3 == 0))
    return found


@needs_native
@pytest.mark.usefixtures("proposals")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_answers_are_the_same_with_proposals_and_without(tokenizer, kind):
    model = repeating_model(tokenizer)
    if kind in ("int8", "int4"):
        model = {"int8": int8, "int4": int4}[kind].quantize(model)
    elif kind == "bfloat16":
        model = model.bfloat16()
    plain = start(model, tokenizer, step="native", speculative_tokens=0)
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST)
    asked = requests_of_all_kinds()
    expected = run(plain, asked)
    assert run(engine, asked) == expected
    stopped = stopped_within(asked, expected)
    expected = run(plain, stopped)
    assert sum(end.finish_reason == "stop" for *_, end in expected) > 8
    assert run(engine, stopped) == expected
    made, without = engine.stats(), plain.stats()
    assert 0 < made.accepted_tokens_total < made.proposed_tokens_total
    assert without.proposed_tokens_total == 0
    assert made.generated_tokens_total == without.generated_tokens_total
    engine.stop()
    plain.stop()


@needs_native
def test_a_repeating_text_takes_fewer_steps_and_several_texts_of_a_prompt_stay_themselves(tokenizer, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_CHAINED", 1)
    model, steps = repeating_model(tokenizer), {}
    asked = [
        GenerationRequest([5, 6, 7] * 6, 60, SamplingParameters(temperature=temperature, seed=seed))
        for seed, temperature in enumerate([0.0, 0.1, 0.1, 0.4])
    ]
    answers = []
    for most in (0, MOST):
        engine = start(model, tokenizer, step="native", speculative_tokens=most, max_batch_size=1)
        steps[most] = 0

        def count(segments, most=most):
            steps[most] += 1

        hook = StepHook(engine, after=count)
        answers.append(run(engine, asked))
        hook.remove()
        engine.stop()
    assert answers[0] == answers[1]
    assert steps[0] == 4 * 60
    assert steps[MOST] < steps[0] / 2


@needs_native
def test_a_canceled_text_ends_within_its_answer_and_frees_its_slot(tokenizer):
    model = repeating_model(tokenizer)
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST)
    asked = [GenerationRequest([5, 6, 7, number], CONTEXT - 4, GREEDY) for number in range(8, 14)]
    expected = [tokens(engine.submit(request)) for request in asked]
    made: dict[int, list] = {}
    generations = []

    def deliver(number, event):
        made.setdefault(number, []).append(event)
        if number % 2 and sum(len(piece.token_ids) for piece in made[number] if isinstance(piece, TextPiece)) >= 10:
            generations[number].cancel()

    generations += engine.submit_all(asked, deliver)
    deadline = time.monotonic() + 60
    while not all(generation.is_finished for generation in generations) and time.monotonic() < deadline:
        time.sleep(0.01)
    for number, ids in enumerate(expected):
        *pieces, end = made[number]
        got = [token for piece in pieces for token in piece.token_ids]
        if number % 2:
            assert end.finish_reason == "cancelled" and 10 <= len(got) <= 10 + MOST
        assert got == (ids[: len(got)] if number % 2 else ids)
    assert engine.stats().running == 0
    engine.stop()


@needs_native
def test_memory_of_rejected_tokens_is_freed(tokenizer, monkeypatch):
    monkeypatch.setattr(sequence, "proposal_length", lambda rate, texts, most: most)
    monkeypatch.setattr(sequence, "Proposer", Mistaken)
    engine = start(repeating_model(tokenizer), tokenizer, step="native", speculative_tokens=MOST, max_batch_size=1)
    reached, held = [], []

    def look(segments):
        (segment,) = segments
        held.append((engine._step.cache_bytes(0), segment.start))
        reached.append(segment.start + len(segment.ids))

    hook = StepHook(engine, before=look)
    for length in range(40, 60):
        tokens(engine.submit(GenerationRequest([length + 2] * 30, length, GREEDY)))
    hook.remove()
    page, page_bytes = engine._step.page_tokens, engine._step.page_tokens * engine._step.bytes_per_token
    assert any(first > page >= start > 0 for first, (_, start) in zip(reached, held[1:], strict=False))
    assert all(found == -(-start // page) * page_bytes for found, start in held if start)
    engine.stop()


@needs_native
def test_a_step_that_fails_once_changes_no_answer(tokenizer):
    model, asked = repeating_model(tokenizer), requests_of_all_kinds()
    plain = start(model, tokenizer, step="native", speculative_tokens=0)
    expected = run(plain, asked)
    plain.stop()
    engine = start(model, tokenizer, step="native", speculative_tokens=MOST)
    numbers = random.Random(3)

    def fail(segments):
        if len(segments) > 1 and numbers.random() < 0.3:
            raise RuntimeError("a step that fails")

    hook = StepHook(engine, before=fail)
    assert run(engine, asked) == expected
    hook.remove()
    engine.stop()


@pytest.mark.parametrize("options", [{"step": "reference"}, {"kv_cache": False}], ids=str)
def test_a_step_whose_rounding_depends_on_its_company_gets_no_proposals(tokenizer, options):
    engine = start(repeating_model(tokenizer), tokenizer, **{"speculative_tokens": MOST, **options})
    tokens(engine.submit(GenerationRequest([5, 6, 7] * 6, 40, GREEDY)))
    assert engine.stats().proposed_tokens_total == 0
    engine.stop()


@pytest.mark.parametrize("step", available_steps(tiny_model(tiny_tokenizer())))
def test_a_step_chooses_a_token_after_each_row(tokenizer, step):
    """The interface, for every implementation: the tokens are those of one row after the other."""
    made = step_class(step).create(tiny_model(tokenizer), 3)
    ids, draws = np.arange(3, 33), [Draw(1.2, 0, 0.95, 0.0, uniform) for uniform in np.linspace(0.01, 0.99, 30)]
    for chosen in ((), draws):
        expected: list = []
        for at in range(30):
            (output,) = made.compute([Segment(0, at, ids[at : at + 1], "token", tuple(chosen[at : at + 1]))])
            expected += output.tokens
        made.compute([Segment(1, 0, ids[:20], "none")])
        outputs = made.compute(
            [
                Segment(1, 20, ids[20:28], "token", tuple(chosen[23:28]), 5),
                Segment(2, 0, ids[:9], "last", tuple(chosen[8:9])),
                Segment(0, 0, ids[:4], "none"),
            ]
        )
        assert [list(output.tokens) for output in outputs] == [expected[23:28], expected[8:9], []]


@needs_native
def test_a_chain_chooses_the_tokens_of_one_step_after_the_other(tokenizer):
    made = step_class("native").create(tiny_model(tokenizer), 3)
    draws = [Draw(1.2, 0, 0.95, 0.0, uniform) for uniform in np.linspace(0.01, 0.99, 8)]
    start, of_draws = np.arange(3, 33), ((), tuple(draws), ())
    made.compute([Segment(slot, 0, start[: 20 + slot], "none") for slot in range(3)])
    expected: list = [[], [], []]
    for slot, chosen in enumerate(of_draws):
        token = start[20 + slot]
        for at in range(8):
            ids = np.array([token])
            (output,) = made.compute([Segment(slot, 20 + slot + at, ids, "token", chosen[at : at + 1])])
            (token,) = output.tokens
            expected[slot].append(token)
    segments = [
        Segment(slot, 20 + slot, start[20 + slot : 21 + slot], "token", of_draws[slot], steps=8) for slot in range(3)
    ]
    assert [list(output.tokens) for output in made.compute(segments)] == expected
    made.compute([Segment(0, 0, np.full(CONTEXT - 3, 5), "none")])
    with pytest.raises(PipelineError, match="behind the context"):
        made.compute([Segment(0, CONTEXT - 3, start[:1], "token", steps=8)])


@needs_native
@pytest.mark.parametrize("stops", [False, True])
def test_answers_are_the_same_whatever_a_call_computes_at_once(tokenizer, monkeypatch, stops):
    model, answers = tiny_model(tokenizer), {}
    asked = requests_of_all_kinds()
    for most in (1, 8):
        monkeypatch.setattr(scheduler, "MOST_CHAINED", most)
        monkeypatch.setattr(scheduler, "CHAIN_S", 1e9)
        engine = start(model, tokenizer, step="native", speculative_tokens=0)
        calls: list = []
        hook = StepHook(engine, after=calls.append)
        if stops and most == 1:
            asked = stopped_within(asked, run(engine, asked))
        answers[most] = run(engine, asked), len(calls)
        hook.remove()
        engine.stop()
    assert answers[1][0] == answers[8][0]
    assert answers[8][1] < answers[1][1]
