"""From the engine's thread to the event loop: one wake-up per step, nothing lost, nothing kept for a closed loop."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from bento.errors import ApiError
from bento.serving.answers import Answers, Mailbox
from bento.telemetry.metrics import ServiceMetrics
from bento.telemetry.record import RequestRecord
from model.generation.requests import Finished, Generation, GenerationRequest, TextPiece

STREAMS, STEPS = 8, 20


class ByHand:
    """An engine that emits the test's events in a separate thread."""

    def submit_all(self, requests, deliver):
        self.deliver = deliver
        self.generations = [Generation(request) for request in requests]
        return self.generations

    def step(self, *events) -> None:
        thread = threading.Thread(target=lambda: [self.deliver(i, event) for i, event in enumerate(events)])
        thread.start()
        thread.join()


def answers_of(engine: ByHand, count: int) -> Answers:
    record = RequestRecord("id", ServiceMetrics(lambda: None))
    return Answers(engine, [GenerationRequest([2], 4) for _ in range(count)], record)  # type: ignore[arg-type]


def test_the_events_of_a_step_arrive_together_and_in_order(monkeypatch):
    wakes: list[None] = []
    wake = Mailbox._wake
    monkeypatch.setattr(Mailbox, "_wake", lambda mailbox: wakes.append(None) or wake(mailbox))

    async def play() -> list[list[tuple[int, object]]]:
        engine = ByHand()
        answers, got = answers_of(engine, STREAMS), []
        batches = answers.batches()
        for number in range(STEPS):
            engine.step(*[TextPiece(str(number), (number,))] * STREAMS)
            got.append(await anext(batches))
        engine.step(*[Finished("length", 1, STEPS)] * STREAMS)
        return [*got, *[batch async for batch in batches]]

    got = asyncio.run(play())
    assert len(wakes) == STEPS + 1
    for number, batch in enumerate(got[:-1]):
        assert [(index, event.text) for index, event in batch] == [(i, str(number)) for i in range(STREAMS)]
    assert len(got[-1]) == STREAMS


def test_events_before_a_failure_are_delivered_and_the_other_generations_are_canceled():
    async def play() -> None:
        engine = ByHand()
        answers = answers_of(engine, 2)
        engine.step(TextPiece("a", (2,)), Finished("error", 1, 0, error="why"))
        batches = answers.batches()
        assert await anext(batches) == [(0, TextPiece("a", (2,)))]
        with pytest.raises(ApiError) as caught:
            await anext(batches)
        assert caught.value.status_code == 500
        answers.close()
        assert engine.generations[0].interruption() == "cancelled"

    asyncio.run(play())


def test_a_closed_loop_refuses_every_event():
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            mailbox.post(SimpleNamespace(), 0, TextPiece("a", (2,)))  # type: ignore[arg-type]
