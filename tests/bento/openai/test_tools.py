"""Functions that a model may call, as the `openai` package asks for them; and the reading of calls out of a text."""

import json
from collections.abc import Iterator

import jsonschema_rs
import openai
import pydantic
import pytest

from bento.openai.tools import Arguments, CallReader, CallStart, Content, read_answer
from model.text.chat.tools import write_call
from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, refusal, running_service

MESSAGES = [{"role": "user", "content": "x"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "größer"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE, context=1024) as running:
        yield running


def ask(client, **body):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, **body}
    )


def check(call) -> None:
    assert call.id.startswith("call_") and call.type == "function"
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("weather", "now")
    jsonschema_rs.validate(WEATHER if call.function.name == "weather" else {"maxProperties": 0}, arguments)


def test_a_named_function_is_called_once_with_valid_arguments(client):
    for seed in range(4):
        (choice,) = ask(client, tool_choice=NAMED, seed=seed).choices
        (call,) = choice.message.tool_calls
        check(call)
        assert call.function.name == "weather" and choice.message.content is None
        assert choice.finish_reason == "tool_calls"


def test_required_calls_name_known_functions_and_only_one_if_requested(client):
    counts = set()
    for seed in range(6):
        choice = ask(client, tool_choice="required", seed=seed, max_tokens=400).choices[0]
        calls = choice.message.tool_calls
        if choice.finish_reason == "tool_calls":
            for call in calls:
                check(call)
        counts.add(len(calls))
        assert len({call.id for call in calls}) == len(calls)
        one = ask(client, tool_choice="required", seed=seed, parallel_tool_calls=False).choices[0]
        assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
    assert max(counts) > 1


def test_streamed_calls_are_the_whole_ones(client):
    asked = {"tool_choice": "required", "seed": 2, "n": 2, "parallel_tool_calls": False}
    whole = ask(client, **asked)
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS, max_tokens=200, **asked) as stream:
        streamed = stream.get_final_completion() if list(stream) else None
    for choice, other in zip(whole.choices, streamed.choices, strict=True):
        assert choice.finish_reason == other.finish_reason
        mine = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert mine == [(call.function.name, call.function.arguments) for call in other.message.tool_calls]
        assert all(call.id.startswith("call_") for call in other.message.tool_calls)


def test_text_is_as_good_as_a_call_where_the_model_may_choose(client):
    free = ask(client, tools=None, temperature=0, max_tokens=20).choices[0]
    none = ask(client, tool_choice="none", temperature=0, max_tokens=20).choices[0]
    assert none.message.content == free.message.content and none.message.tool_calls is None
    for asked in ({}, {"tool_choice": "auto"}):
        choice = ask(client, temperature=0, max_tokens=20, **asked).choices[0]
        assert choice.message.content and choice.message.tool_calls is None and choice.finish_reason == "length"
        chunks = list(ask(client, temperature=0, max_tokens=20, stream=True, **asked))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_calls_and_results_of_a_conversation_are_read(service):
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo",  "days": 1}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "b"}]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "sun"}]},
    ]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 2, "return_token_ids": True}
    answer = service.post("/v1/chat/completions", **body).json()
    prompt = service.engine.decode(answer["choices"][0]["prompt_token_ids"])
    shown = write_call("weather", '{"city":"Oslo","days":1}')
    assert prompt.count(shown) == 2 and prompt.count("<tool_response>") == 2
    assert prompt.index("The weather.") < prompt.index("x") < prompt.index(shown) < prompt.index("rain")
    assert prompt.endswith("assistant\n")
    system = [{"role": "system", "content": "Be terse."}, *messages]
    answer = service.post("/v1/chat/completions", **{**body, "messages": system}).json()
    prompt = service.engine.decode(answer["choices"][0]["prompt_token_ids"])
    assert prompt.count("system") == 1 and prompt.index("Be terse.") < prompt.index("The weather.")


def test_the_clients_own_classes_are_parsed(client):
    class Weather(pydantic.BaseModel):
        days: int = pydantic.Field(ge=1, le=9)

    made = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, tools=[openai.pydantic_function_tool(Weather)], tool_choice="required",
        parallel_tool_calls=False, seed=1, max_tokens=200,
    )  # fmt: skip
    assert isinstance(made.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{}]}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "bad_words": ["x"]}, "bad_words"),
        ({"messages": [{"role": "tool", "content": "x", "tool_calls": [1]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_tools_that_cannot_be_had_are_refused_by_name(service, body, param):
    asked = {"messages": MESSAGES, "max_tokens": 3, **body}
    assert refusal(service.post("/v1/chat/completions", **asked))["param"] == param


TEXTS = [
    "no call < tool_call> at all <tool_",
    write_call("f", '{"a":"}","b":[{}]}'),
    "first\n" + write_call("f", "{}") + "\n" + write_call("g.h", '{"t":"<tool_call>"}'),
    "cut " + write_call("f", '{"a":12')[:-13],
    "<tool_call>\n{\"na",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_reader_finds_the_same_calls_however_the_text_is_cut(text):
    content, calls = read_answer(text)
    for size in (1, 2, 3, 7, 50):
        reader = CallReader()
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        parts = [part for piece in pieces for part in reader.push(piece)] + list(reader.flush())
        assert "".join(part.text for part in parts if isinstance(part, Content)) == (content or "")
        names = [part.name for part in parts if isinstance(part, CallStart)]
        arguments = [
            "".join(p.text for p in parts if isinstance(p, Arguments) and p.number == n) for n in range(len(names))
        ]
        assert names == [call["function"]["name"] for call in calls]
        assert arguments == [call["function"]["arguments"] for call in calls]


def test_a_reader_gives_contents_and_arguments():
    assert read_answer(TEXTS[0]) == (TEXTS[0], [])
    content, calls = read_answer(TEXTS[2])
    assert content == "first\n" and [call["function"]["arguments"] for call in calls] == ["{}", '{"t":"<tool_call>"}']
    assert read_answer(TEXTS[1])[0] is None
