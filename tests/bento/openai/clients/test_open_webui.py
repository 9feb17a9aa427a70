"""The requests of Open WebUI 0.12 to a server of OpenAI's API, in their recorded shapes: too large to install here.

A connection is verified by its models; a chat streams; a title, tags and further questions are tasks without a stream.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from model.text.chat.template import TEMPLATE
from tests.bento.openai_service import MODEL, Service, events, on_a_port, running_service

ROOM = 512
HEADERS = {
    "Authorization": "Bearer none",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate, br",
    "User-Agent": "Python/3.11 aiohttp/3.12",
    "X-OpenWebUI-User-Name": "A%20User",
}
QUESTION = {"role": "user", "content": "größer?"}
TURNS = [{"role": "system", "content": "Be terse."}, QUESTION, {"role": "assistant", "content": "Ja."}, QUESTION]
TASK = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji.\n### Chat History:\n<chat_history>\n</chat_history>"
)
PARAMETERS = {
    "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "max_tokens": 8, "seed": 42, "stop": ["###", "\n\n"],
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "repeat_penalty": 1.0, "repeat_last_n": 64, "mirostat": 0,
    "mirostat_eta": 0.1, "mirostat_tau": 5.0, "tfs_z": 1.0, "logit_bias": {"5": -100},
    "response_format": {"type": "text"},
}  # fmt: skip
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2], "description": "first"}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=TEMPLATE, context=ROOM) as running:
        yield running


@pytest.fixture(scope="module")
def webui(service) -> Iterator[httpx.Client]:
    with (
        on_a_port(service.app) as url,
        httpx.Client(base_url=f"{url}/v1", headers=HEADERS, timeout=60) as client,
    ):
        yield client


def streamed(webui: httpx.Client, **body: Any) -> str:
    """The text of a streamed chat, and its usage checked."""
    asked = {"stream": True, "model": MODEL, "stream_options": {"include_usage": True}, **body}
    answer = webui.post("/chat/completions", json=asked)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *chunks, last = events(answer.text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_a_connection_is_verified_by_its_models(webui):
    (model,) = webui.get("/models").json()["data"]
    assert model["id"] == MODEL and model["object"] == "model"
    assert webui.get("/models", params={"refresh": "true"}).status_code == 200


@pytest.mark.parametrize(
    "messages", [[QUESTION], TURNS, [{"role": "user", "content": [{"type": "text", "text": "a"}]}]]
)
def test_a_chat_streams_with_its_usage(webui, messages):
    assert streamed(webui, messages=messages, max_tokens=8, temperature=0)


def test_parameters_of_the_page_are_taken_where_they_ask_for_what_there_is(webui):
    assert streamed(webui, messages=TURNS, **PARAMETERS) == streamed(webui, messages=TURNS, **PARAMETERS)


def test_a_long_task_without_a_stream_gets_what_fits(webui):
    for field in ("max_tokens", "max_completion_tokens"):
        body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "stream": False, field: 1000}
        answer = webui.post("/chat/completions", json=body).json()
        assert answer["usage"]["total_tokens"] == ROOM and answer["choices"][0]["finish_reason"] == "length"


def test_continuing_an_answer_opens_the_assistants_turn(webui):
    assert streamed(webui, messages=TURNS[:3], max_tokens=8, temperature=0)


def test_native_function_calls_stream_as_deltas(webui):
    body = {"stream": True, "model": MODEL, "messages": [QUESTION], "tools": [CALCULATOR], "tool_choice": "required"}
    answer = webui.post("/chat/completions", json={**body, "seed": 1, "max_tokens": 200, "parallel_tool_calls": False})
    deltas = [delta for chunk in events(answer.text) for delta in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["function"]["name"] == "add" and deltas[0]["index"] == 0
    arguments = json.loads("".join(delta["function"].get("arguments", "") for delta in deltas))
    assert set(arguments) == {"a", "b"}


def test_texts_of_a_knowledge_base_are_embedded(service, webui):
    answer = webui.post("/embeddings", json={"input": ["a", "größer"], "model": MODEL})
    assert [len(one["embedding"]) for one in answer.json()["data"]] == [service.engine.hidden_size] * 2


def test_what_the_model_has_not_is_refused_in_words_that_the_page_shows(webui):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    for body in ({"repeat_penalty": 1.2}, {"messages": [{"role": "user", "content": [image]}]}):
        answer = webui.post("/chat/completions", json={"model": MODEL, "messages": [QUESTION], **body})
        (name,) = body
        assert answer.status_code == 400 and name in answer.json()["error"]["message"]
