"""Step by step: who computes what, and who waits for whom."""

import pytest
import torch

from model.generation.queue import PRESENT_S, QueueFull, RequestQueue, slots_for
from model.generation.requests import Finished, Generation, GenerationRequest, SamplingParameters, TextPiece
from model.generation.scheduler import MOST_CHAINED, Scheduler
from model.generation.steps.native import NativeStep
from model.generation.steps.reference import ReferenceStep
from model.generation.steps.step import Segment
from model.text.tokenizer import token_bytes
from tests.support.native import needs_native
from tests.support.tiny import tiny_model, tiny_tokenizer

GREEDY = SamplingParameters(temperature=0)
CHUNK = 8


class Recorder(ReferenceStep):
    """Remembers the segments of each step."""

    def compute(self, segments):
        self.steps = [*getattr(self, "steps", []), list(segments)]
        return super().compute(segments)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(tiny_model(tiny_tokenizer()), 4)


@pytest.fixture
def slow_machine(monkeypatch) -> None:
    """Steps of several clients have a sixteenth of `prefill_chunk`, whatever the machine could compute in that time."""
    monkeypatch.setattr("model.generation.pace.SHARED_STEP_S", 0)


def schedule(step: ReferenceStep, **options) -> Scheduler:
    return Scheduler(
        step,
        RequestQueue(16, 1000),
        token_bytes=token_bytes(tiny_tokenizer()),
        end_of_text_ids=frozenset(),
        **{"prefill_chunk": CHUNK, "kv_cache": True, **options},
    )


@pytest.fixture
def scheduler(recorder) -> Scheduler:
    return schedule(recorder)


def add(scheduler: Scheduler, prompt: list[int], count: int = 20, **options) -> tuple[Generation, list]:
    events: list = []
    generation = Generation(GenerationRequest(prompt, count, GREEDY, **options), events.append)
    scheduler._queue.put([generation], room=scheduler.free_slots)
    return generation, events


def sizes(segments: list[Segment]) -> list[int]:
    return [len(segment.ids) for segment in segments]


def test_a_long_prompt_delays_running_streams_by_one_chunk_at_most(scheduler, recorder):
    _, events = add(scheduler, [5, 6])
    scheduler.step()
    _, long_events = add(scheduler, list(range(2, 32)))
    for done in range(2, 6):
        scheduler.step()
        assert sizes(recorder.steps[-1]) == [1, CHUNK - 1]  # the running stream's token, and a chunk with it
        assert len(events) == done and not long_events
    scheduler.step()
    assert sizes(recorder.steps[-1]) == [1, 30 - 4 * (CHUNK - 1)]
    assert len(long_events) == 1


def test_short_prompts_share_a_step_up_to_the_chunk(scheduler, recorder):
    for start in (2, 50, 100):
        add(scheduler, list(range(start, start + 3)))
    scheduler.step()
    assert sizes(recorder.steps[-1]) == [3, 3, 2]


def test_prompts_get_a_quarter_of_a_step_however_many_decode(recorder):
    scheduler = schedule(recorder, prefill_chunk=2)
    for start in (2, 3, 4):
        add(scheduler, [start])
        scheduler.step()
    add(scheduler, list(range(10, 20)))
    for _ in range(3):
        scheduler.step()
        assert sizes(recorder.steps[-1]) == [1, 1, 1, 1]


def test_requests_join_and_leave_at_every_step(scheduler, recorder):
    _, short = add(scheduler, [5], count=2)
    _, long = add(scheduler, [6], count=4)
    scheduler.step()
    scheduler.step()
    assert isinstance(short[-1], Finished) and not isinstance(long[-1], Finished)
    _, late = add(scheduler, [7], count=1)
    scheduler.step()
    assert isinstance(late[-1], Finished)
    assert sizes(recorder.steps[-1]) == [1, 1]


def test_a_cancelled_request_leaves_before_the_next_pass(scheduler, recorder):
    generation, events = add(scheduler, [5])
    add(scheduler, [6])
    scheduler.step()
    generation.cancel()
    scheduler.step()
    assert events[-1] == Finished("cancelled", 1, 1)
    assert sizes(recorder.steps[-1]) == [1]
    assert scheduler.free_slots == 3


