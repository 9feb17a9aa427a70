"""The queue of waiting requests, asked by one thread while another fills and empties it."""

import threading

from model.generation.queue import RequestQueue
from model.generation.requests import Generation, GenerationRequest


def waiting(client: str) -> Generation:
    return Generation(GenerationRequest([1, 2], max_tokens=1, client=client), lambda event: None)


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
