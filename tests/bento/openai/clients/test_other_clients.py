"""LangChain, litellm and llm with their real packages: answers, streams, tools, forms, embeddings, known errors.

The packages are imported inside the tests: they take seconds, and every worker collects this file, but one runs it.
"""

import json
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import pydantic
import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, on_a_port, running_service

if TYPE_CHECKING:
    import llm

pytestmark = pytest.mark.medium
ROOM = 1024
LONG = "word " * ROOM
MESSAGES = [{"role": "user", "content": "größer?"}]


class Answer(pydantic.BaseModel, extra="forbid"):  # else random weights go on with fields of their own
    ok: bool
    size: int = pydantic.Field(ge=1, le=3)


def weather(city: Literal[1, 2]) -> str:
    """The weather of a city, by its number."""
    return f"{city}: sun"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE, context=ROOM) as running:
        yield running


@pytest.fixture(scope="module")
def address(service) -> Iterator[dict[str, object]]:
    with on_a_port(service.app) as url:
        yield {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "model": MODEL}


@pytest.fixture(scope="module")
def litellm() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks another host for prices
        import litellm

        yield litellm


@pytest.fixture(scope="module")
def ask(address):
    """litellm's arguments for a server of OpenAI's API, by its two names of such a one."""

    def arguments(provider: str) -> dict[str, object]:
        return {**address, "model": f"{provider}/{MODEL}", "num_retries": 0}

    return arguments


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_has_whole_answers_and_streams(litellm, ask, provider):
    whole = litellm.completion(messages=MESSAGES, max_tokens=8, temperature=0, **ask(provider))
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    chunks = list(litellm.completion(messages=MESSAGES, max_tokens=8, temperature=0, stream=True, **ask(provider)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("stream", [False, True])
def test_litellm_knows_a_text_that_is_too_long(litellm, ask, provider, stream):
    long = [{"role": "user", "content": LONG}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=long, max_tokens=8, stream=stream, **ask(provider))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=long, stream=stream, **ask(provider))


def test_litellm_knows_the_other_errors(litellm, ask):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **{**ask("openai"), "model": "openai/gpt-9"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=MESSAGES, temperature=-1, **ask("openai"))


def test_langchain_has_whole_answers_and_streams(address):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(temperature=0, max_tokens=8, **address)
    whole = model.invoke("größer?")
    assert whole.usage_metadata["output_tokens"] == 8 and whole.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in model.stream("größer?")) == whole.content
    assert [answer.content for answer in model.batch(["größer?"] * 3)] == [whole.content] * 3


def test_langchain_completes_a_batch_of_its_default_size(address):
    from langchain_openai import OpenAI

    model = OpenAI(temperature=0, max_tokens=4, **address)
    result = model.generate([f"def f{number}" for number in range(20)])
    assert len(result.generations) == 20 and result.llm_output["token_usage"]["completion_tokens"] == 80


def test_langchain_has_structured_output_and_tools(address):
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(max_tokens=80, seed=1, **address)
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Answer, method=method).invoke("x"), Answer)
    (call,) = model.bind_tools([tool(weather)], tool_choice="weather").invoke("x").tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in (1, 2)


def test_langchain_embeds(address):
    from langchain_openai import OpenAIEmbeddings

    made = OpenAIEmbeddings(check_embedding_ctx_length=False, **address)
    assert len(made.embed_documents(["a", "größer"])) == 2 and len(made.embed_query("a")) > 8


def test_langchain_knows_a_text_that_is_too_long(address):
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    with pytest.raises(ContextOverflowError):
        ChatOpenAI(**address).invoke(LONG)


@pytest.fixture
def rex(address, tmp_path, monkeypatch) -> "llm.Model":
    """The service as a model of llm, as its documentation says for servers of OpenAI's API."""
    import llm

    server = {"model_id": "rex", "model_name": MODEL, "api_base": address["base_url"], "api_key_name": "rex"}
    abilities = {"supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**server, **abilities}]))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return llm.get_model("rex")


def test_llm_has_whole_answers_streams_and_conversations(rex):
    asked = {"max_tokens": 8, "temperature": 0, "key": "none"}
    whole = rex.prompt("größer?", stream=False, **asked)
    assert whole.text() and whole.usage().output == 8
    assert "".join(rex.prompt("größer?", stream=True, **asked)) == whole.text()
    talk = rex.conversation()
    assert talk.prompt("größer?", system="Be terse.", stream=False, **asked).text()
    assert talk.prompt("Why?", stream=False, **asked).usage().input > whole.usage().input


def test_llm_has_schemas_and_tools(rex):
    schema = {**Answer.model_json_schema(), "additionalProperties": False}
    answer = rex.prompt("x", schema=schema, stream=False, max_tokens=200, seed=1, key="none")
    assert Answer.model_validate_json(answer.text())

    def city() -> str:
        """The name of a city."""
        return "Oslo"

    assert rex.prompt("x", tools=[city], stream=False, max_tokens=20, key="none").text() is not None