def test_a_prompt_waits_for_another_that_computes_its_beginning(scheduler, recorder):
    shared = list(range(2, 42))
    add(scheduler, [*shared, 100])
    follower, _ = add(scheduler, [*shared, 101])
    for _ in range(5):
        scheduler.step()
        assert len(scheduler.running) == 1
    scheduler.step()  # the first prompt's last token; then its beginning is there
    scheduler.step()
    assert follower.cached_tokens == len(shared)
    assert sizes(recorder.steps[-1]) == [1, 1]


def test_numbers_of_a_failed_step_reach_no_other_request(scheduler, recorder):
    """A slot whose numbers are not finite is emptied before another request gets it."""
    _, events = add(scheduler, list(range(2, 10)))
    scheduler.step()
    slot = scheduler.running[0].slot
    for tensor in (*recorder.cache.keys, *recorder.cache.values):
        tensor[slot] = torch.nan
    scheduler.step()
    assert events[-1].finish_reason == "error"
    longer, shorter = add(scheduler, list(range(60, 68)), count=6), add(scheduler, [50], count=6)
    while scheduler.step():
        pass
    for _, given in (longer, shorter):
        assert given[-1].finish_reason == "length"


def test_pieces_of_text_carry_their_tokens(scheduler):
    _, events = add(scheduler, [5, 6], count=5)
    while scheduler.step():
        pass
    assert all(isinstance(event, TextPiece) for event in events[:-1])
    assert sum(len(event.token_ids) for event in events[:-1]) == 5


def test_without_cache_all_tokens_are_computed_in_each_step(recorder):
    scheduler = schedule(recorder, kv_cache=False)
    add(scheduler, list(range(2, 22)), count=3)
    while scheduler.step():
        pass
    assert [sizes(segments) for segments in recorder.steps[-2:]] == [[21], [22]]


def test_the_queue_counts_requests_and_tokens_and_what_starts_at_once():
    queue = RequestQueue(2, 10)
    make = lambda n: Generation(GenerationRequest([1] * n, 1))
    queue.put([make(3), make(3)], room=0)
    with pytest.raises(QueueFull):
        queue.put([make(1)], room=0)
    queue.put([make(1)], room=1)
    assert (len(queue), queue.tokens) == (3, 7)
    queue.clear()
    queue.put([make(100)], room=0)  # alone it may be longer than the bound
    with pytest.raises(QueueFull):
        queue.put([make(1)], room=0)
    first = queue.first()
    assert first is not None
    first.cancel()
    queue.put([make(1)], room=0)  # a canceled request makes room at once
    assert first.is_finished and queue.tokens == 1


def waiting(client: str, connection: str = "", count: int = 1) -> Generation:
    return Generation(GenerationRequest([1], count, client=client, connection=connection))


def in_order(queue: RequestQueue) -> list[Generation]:
    served = []
    while (generation := queue.first()) is not None:
        queue.remove(generation)
        served.append(generation)
    return served


def test_clients_take_turns_however_many_requests_each_sent():
    queue = RequestQueue(100, 1000)
    many = [waiting("a") for _ in range(5)]
    queue.put(many, room=0)
    later = [waiting("b"), waiting("b"), waiting("c")]
    for generation in later:
        queue.put([generation], room=0)
    assert in_order(queue) == [many[0], later[0], later[2], many[1], later[1], *many[2:]]


def test_connections_of_one_client_take_turns_and_gain_nothing_over_other_clients():
    queue = RequestQueue(100, 1000)
    first = [waiting("a", "1") for _ in range(3)]
    queue.put(first, room=0)
    second, other = waiting("a", "2"), [waiting("b"), waiting("b")]
    for generation in (second, *other):
        queue.put([generation], room=0)
    assert in_order(queue) == [first[0], other[0], second, other[1], *first[1:]]


