"""/v1/responses through the `openai` package: texts, forms, functions and streams."""

import json
import re
from collections.abc import Iterator

import pydantic
import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, refusal, running_service

TOOL = {
    "type": "function",
    "name": "pick",
    "description": "Picks.",
    "parameters": {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
GREEDY = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE, context=1024) as running:
        yield running


def test_a_response_is_the_chats_answer(client):
    response = client.responses.create(input="größer?", instructions="Be terse.", **GREEDY)
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "größer?"}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=12)
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens == chat.usage.prompt_tokens and response.usage.output_tokens == 12
    assert response.model == MODEL and response.id.startswith("resp_") and response.store is False


def test_a_stream_has_the_events_of_the_package_and_the_whole_answer(client):
    whole = client.responses.create(input="größer?", **GREEDY)
    with client.responses.stream(input="größer?", **GREEDY) as stream:
        seen = list(stream)
    assert [event.sequence_number for event in seen if hasattr(event, "sequence_number")] == list(range(len(seen)))
    kinds = [event.type for event in seen]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in seen[4:-4]) == whole.output_text == seen[-1].response.output_text


def test_forms_are_parsed_by_the_package(client):
    class Answer(pydantic.BaseModel):
        ok: bool

    response = client.responses.parse(model=MODEL, input="x", text_format=Answer, max_output_tokens=100)
    assert isinstance(response.output_parsed, Answer) and response.status == "completed"
    assert response.text.format.schema_["properties"].keys() == {"ok"}
    form = {"format": {"type": "json_object"}}
    assert client.responses.create(input="x", text=form, **GREEDY).output_text.startswith("{")


def test_functions_are_called_streamed_and_their_results_read(client):
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 100, "tools": [TOOL]}
    named = {"type": "function", "name": "pick"}
    response = client.responses.create(input="x", tool_choice=named, **asked)
    (call,) = response.output
    assert call.type == "function_call" and call.name == "pick" and json.loads(call.arguments)["n"] in (1, 2)
    with client.responses.stream(input="x", tool_choice=named, **asked) as stream:
        seen = list(stream)
    assert "".join(e.delta for e in seen if e.type == "response.function_call_arguments.delta") == call.arguments
    (streamed,) = seen[-1].response.output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments) and streamed.call_id.startswith("call_")
    conversation = [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "7"},
        {"type": "reasoning", "id": "r", "summary": []},
    ]
    after = client.responses.create(input=conversation, **{**asked, "max_output_tokens": 3})
    assert after.usage.input_tokens > response.usage.input_tokens


def test_a_response_continues_its_own_output(client):
    first = client.responses.create(input="x", **GREEDY)
    items = [
        {"role": "user", "content": "x"},
        *[item.model_dump() for item in first.output],
        {"role": "user", "content": "y"},
    ]
    assert client.responses.create(input=items, **GREEDY).output_text


def test_a_turn_may_have_labels_and_the_assistants_no_text(client):
    def tokens(*items: dict) -> int:
        user = {"role": "user", "content": "x"}
        return client.responses.create(input=[user, *items, user], **GREEDY).usage.input_tokens

    empty = tokens({"role": "assistant", "content": ""})
    for content in (None, []):
        assert tokens({"role": "assistant", "content": content, "id": "m", "timestamp": 1, "model": "x"}) == empty


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "color": 1}]}, "input"),
        ({"input": "x" * 9000}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "gone"}, "tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}}, "text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"color": 1}, "color"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_cannot_be_done_is_refused_by_the_requests_own_names(service, body, param):
    answer = service.post("/v1/responses", **{"input": "x", **body})
    error = refusal(answer)
    if body.get("text", {}).get("format", {}).get("schema"):
        assert error["param"] in ("text", "response_format")
    else:
        assert error["param"] == param
    assert not re.search("messages|max_completion_tokens", error["message"].removeprefix("input"))
