"""The queue of waiting requests, asked by one thread while another fills and empties it."""

import threading

import pytest

from model.generation.queue import RequestQueue, slots_for, usual_requests
from model.generation.requests import Generation, GenerationRequest


def waiting(client: str, connection: str = "") -> Generation:
    request = GenerationRequest([1, 2], max_tokens=1, client=client, connection=connection)
    return Generation(request, lambda event: None)


def test_its_length_can_be_asked_while_clients_come_and_go():
    queue = RequestQueue(max_requests=1000, max_tokens=100_000)
    failures: list[BaseException] = []
    ended = threading.Event()

    def ask() -> None:
        try:
            while not ended.is_set():
                assert 0 <= len(queue) <= 50
                queue.finish_interrupted()
        except (AssertionError, RuntimeError) as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(200):
        generations = [waiting(f"client {number}") for number in range(50)]
        queue.put(generations, room=0)
        for generation in generations:
            queue.remove(generation)
    ended.set()
    asking.join()
    assert failures == []
    assert len(queue) == 0


@pytest.mark.parametrize("level", ["clients", "connections"])
def test_a_second_request_is_served_although_new_senders_never_end(level):
    def request(sender: str) -> Generation:
        return waiting(sender) if level == "clients" else waiting("one", sender)

    queue = RequestQueue(max_requests=1000, max_tokens=100_000)
    queue.put([request(f"early {number}") for number in range(20)], room=0)
    first, second = request("twice"), request("twice")
    queue.put([first], room=0)
    queue.put([second], room=0)
    served = []
    for number in range(100):  # a full queue: one comes for each that is served
        generation = queue.first()
        queue.remove(generation)
        served.append(generation)
        queue.put([request(f"new {number}")], room=0)
    assert served.index(first) == 20
    assert served.index(second) <= 2 * 22


@pytest.mark.parametrize("level", ["clients", "connections"])
def test_a_queue_that_is_never_empty_forgets_its_senders(level):
    queue = RequestQueue(max_requests=1000, max_tokens=100_000)
    queue.put([waiting("one", str(number)) for number in range(10)], room=0)
    for number in range(1000):
        queue.remove(queue.first())
        queue.put([waiting(f"new {number}") if level == "clients" else waiting("one", f"new {number}")], room=0)
    tags = queue._waiting._clients if level == "clients" else queue._waiting._lines["one"].connections
    assert len(tags.latest) < 100


def test_there_is_a_slot_more_for_each_sixteen_requests_at_once():
    assert [slots_for(requests) for requests in (1, 15, 16, 31, 64)] == [1, 15, 17, 32, 68]
    assert [usual_requests(device) for device in ("cpu", "cuda")] == [16, 64]