def test_an_idle_client_saves_up_no_turns_and_a_new_connection_is_no_advantage():
    queue = RequestQueue(100, 1000)
    queue.put([waiting("a", str(i)) for i in range(4)], room=0)
    old = queue.first()
    queue.remove(old)
    for i in range(4, 8):
        queue.put([waiting("a", str(i))], room=0)
    late = waiting("a", "0")
    queue.put([late], room=0)
    order = in_order(queue)
    assert order[-1] is late
    assert [g.request.connection for g in order[:3]] == ["1", "2", "3"]


def test_a_cancelled_request_gives_its_turn_to_the_next_of_its_client():
    queue = RequestQueue(100, 1000)
    mine = [waiting("a"), waiting("a")]
    queue.put(mine, room=0)
    queue.put([waiting("b")], room=0)
    mine[0].cancel()
    assert queue.finish_interrupted() == 1
    assert queue.first() is mine[1]


def test_a_full_queue_still_takes_a_client_that_has_less_than_its_share():
    queue = RequestQueue(4, 1000)
    queue.put([waiting("a") for _ in range(4)], room=0)
    with pytest.raises(QueueFull):
        queue.put([waiting("a")], room=0)
    queue.put([waiting("b")], room=0)
    queue.put([waiting("b")], room=0)
    with pytest.raises(QueueFull):
        queue.put([waiting("b")], room=0)
    with pytest.raises(QueueFull):
        queue.put([waiting("")], room=0)


def test_long_answers_leave_a_slot_to_short_ones(recorder):
    step = Recorder(tiny_model(tiny_tokenizer()), slots_for(16))
    scheduler = schedule(step, prefill_chunk=256)
    for number in range(17):
        add(scheduler, [5, number + 2], count=70)
    short, events = add(scheduler, [7, 8], count=2)
    scheduler.step()
    assert len(scheduler.running) == 17
    assert short in [sequence.generation for sequence in scheduler.running]
    while not short.is_finished:
        scheduler.step()
    scheduler.step()
    assert len(scheduler.running) == 16  # the slot stays free for the next short one
    assert isinstance(events[-1], Finished)


def test_a_client_that_joins_is_prefilled_first_in_short_steps(recorder, slow_machine):
    step = Recorder(tiny_model(tiny_tokenizer()), 4)
    scheduler = schedule(step, prefill_chunk=64)
    for start in (2, 60):
        add(scheduler, list(range(start, start + 70)), client="a")
    scheduler.step()
    assert sizes(step.steps[-1]) == [64]  # alone: a whole chunk
    late, events = add(scheduler, [5, 6, 7], client="b")
    scheduler.step()
    assert sizes(step.steps[-1]) == [3]  # the new client's prompt by itself
    assert len(events) == 1 and not late.is_finished
    scheduler.step()
    assert sizes(step.steps[-1]) == [1, 3]  # a sixteenth of a chunk, with the other's next tokens


def test_steps_of_several_clients_have_as_many_tokens_as_a_short_time_allows(recorder, monkeypatch):
    step = Recorder(tiny_model(tiny_tokenizer()), 4)
    scheduler = schedule(step, prefill_chunk=64)
    monkeypatch.setattr("model.generation.pace.SHARED_STEP_S", 1e9)
    add(scheduler, [5, 6], client="a")
    scheduler.step()
    for client in "ab":
        add(scheduler, list(range(2, 72)), client=client)
    scheduler.step()
    assert sum(sizes(step.steps[-1])) == 64


def test_a_short_prompt_goes_before_one_client_with_many_requests_in_a_row(recorder, slow_machine):
    step = Recorder(tiny_model(tiny_tokenizer()), 4)
    scheduler = schedule(step, prefill_chunk=64)  # shared: 4 tokens
    for number in range(9):
        add(scheduler, [number, *range(5, 70)], count=1, client="many")
    scheduler.step()
    for number in range(6):
        late, events = add(scheduler, [7, 8, 9, number], count=2 + number % 2, client="one")
        scheduler.step()
        if not events:
            scheduler.step()
        assert events
        while not late.is_finished:
            scheduler.step()


