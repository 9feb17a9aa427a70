"""An engine's queue and its life: what waits, what is canceled, and what a failure, a death or a hang does to whom."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import model.generation.engine as engine_module
from model.errors import PipelineError
from model.generation.requests import EngineBusy, EngineStopped, Finished, GenerationRequest, TextPiece
from model.generation.steps.step import Segment
from tests.model.generation.engines import GREEDY, PROMPT, StepHook, last, reference, start, tokens
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("each_step")


def test_several_requests_are_admitted_together_or_not_at_all(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=1, max_queue=2)
    held = gate(engine)
    engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    assert held.reached.wait(30)
    events: list[tuple[int, object]] = []
    with pytest.raises(EngineBusy):
        engine.submit_all([GenerationRequest(PROMPT, 2, GREEDY)] * 3, lambda i, event: events.append((i, event)))
    assert engine.stats().waiting == 0
    generations = engine.submit_all(
        [GenerationRequest(PROMPT, n + 1, GREEDY) for n in range(2)], lambda i, event: events.append((i, event))
    )
    held.open()
    while not all(generation.is_finished for generation in generations):
        time.sleep(0.01)
    engine.stop()
    assert [i for i, event in events if isinstance(event, TextPiece)] == [0, 1, 1]


def test_a_full_queue_refuses_and_takes_again_once_it_is_answered(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=1, max_queue=2)
    held = gate(engine)
    running = engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    assert held.reached.wait(30)
    waiting = [engine.submit(GenerationRequest(PROMPT, 2, GREEDY)) for _ in range(2)]
    with pytest.raises(EngineBusy) as refusal:
        engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    assert refusal.value.retry_after_s >= 1
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (1, 2, 2 * len(PROMPT))
    waiting[0].cancel()  # leaves its place at once
    waiting.append(engine.submit(GenerationRequest(PROMPT, 2, GREEDY)))
    held.open()
    assert [last(g).finish_reason for g in (running, *waiting)] == ["length", "cancelled", "length", "length"]
    engine.stop()


def test_the_queue_is_bounded_by_tokens_too(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=1, max_queue_tokens=50)
    held = gate(engine)
    engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    assert held.reached.wait(30)
    first = engine.submit(GenerationRequest([3] * 70, 2, GREEDY))  # an empty queue takes any request that can run
    with pytest.raises(EngineBusy):
        engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    held.open()
    assert last(first).finish_reason == "length"
    engine.stop()


def test_requests_that_never_fit_together_are_refused_for_good(model, tokenizer):
    engine = start(model, tokenizer, max_batch_size=2, max_queue=2, max_queue_tokens=20)
    for count, length, names in ((5, 1, "5 texts"), (3, 7, "21 tokens")):
        with pytest.raises(PipelineError, match=names):
            engine.submit_all([GenerationRequest([3] * length, 1, GREEDY)] * count, lambda i, event: None)
    assert all(last(engine.submit(GenerationRequest([3] * 70, 1, GREEDY))).finish_reason == "length" for _ in range(2))
    engine.stop()


def test_a_cancelled_request_frees_its_slot_within_two_steps(engine, gate):
    held = gate(engine)
    generation = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    assert held.reached.wait(30)
    generation.cancel()
    held.open()
    assert last(generation) == Finished("cancelled", len(PROMPT), 1)
    assert engine.stats().running == 0
    assert engine.stats().cancelled_total == 1


def test_a_request_whose_time_is_up_says_so_even_while_it_waits(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=1)
    held = gate(engine)
    running = engine.submit(GenerationRequest(PROMPT, 60, GREEDY, queue_timeout_s=0.01))
    assert held.reached.wait(30)
    late = [
        engine.submit(GenerationRequest(PROMPT, 60, GREEDY, timeout_s=0)),
        engine.submit(GenerationRequest(PROMPT, 60, GREEDY, queue_timeout_s=0)),
    ]
    held.open()
    for generation in late:
        assert last(generation) == Finished("timeout", len(PROMPT), 0)
        assert generation.started_at is None
    assert last(running).finish_reason == "length"  # it had started in time
    engine.stop()


def test_a_request_that_fails_fails_alone(model, engine):
    """The model fails wherever one token is in its input; the neighbors of that request do not notice."""
    poison = 123

    def explode(segments: list[Segment]) -> None:
        if any((segment.ids == poison).any() for segment in segments):
            raise RuntimeError("broken")

    handle = StepHook(engine, before=explode)
    prompts = [PROMPT, [poison, 5], [9, 8, 7]]
    generations = [engine.submit(GenerationRequest(prompt, 8, GREEDY)) for prompt in prompts]
    assert tokens(generations[0]) == reference(model, PROMPT, 8)
    failed = last(generations[1])
    assert failed.finish_reason == "error" and failed.error
    assert tokens(generations[2]) == reference(model, [9, 8, 7], 8)
    handle.remove()
    assert engine.is_alive and engine.stats().restarts_total == 0


def test_an_embedding_that_is_no_number_fails_alone(tokenizer):
    broken, poison = tiny_model(tokenizer), 123
    with torch.no_grad():
        broken.model.embed_tokens.weight[poison] = torch.nan
    engine = start(broken, tokenizer)
    prompts = [[5, 9], [poison, 5], [7, 8]]
    generations = [engine.submit(GenerationRequest(prompt, 0, embedding="mean")) for prompt in prompts]
    assert [last(generation).finish_reason for generation in generations] == ["length", "error", "length"]
    assert engine.is_alive and engine.stats().restarts_total == 0
    engine.stop()


def test_a_receiver_that_is_gone_ends_its_own_request_only(model, engine):
    def gone(event: object) -> None:
        raise RuntimeError("event loop is closed")

    abandoned = engine.submit(GenerationRequest(PROMPT, 60, GREEDY), gone)
    assert tokens(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))) == reference(model, PROMPT, 5)
    assert abandoned.is_finished
    assert abandoned.generated_tokens == 1


def die(*_: object) -> None:
    raise SystemExit


def test_an_engine_that_dies_fails_what_is_in_flight_and_starts_again_once(model, engine, gate):
    engine.warm_up()
    held = gate(engine)
    running = engine.submit(GenerationRequest(PROMPT, 5, GREEDY))
    assert held.reached.wait(30)

    def die_once(*_: object) -> None:
        handle.remove()  # here: the engine may have started again before this test hears of it
        die()

    handle = StepHook(engine, after=die_once)
    held.open()
    failed = last(running)
    assert failed.finish_reason == "error" and "it restarts" in failed.error
    while not engine.is_ready:
        assert engine.is_alive
        time.sleep(0.01)
    assert engine.stats().restarts_total == 1
    assert tokens(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))) == reference(model, PROMPT, 5)
    StepHook(engine, after=die)
    assert last(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))).finish_reason == "error"
    assert not engine.is_alive and not engine.is_ready
    with pytest.raises(EngineStopped):
        engine.submit(GenerationRequest(PROMPT, 5, GREEDY))


def test_an_engine_whose_model_cannot_work_any_more_is_dead_and_answers_every_request(tokenizer, gate):
    engine = start(tiny_model(tokenizer), tokenizer, max_batch_size=1)
    held = gate(engine)
    generations = [engine.submit(GenerationRequest(PROMPT, 5, GREEDY)) for _ in range(3)]
    assert held.reached.wait(30)

    def explode(*_: object) -> None:
        raise RuntimeError("the device is lost")

    StepHook(engine, before=explode)
    held.open()
    assert {last(generation).finish_reason for generation in generations} == {"error"}
    assert not engine.is_alive


@pytest.mark.parametrize("ends", ["fails", "hangs"])
def test_an_engine_that_cannot_restart_is_dead_and_answers_every_request(tokenizer, gate, monkeypatch, ends):
    monkeypatch.setattr(engine_module, "RESTART_S", 1.0)
    engine = start(tiny_model(tokenizer), tokenizer, max_batch_size=1)
    held = gate(engine)
    generations = [engine.submit(GenerationRequest(PROMPT, 5, GREEDY)) for _ in range(2)]
    assert held.reached.wait(30)
    begun, lost = threading.Event(), threading.Event()

    def renewed(_: object) -> None:
        begun.set()
        assert lost.wait(30)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(engine._step), "renewed", renewed)
    StepHook(engine, before=die)
    held.open()
    assert "it restarts" in last(generations[0]).error  # at once, not when the restart has ended
    assert begun.wait(30)
    generations.append(engine.submit(GenerationRequest(PROMPT, 5, GREEDY)))  # is not held up
    if ends == "fails":
        lost.set()
    assert {last(generation).error for generation in generations[1:]} == {"the engine died"}
    assert not engine.is_alive
    with pytest.raises(EngineStopped):
        engine.submit(GenerationRequest(PROMPT, 5, GREEDY))
    lost.set()


def test_a_step_that_hangs_is_noticed_and_left_behind(model, tokenizer, gate):
    engine = start(model, tokenizer, step_timeout_s=0.3)
    engine.warm_up()
    held = gate(engine)
    hung = engine.submit(GenerationRequest(PROMPT, 5, GREEDY))
    assert held.reached.wait(30)
    failed = last(hung)
    assert failed.finish_reason == "error" and "hung" in failed.error
    held.open()
    while not engine.is_ready:
        time.sleep(0.01)
    assert tokens(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))) == reference(model, PROMPT, 5)
    assert engine.stats().restarts_total == 1
    engine.stop()


def test_time_in_which_the_process_was_stopped_is_no_steps(model, tokenizer, gate, monkeypatch):
    stopped_s = 0.0
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_s))
    engine = start(model, tokenizer, step_timeout_s=2.0)
    engine.warm_up()
    held = gate(engine)
    generation = engine.submit(GenerationRequest(PROMPT, 5, GREEDY))
    assert held.reached.wait(30)
    stopped_s = 3600.0
    time.sleep(0.8)  # the watchdog looks every 0.5 s
    held.open()
    assert last(generation).finish_reason == "length"
    assert engine.stats().restarts_total == 0
    engine.stop()


def test_stopping_ends_what_runs_and_what_waits(model, tokenizer, gate):
    engine = start(model, tokenizer, max_batch_size=1)
    held = gate(engine)
    running = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    assert held.reached.wait(30)
    waiting = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine.is_alive:
        pass
    held.open()
    stopping.join(30)
    assert [last(g).finish_reason for g in (running, waiting)] == ["cancelled", "cancelled"]
    with pytest.raises(EngineStopped):
        engine.submit(GenerationRequest(PROMPT, 5, GREEDY))


def test_an_engine_is_ready_once_its_model_has_answered(engine):
    assert engine.is_alive and not engine.is_ready
    engine.warm_up()
    assert engine.is_ready
    engine.stop()
    assert not engine.is_ready


def test_warming_up_a_broken_model_is_one_clear_error(tokenizer):
    model = tiny_model(tokenizer)
    model.model.norm.weight.data.fill_(torch.nan)
    engine = start(model, tokenizer)
    with pytest.raises(PipelineError, match="cannot generate"):
        engine.warm_up()
    assert not engine.is_ready
    engine.stop()
