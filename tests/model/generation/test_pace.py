"""When a full queue has room again, by the tokens of all admitted requests; the size of several clients' steps."""

import pytest

from model.generation.pace import NEW_SHARE, SHARED_STEP_S, StepBudget
from model.generation.requests import Beams, EngineBusy, GenerationRequest
from tests.model.generation.engines import GREEDY, PROMPT, last, start

NEW = 1 / 64
"""Seconds per token that a new engine expects."""


def search(width: int, max_tokens: int) -> list[GenerationRequest]:
    return [GenerationRequest(PROMPT, max_tokens, GREEDY, beams=Beams(width, rank)) for rank in range(width)]


def retry_after(engine) -> int:
    with pytest.raises(EngineBusy) as refusal:
        engine.submit_all(search(8, 40), lambda *_: None)
    return refusal.value.retry_after_s


@pytest.mark.parametrize("slots", [1, 2])
def test_a_beam_search_counts_as_the_sequences_of_its_beams(model, tokenizer, gate, slots):
    engine = start(model, tokenizer, max_batch_size=slots, max_queue=8)
    held = gate(engine)
    engine.submit_all(search(8, 64), lambda *_: None)
    assert held.reached.wait(30)
    assert retry_after(engine) == 8 * 64 * NEW / slots
    held.open()
    engine.stop()


def test_its_parts_do_not_make_other_answers_look_short(model, tokenizer):
    engine = start(model, tokenizer)
    pace = engine._scheduler.pace
    done: list[object] = []
    engine.submit_all(search(4, 20), lambda index, event: done.append(event))
    assert last(engine.submit(GenerationRequest(PROMPT, 64, GREEDY))).generated_tokens == 64
    assert pace.answer_tokens == 64 and 0 < pace.token_seconds < 1
    engine.stop()


def test_long_answers_are_expected_to_be_as_long_as_the_former_ones(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=1, max_queue=8)
    held = gate(engine)
    running = engine.submit(GenerationRequest(PROMPT, 90, GREEDY))
    assert held.reached.wait(30)
    waiting = [engine.submit(GenerationRequest(PROMPT, count, GREEDY)) for count in (90, 1)]
    assert engine._scheduler.pace.seconds([running, *waiting], 1) == NEW * (64 + 64 + 1)
    held.open()
    engine.stop()


def test_a_step_of_several_clients_has_a_sixteenth_until_the_speed_is_known():
    assert StepBudget(256).shared == 16
    assert StepBudget(10).shared == 1


def test_a_step_of_several_clients_has_the_tokens_of_a_short_time_in_whole_tiles():
    budget = StepBudget(256)
    budget.count(16, 16 / 40 * SHARED_STEP_S * NEW_SHARE)  # the moving average is now 40 tokens in that time
    assert budget.shared == 32


@pytest.mark.parametrize(("per_second", "shared"), [(1e9, 256), (100, 16)])
def test_a_step_of_several_clients_is_at_least_a_sixteenth_and_at_most_the_whole(per_second, shared):
    budget = StepBudget(256)
    for _ in range(100):
        budget.count(256, 256 / per_second)
    assert budget.shared == shared


def test_steps_with_less_than_was_allowed_do_not_make_later_ones_shorter():
    budget = StepBudget(256)
    for _ in range(100):
        budget.count(256, SHARED_STEP_S)
    for _ in range(100):
        budget.count(10, SHARED_STEP_S / 2)
    assert budget.shared > 200
    for _ in range(100):
        budget.count(256, 4 * SHARED_STEP_S)
    assert budget.shared == 64


def test_the_steps_grow_to_what_the_time_allows_where_a_step_has_a_fixed_cost():
    def seconds(tokens: int) -> float:
        return 0.001 + tokens * 4e-5

    budget = StepBudget(256)
    for _ in range(100):
        budget.count(budget.shared, seconds(budget.shared))
    assert 0.8 * SHARED_STEP_S < seconds(budget.shared) <= SHARED_STEP_S
