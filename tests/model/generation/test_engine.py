"""The engine gives what `generate()` gives, to many callers, and one bad request harms nobody else."""

import threading
from collections.abc import Iterator

import pytest
import torch

from model import int8
from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.requests import (
    EngineBusy,
    EngineStopped,
    Finished,
    Generation,
    GenerationRequest,
    SamplingParameters,
    TextPiece,
)
from model.text.tokenizer import token_bytes
from tests.tiny import CONTEXT, TEXT, tiny_model, tiny_tokenizer

GREEDY = SamplingParameters(temperature=0)
PROMPT = [40, 90, 17, 200]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


def start(model, tokenizer, **options) -> Engine:
    """An engine that no token stops, so that lengths are known: a model with random weights stops anywhere."""
    engine = Engine(model, tokenizer, **options)
    engine.end_of_text_ids = frozenset()
    return engine


@pytest.fixture
def engine(model, tokenizer) -> Iterator[Engine]:
    made = start(model, tokenizer)
    yield made
    made.stop()


class Gate:
    """Holds the engine at each forward pass until it is opened."""

    def __init__(self, model) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._handle = model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(30)

    def open(self) -> None:
        self.opened.set()
        self._handle.remove()


@pytest.fixture
def gate(model) -> Iterator[Gate]:
    made = Gate(model)
    yield made
    made.open()


def tokens(generation: Generation) -> list[int]:
    return [token for event in generation if isinstance(event, TextPiece) for token in event.token_ids]


def last(generation: Generation) -> Finished:
    *_, event = generation
    assert isinstance(event, Finished)
    return event


def reference(model, prompt: list[int], count: int, **options) -> list[int]:
    made = model.generate(torch.tensor([prompt]), max_new_tokens=count, **{"do_sample": False, **options})
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv_cache", [True, False])
def test_greedy_tokens_equal_those_of_generate(model, tokenizer, kv_cache):
    engine = start(model, tokenizer, kv_cache=kv_cache)
    for prompt in (PROMPT, [5], list(range(2, 60))):
        assert tokens(engine.submit(GenerationRequest(prompt, 30, GREEDY))) == reference(model, prompt, 30)
    engine.stop()


def test_seeded_tokens_equal_those_of_generate_with_that_seed(model, engine):
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}
    mine = tokens(engine.submit(GenerationRequest(PROMPT, 30, SamplingParameters(**options, seed=3))))
    torch.manual_seed(3)
    assert mine == reference(model, PROMPT, 30, do_sample=True, **options)


def test_an_int8_model_gives_the_same_with_and_without_cache(tokenizer):
    model = int8.quantize(tiny_model(tokenizer))
    runs = []
    for kv_cache in (True, False):
        engine = start(model, tokenizer, kv_cache=kv_cache)
        runs.append(tokens(engine.submit(GenerationRequest(PROMPT, 20, GREEDY))))
        engine.stop()
    assert runs[0] == runs[1]


def test_the_text_is_that_of_the_tokens(engine, tokenizer):
    events = list(engine.submit(GenerationRequest(PROMPT, 40, SamplingParameters(seed=0))))
    ids = [token for event in events[:-1] for token in event.token_ids]
    spelled = b"".join(token_bytes(tokenizer)[token] for token in ids).decode("utf-8", "replace")
    assert "".join(event.text for event in events[:-1]) == spelled
    assert events[-1] == Finished("length", len(PROMPT), 40)


def test_the_whole_context_can_be_used(engine):
    generation = engine.submit(GenerationRequest(PROMPT, CONTEXT - len(PROMPT), GREEDY))
    assert last(generation).generated_tokens == CONTEXT - len(PROMPT)


def test_the_end_of_text_token_stops_and_is_counted_but_not_shown(tokenizer):
    model = tiny_model(tokenizer, stops=True)
    model.generation_config.eos_token_id = None
    plain = reference(model, PROMPT, 12)
    # Whatever token comes sixth becomes the end of the text.
    model.generation_config.eos_token_id = [plain[5], tokenizer.eos_token_id]
    engine = Engine(model, tokenizer)
    events = list(engine.submit(GenerationRequest(PROMPT, 12, GREEDY)))
    engine.stop()
    expected = plain[: min(plain.index(plain[5]), [*plain, 0].index(0))]
    assert [token for event in events[:-1] for token in event.token_ids] == expected
    assert events[-1] == Finished("stop", len(PROMPT), len(expected) + 1)