def test_running_streams_go_on_at_least_every_other_step(recorder, slow_machine):
    step = Recorder(tiny_model(tiny_tokenizer()), 4)
    scheduler = schedule(step, prefill_chunk=32)
    _, events = add(scheduler, [5, 6], count=30, client="a")
    add(scheduler, list(range(2, 60)), client="b")
    for done in range(1, 7):
        scheduler.step()
        scheduler.step()
        assert len(events) >= done


def test_clients_share_the_prefill_evenly(recorder, slow_machine):
    step = Recorder(tiny_model(tiny_tokenizer()), 8)
    scheduler = schedule(step, prefill_chunk=32)
    for number in range(6):
        add(scheduler, list(range(number, number + 40)), client="a")
    add(scheduler, list(range(100, 140)), client="b")
    scheduler.step()
    own = {sequence.slot: sequence.request.client for sequence in scheduler.running}
    computed = dict.fromkeys("ab", 0)
    for _ in range(10):
        scheduler.step()
        own |= {sequence.slot: sequence.request.client for sequence in scheduler.running}
        for segment in step.steps[-1]:
            computed[own[segment.slot]] += len(segment.ids)
    assert abs(computed["a"] - computed["b"]) <= 8


def test_a_long_prompt_leaves_room_for_another_client_that_had_more_computed(recorder, slow_machine):
    step = Recorder(tiny_model(tiny_tokenizer()), 8)
    scheduler = schedule(step, prefill_chunk=64)  # shared: 8 tokens
    add(scheduler, [3, 4], count=40, client="long")
    for number in range(4):
        earlier, _ = add(scheduler, [number, *range(5, 20)], count=1, client="short")
        while not earlier.is_finished:
            scheduler.step()
    add(scheduler, list(range(100, 150)), count=1, client="long")
    scheduler.step()
    late, _ = add(scheduler, [7, 8, 9], count=1, client="short")
    for _ in range(2):
        scheduler.step()
    assert late.is_finished


def test_the_client_with_fewest_requests_is_prefilled_alone_even_if_it_had_more_computed(recorder, slow_machine):
    step = Recorder(tiny_model(tiny_tokenizer()), 8)
    scheduler = schedule(step, prefill_chunk=64)
    earlier, _ = add(scheduler, [*range(5, 30)], count=1, client="one")
    while not earlier.is_finished:
        scheduler.step()
    for number in range(3):
        add(scheduler, [number, 100], count=9, client="many")
    scheduler.step()
    late, _ = add(scheduler, [7, 8, 9], count=1, client="one")
    steps = len(step.steps)
    while not late.is_finished:
        scheduler.step()
    assert [3] in [sizes(segments) for segments in step.steps[steps:]]


def test_a_slot_stays_free_for_a_client_that_sent_a_request_lately(recorder):
    now = [0.0]
    scheduler = schedule(recorder, prefill_chunk=256)
    scheduler._queue = RequestQueue(16, 1000, clock=lambda: now[0])
    done, _ = add(scheduler, [9], count=1, client="b")
    scheduler.step()
    assert done.is_finished
    for number in range(5):
        add(scheduler, [5, number + 2], client="a")
    scheduler.step()
    assert [sequence.request.client for sequence in scheduler.running] == ["a"] * 3
    again, events = add(scheduler, [9, 8], count=1, client="b")
    scheduler.step()
    assert again.is_finished and len(events) == 2
    now[0] = PRESENT_S + 0.1
    scheduler.step()
    assert len(scheduler.running) == 4  # client b is no longer present


def test_a_server_that_warms_up_is_not_a_client_for_which_steps_are_kept_short(recorder):
    scheduler = schedule(recorder, prefill_chunk=64)
    warming, _ = add(scheduler, [9], count=1)
    scheduler.step()
    assert warming.is_finished
    add(scheduler, [*range(2, 62)], count=1, client="a")
    scheduler.step()
    assert sizes(recorder.steps[-1]) == [60]


class NativeRecorder(NativeStep):
    """Remembers the tokens that each call computes of each text."""

    def compute(self, segments):
        self.steps = [*getattr(self, "steps", []), [segment.steps for segment in segments]]
        return super().compute(segments)


