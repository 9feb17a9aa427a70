"""The `openai` package against a real HTTP server: every route, streams, errors, retries, timeouts, async use."""

import asyncio
import threading
import time
from collections.abc import Iterator

import openai
import pytest

from model.generation.requests import EngineBusy, Generation
from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, on_a_port, running_service
from tests.model.generation.engines import StepHook
from tests.support.tiny import CONTEXT

GREEDY = {"model": MODEL, "max_tokens": 12, "temperature": 0}
MESSAGES = [{"role": "user", "content": "größer?"}]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE, clamp_max_tokens=False) as running:
        yield running


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with on_a_port(service.app) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "rex"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found" and caught.value.request_id


def test_a_completion_with_every_parameter_of_the_client(client):
    completion = client.completions.create(
        prompt=["def main", "x"],
        best_of=2,
        echo=True,
        frequency_penalty=0.5,
        logit_bias={"70": -5},
        logprobs=3,
        max_tokens=8,
        model=MODEL,
        n=2,
        presence_penalty=0.5,
        seed=1,
        stop=["\n\n", "###"],
        suffix=None,
        temperature=0.7,
        top_p=0.9,
        user="somebody",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True},
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[3].text.startswith("x")
    assert len(completion.choices[0].logprobs.tokens) == len(completion.choices[0].logprobs.text_offset)
    assert completion.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_streamed_completion_is_the_whole_one(client):
    whole = client.completions.create(prompt="def main", **GREEDY)
    stream = client.completions.create(prompt="def main", stream=True, stream_options={"include_usage": True}, **GREEDY)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_a_chat_with_every_parameter_that_asks_for_nothing_else(client):
    answer = client.chat.completions.create(
        messages=[*MESSAGES, {"role": "assistant", "content": "ja"}, *MESSAGES],
        model=MODEL,
        frequency_penalty=0.1,
        logit_bias={"70": 1},
        logprobs=True,
        max_completion_tokens=6,
        metadata={"project": "x"},
        n=1,
        presence_penalty=0.1,
        response_format={"type": "text"},
        seed=3,
        service_tier="auto",
        stop="###",
        store=False,
        temperature=0.5,
        top_logprobs=2,
        top_p=0.9,
        user="somebody",
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 6 and len(choice.logprobs.content[0].top_logprobs) == 2


def test_an_answer_of_the_client_can_be_sent_back_as_it_is(client):
    first = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message
    second = client.chat.completions.create(messages=[*MESSAGES, first, *MESSAGES], **{**GREEDY, "max_tokens": 2})
    assert second.choices[0].message.content


def test_a_streamed_chat_is_the_whole_one(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content
    with client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == whole


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ({"temperature": -1}, "greater_than_equal", "temperature"),
        ({"max_tokens": CONTEXT * 2}, "context_length_exceeded", "max_tokens"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"extra_body": {"color": "red"}}, "extra_forbidden", "color"),
    ],
)
def test_a_wrong_request_is_a_bad_request_error_that_names_the_field(client, wrong, code, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="x", **{**GREEDY, **wrong})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error" and param in caught.value.message


def test_another_model_is_a_not_found_error(client):
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served"):
        client.chat.completions.create(messages=MESSAGES, model="gpt-9")


def test_tools_that_cannot_be_enforced_are_refused_by_name(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError, match="tools: the schema of f cannot be enforced"):
        client.chat.completions.create(messages=MESSAGES, tools=[tool], **GREEDY)


def test_a_busy_service_is_asked_again_after_the_time_that_it_names(service, url, monkeypatch):
    attempts: list[int] = []
    submit = service.engine.submit_all

    def busy_twice(*arguments):
        attempts.append(1)
        if len(attempts) < 3:
            raise EngineBusy(1)
        return submit(*arguments)

    monkeypatch.setattr(service.engine, "submit_all", busy_twice)
    waits: list[float] = []
    sleep, here = time.sleep, threading.current_thread()
    monkeypatch.setattr(
        "time.sleep", lambda seconds: waits.append(seconds) if threading.current_thread() is here else sleep(seconds)
    )
    with openai.OpenAI(base_url=url, api_key="none", max_retries=2) as patient:
        assert patient.completions.create(prompt="x", **GREEDY).choices[0].text
    assert waits.count(1.0) == 2 and len(attempts) == 3
    attempts.clear()
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as hasty,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        hasty.completions.create(prompt="x", **GREEDY)
    assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"