def test_special_tokens_written_out_in_a_prompt_are_ordinary_text(engine, tokenizer):
    ids = engine.encode("a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids
    assert b"".join(token_bytes(tokenizer)[token] for token in ids) == b"a<|endoftext|>b"
    assert engine.encode(TEXT) == tokenizer.encode(TEXT)


def test_many_callers_each_get_their_own_answer(model, engine):
    prompts = [[n + 2, n + 30] for n in range(16)]
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = tokens(engine.submit(GenerationRequest(prompts[number], 10, GREEDY)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {number: reference(model, prompt, 10) for number, prompt in enumerate(prompts)}


def test_a_full_queue_refuses_and_takes_again_once_it_is_answered(model, tokenizer, gate):
    engine = start(model, tokenizer, max_queue=2)
    running = engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    assert gate.reached.wait(30)
    waiting = [engine.submit(GenerationRequest(PROMPT, 2, GREEDY)) for _ in range(2)]
    with pytest.raises(EngineBusy) as refusal:
        engine.submit(GenerationRequest(PROMPT, 2, GREEDY))
    assert refusal.value.retry_after_s >= 1
    assert (engine.running, engine.waiting) == (1, 2)
    waiting[0].cancel()  # leaves its place at once
    waiting.append(engine.submit(GenerationRequest(PROMPT, 2, GREEDY)))
    gate.open()
    assert [last(g).finish_reason for g in (running, *waiting)] == ["length", "cancelled", "length", "length"]
    engine.stop()


def test_a_cancelled_request_stops_at_the_next_token(model, engine, gate):
    generation = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    assert gate.reached.wait(30)
    generation.cancel()
    gate.open()
    assert last(generation) == Finished("cancelled", len(PROMPT), 1)


def test_a_request_whose_time_is_up_says_so_even_while_it_waits(model, engine, gate):
    running = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    assert gate.reached.wait(30)
    late = engine.submit(GenerationRequest(PROMPT, 60, GREEDY, timeout_s=0))
    gate.open()
    assert last(late) == Finished("timeout", len(PROMPT), 0)
    assert last(running).finish_reason == "length"


def test_a_request_that_fails_fails_alone(model, engine):
    def explode(*_: object) -> None:
        raise RuntimeError("broken")

    handle = model.register_forward_pre_hook(explode)
    assert last(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))).finish_reason == "error"
    handle.remove()
    assert tokens(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))) == reference(model, PROMPT, 5)
    assert engine.is_alive


def test_a_receiver_that_is_gone_ends_its_own_request_only(model, engine):
    def gone(event: object) -> None:
        raise RuntimeError("event loop is closed")

    abandoned = engine.submit(GenerationRequest(PROMPT, 60, GREEDY), gone)
    assert tokens(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))) == reference(model, PROMPT, 5)
    assert abandoned.is_finished
    assert abandoned.generated_tokens == 1


def test_an_engine_whose_thread_dies_answers_everybody_and_takes_nothing_more(model, engine, gate, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    running = engine.submit(GenerationRequest(PROMPT, 5, GREEDY))
    assert gate.reached.wait(30)
    waiting = engine.submit(GenerationRequest(PROMPT, 5, GREEDY))

    def die(*_: object) -> None:
        raise SystemExit

    handle = model.register_forward_hook(die)
    gate.open()
    assert [last(g).finish_reason for g in (running, waiting)] == ["error", "error"]
    handle.remove()
    assert not engine.is_alive
    with pytest.raises(EngineStopped):
        engine.submit(GenerationRequest(PROMPT, 5, GREEDY))


def test_stopping_ends_what_runs_and_what_waits(model, engine, gate):
    running = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    assert gate.reached.wait(30)
    waiting = engine.submit(GenerationRequest(PROMPT, 60, GREEDY))
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine.is_alive:
        pass
    gate.open()
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


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (GenerationRequest([], 5), "prompt"),
        (GenerationRequest([1], 0), "max_tokens"),
        (GenerationRequest([1] * CONTEXT, 1), str(CONTEXT)),
        (GenerationRequest([1], CONTEXT), str(CONTEXT)),
        (GenerationRequest([-1], 1), "token ids"),
        (GenerationRequest([10**6], 1), "token ids"),
    ],
    ids=["no prompt", "no tokens", "long prompt", "long answer", "negative id", "unknown id"],
)
def test_a_request_that_can_never_run_is_refused_at_once(engine, request_, names):
    with pytest.raises(PipelineError, match=names):
        engine.submit(request_)