@pytest.fixture
def chaining(monkeypatch) -> Scheduler:
    """A scheduler whose calls compute as many tokens of each text as they may."""
    monkeypatch.setattr("model.generation.scheduler.CHAIN_S", 1e9)
    return schedule(NativeRecorder.create(tiny_model(tiny_tokenizer()), 4))


def run_all(scheduler: Scheduler) -> list[list[int]]:
    """The tokens of each text in each call."""
    scheduler._step.steps = []
    while scheduler.step():
        pass
    return scheduler._step.steps


@needs_native
def test_texts_without_prompts_beside_them_get_several_tokens_in_a_call_up_to_the_end_of_one(chaining, monkeypatch):
    add(chaining, [5, 6, 7], 20)
    add(chaining, [5, 6, 8], 12)
    assert run_all(chaining) == [[1, 1], [8, 8], [3, 3], [8]]
    monkeypatch.setattr("model.generation.scheduler.CHAIN_S", 0.0)
    add(chaining, [5, 6, 7], 20)
    assert run_all(chaining) == [[1]] * 20


@needs_native
@pytest.mark.parametrize("other", [{"logprobs": 1}, {"allowed_token_ids": frozenset(range(2, 90))}, {"min_tokens": 20}])
def test_a_text_whose_tokens_the_step_cannot_choose_alone_gets_one_token_in_a_call_and_so_do_the_others(
    chaining, other
):
    other = {"stop_token_ids": frozenset([9]), **other} if "min_tokens" in other else other
    add(chaining, [5, 6, 7], 20)
    add(chaining, [5, 6, 8], 20, **other)
    assert all(steps == [1, 1] for steps in run_all(chaining))


@needs_native
def test_a_text_that_is_canceled_within_a_call_gets_no_further_token(chaining):
    generation, made = add(chaining, [5, 6, 7], 40)
    decode = chaining._step._session.decode

    def cancel(texts, steps, draws):
        if generation.generated_tokens > 1:
            generation.cancel()
        return decode(texts, steps, draws)

    chaining._step._session.decode = cancel
    run_all(chaining)
    *pieces, end = made
    assert [len(piece.token_ids) for piece in pieces] == [1, MOST_CHAINED, 1]
    assert end.finish_reason == "cancelled"


@needs_native
def test_the_tokens_of_a_call_come_as_one_piece_with_the_text_of_all(chaining):
    _, made = add(chaining, [5, 6, 7], 20)
    run_all(chaining)
    pieces = made[:-1]
    assert [len(piece.token_ids) for piece in pieces] == [1, 8, 8, 3]
    one_by_one = schedule(NativeRecorder.create(tiny_model(tiny_tokenizer()), 4))
    one_by_one._step.chained = lambda most, left: [1] * len(left)
    _, expected = add(one_by_one, [5, 6, 7], 20)
    run_all(one_by_one)
    assert len(expected) == 21
    assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in expected[:-1])
    assert [i for piece in pieces for i in piece.token_ids] == [i for piece in expected[:-1] for i in piece.token_ids]


@needs_native
def test_a_broken_number_within_a_call_ends_only_its_text_after_the_tokens_before_it(chaining):
    (_, broken), (_, other) = add(chaining, [5, 6, 7], 20), add(chaining, [5, 6, 8], 20)
    decode = chaining._step._session.decode

    def break_third(texts, steps, draws):
        chosen, highest = decode(texts, steps, draws)
        highest[2:, 0] = float("nan")
        return chosen, highest

    chaining.step()  # both prompts
    while not broken or not other:
        chaining.step()
    before = len(broken)
    chaining._step._session.decode = break_third
    chaining.step()
    piece, end = broken[before:]
    assert len(piece.token_ids) == 2 and end.finish_reason == "error"
    chaining._step._session.decode = decode
    run_all(chaining)
    assert other[-1].finish_reason == "length" and sum(len(piece.token_ids) for piece in other[:-1]) == 20