def test_a_service_without_a_model_is_an_internal_server_error(service, client):
    models = service.app.state.models
    served, models.current = models.current, None
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(prompt="x", **GREEDY)
    finally:
        models.current = served
    assert caught.value.status_code == 503 and caught.value.code == "loading"


class Gate:
    """Holds the model at its next step."""

    def __init__(self, service: Service) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.hook = StepHook(service.engine, before=self.wait)

    def wait(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(30)


@pytest.fixture
def gate(service) -> Iterator[Gate]:
    made = Gate(service)
    yield made
    made.opened.set()
    made.hook.remove()


def wait_until_idle(service: Service) -> None:
    """Until the engine holds nothing; a request that is not canceled would end much later."""
    while service.engine.stats().running or service.engine.stats().waiting:
        threading.Event().wait(0.01)


@pytest.fixture
def cancelled(monkeypatch) -> threading.Event:
    """Set once the server has canceled a request. Until then a test holds the model, as it would finish the answer
    before a busy server notices that its client left."""
    event, cancel = threading.Event(), Generation.cancel
    monkeypatch.setattr(Generation, "cancel", lambda handle: (cancel(handle), event.set()))
    return event


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_times_out_has_its_request_cancelled(service, url, gate, stream, cancelled):
    before = service.engine.stats().cancelled_total
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=0.5) as hasty,
        pytest.raises(openai.APITimeoutError),
    ):
        hasty.completions.create(prompt="x", stream=stream, **{**GREEDY, "max_tokens": 80})
    assert gate.reached.is_set()
    assert cancelled.wait(30)
    gate.opened.set()
    wait_until_idle(service)
    assert service.engine.stats().cancelled_total > before


@pytest.mark.medium
def test_a_stream_that_is_left_early_is_cancelled(service, client, cancelled):
    before = service.engine.stats().cancelled_total
    steps = threading.Semaphore(3)
    hook = StepHook(service.engine, before=lambda segments: steps.acquire(timeout=30))
    stream = client.completions.create(prompt="x", stream=True, **{**GREEDY, "max_tokens": 90})
    next(iter(stream))
    stream.close()
    assert cancelled.wait(30)
    for _ in range(100):
        steps.release()
    hook.remove()
    wait_until_idle(service)
    assert service.engine.stats().cancelled_total > before


def test_a_failure_in_mid_stream_is_an_api_error_with_its_code(service, client):
    steps: list[None] = []

    def explode(*_: object) -> None:
        steps.append(None)
        if len(steps) in (6, 7):  # also when it is tried alone, but not when the model is asked whether it lives
            raise RuntimeError("internal detail")

    hook = StepHook(service.engine, before=explode)
    pieces = []
    with pytest.raises(openai.APIError) as caught:
        pieces.extend(client.completions.create(prompt="x", stream=True, **{**GREEDY, "max_tokens": 40}))
    hook.remove()
    assert pieces and caught.value.code == "internal_error" and "detail" not in str(caught.value)


def test_many_at_once_with_the_async_client_get_the_texts_that_they_get_alone(client, url):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as many:

            async def ask(number: int) -> str:
                request = {"prompt": f"def f{number}", "seed": number, **GREEDY, "temperature": 1.0}
                if number % 2:
                    return (await many.completions.create(**request)).choices[0].text
                stream = await many.completions.create(**request, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(ask, range(24)))

    together = asyncio.run(ask_all())
    for number in (0, 1, 22, 23):
        alone = client.completions.create(prompt=f"def f{number}", seed=number, **{**GREEDY, "temperature": 1.0})
        assert together[number] == alone.choices[0].text
