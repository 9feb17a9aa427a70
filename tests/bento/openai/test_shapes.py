"""Bodies in shapes that clients of other servers send: each is answered as it means, or refused by its own names."""

import json
import re
from collections.abc import Iterator

import pytest

from model.text.chat.conversations import read_messages
from model.text.chat.template import TEMPLATE, ChatEncoder, turns_of
from model.text.chat.tools import write_call
from model.text.tokenizer import FastEncoder
from tests.bento.openai_service import GOOD, IS_VLLM, Service, events, refusal, running_service

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "x"}
TEXT = {"type": "object", "properties": {"a": {"enum": ["b", "ab"]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": TEXT}}]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=TEMPLATE, context=1024) as running:
        yield running


def ask(service: Service, path: str, **body) -> dict:
    answer = service.post(path, **{**GOOD[path], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompt_of(service: Service, messages, **body) -> str:
    choice = ask(service, CHAT, messages=messages, return_token_ids=True, **body)["choices"][0]
    return service.tokenizer.decode(choice["prompt_token_ids"])


def chat_calls(*ids: str) -> list[dict]:
    calls = [{"id": i, "type": "function", "function": {"name": f"call_{i}", "arguments": "{}"}} for i in ids]
    return [USER, {"role": "assistant", "content": [], "tool_calls": calls}]


def result(number: str, **more) -> dict:
    return {"role": "tool", "tool_call_id": number, "content": f"result of {number}", **more}


@pytest.mark.parametrize(
    "parameters", [{}, {"properties": TEXT["properties"]}, {"$ref": "#/$defs/X", "$defs": {"X": TEXT}}]
)
def test_arguments_are_an_object_also_where_their_schema_does_not_say_so(service, parameters):
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for seed in range(3):
        asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        choice = ask(service, CHAT, max_tokens=300, **asked)["choices"][0]
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        assert arguments.startswith("{")
        if choice["finish_reason"] == "tool_calls":
            assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("stop", ["a", "<", "tool", '"', ["}", "\n"]])
def test_a_stop_string_ends_text_and_never_cuts_a_call(service, stop):
    asked = {"tools": TOOLS, "parallel_tool_calls": False, "stop": stop, "max_tokens": 100, "seed": 1}
    choice = ask(service, CHAT, tool_choice="required", **asked)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["a"] in ("b", "ab") and choice["finish_reason"] == "tool_calls"
    streamed = events(service.post(CHAT, messages=[USER], tool_choice="required", stream=True, **asked).text)
    deltas = [call for chunk in streamed for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
    for seed in range(6):
        text = ask(service, CHAT, **{**asked, "max_tokens": 20, "seed": seed})["choices"][0]["message"]["content"] or ""
        assert not [one for one in ([stop] if isinstance(stop, str) else stop) if one in text]


def test_what_asks_for_no_function_is_taken(service):
    plain = ask(service, CHAT, seed=1)["choices"]
    for body in (
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"n": 1, "stream": False, "guided_decoding_backend": "xgrammar"},
    ):
        assert ask(service, CHAT, seed=1, **body)["choices"] == plain
    assert ask(service, MESSAGES, tool_choice={"type": "auto"}, cache_control={"type": "ephemeral"})["content"]
    assert ask(service, RESPONSES, tool_choice=None, parallel_tool_calls=False)["output"]
    if not IS_VLLM:
        assert ask(service, "/v1/embeddings", stream=False, n=1, add_special_tokens=True, embed_dtype="float32")["data"]


def test_results_stand_in_the_order_of_their_calls(service):
    in_order = prompt_of(service, [*chat_calls("1", "2"), result("1"), result("2")])
    assert prompt_of(service, [*chat_calls("1", "2"), result("2"), result("1")]) == in_order
    assert in_order.index("result of 1") < in_order.index("result of 2")
    items = [
        USER,
        {"type": "function_call", "call_id": "1", "name": "call_1", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "call_2", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "2", "output": "result of 2"},
        {"type": "function_call_output", "call_id": "1", "output": "result of 1"},
    ]
    uses = [{"type": "tool_use", "id": i, "name": f"call_{i}", "input": {}} for i in "12"]
    results = [{"type": "tool_result", "tool_use_id": i, "content": f"result of {i}"} for i in "21"]
    turns = [USER, {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
    expected = len(service.tokenizer(in_order)["input_ids"])
    assert ask(service, RESPONSES, input=items)["usage"]["input_tokens"] == expected
    assert service.post(f"{MESSAGES}/count_tokens", messages=turns).json()["input_tokens"] == expected


def test_a_tools_failure_is_told(service):
    def count(**more) -> int:
        block = {"type": "tool_result", "tool_use_id": "1", "content": "no", **more}
        turns = [
            USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            {"role": "user", "content": [block]},
        ]
        return service.post(f"{MESSAGES}/count_tokens", messages=turns).json()["input_tokens"]

    assert count() == count(is_error=False) < count(is_error=True)


def test_the_tokens_of_a_conversation_that_does_not_fit_are_counted(service):
    counted = service.post(f"{MESSAGES}/count_tokens", messages=[{"role": "user", "content": "x" * 5000}])
    assert counted.json()["input_tokens"] == 5002


def test_a_streams_text_never_lacks_the_log_probabilities_that_were_asked_for(service):
    body = {"prompt": "def main", "max_tokens": 40, "stop": ["ab", "th", "\x01\x02\x03"], "logprobs": 0, "stream": True}
    with_text = []
    for seed in range(10):
        for chunk in events(service.post("/v1/completions", seed=seed, temperature=1.3, **body).text):
            (choice,) = chunk["choices"]
            with_text += [choice["logprobs"]] if choice["text"] else []
    assert len(with_text) >= 10 and None not in with_text


def call(**more) -> dict:
    return {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", **more}


def use(**more) -> dict:
    return {"type": "tool_use", "id": "1", "name": "f", "input": {}, **more}


def blocks(*given, role: str = "user", before=()) -> dict:
    return {"messages": [*before, {"role": role, "content": list(given)}]}


def function(schema: dict) -> dict:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def answered(before: list, **more) -> dict:
    """A result of a tool after its call, as blocks."""
    return blocks({"type": "tool_result", "tool_use_id": "1", **more}, before=before)


OUTPUT = {"type": "function_call_output", "output": "x"}
USED = [USER, {"role": "assistant", "content": [use()]}]
ONE = {"tools": [{"name": "f", "input_schema": TEXT}]}
WORDS = {"type": "text", "text": "x"}
WRITTEN = {
    CHAT: lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
    RESPONSES: lambda name, schema: {"type": "function", "name": name, "parameters": schema},
    MESSAGES: lambda name, schema: {"name": name, "input_schema": schema},
}
"""A function in each API."""
REFUSED = [
    (CHAT, function({"type": "string"}), "tools"),
    (CHAT, function({"type": ["object", "null"]}), "tools"),
    (CHAT, {"messages": [*chat_calls("1", "2"), result("1")]}, "messages"),
    (CHAT, {"messages": [*chat_calls("1"), result("other")]}, "messages"),
    (CHAT, {"messages": [*chat_calls("1"), result("1"), result("1")]}, "messages"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"guided_json": False}, "guided_json"),
    *[
        (path, {"tools": [write("f", {}), write("g", {"not": {}})]}, "tools: the schema of g cannot be enforced")
        for path, write in WRITTEN.items()
    ],
    (RESPONSES, {"input": 5}, "input"),
    (RESPONSES, {"input": None}, "input"),
    (RESPONSES, {"input": ["x"]}, "input"),
    (RESPONSES, {"input": [{"type": 5}]}, "input"),
    (RESPONSES, {"input": [{"role": "tool", "content": "x"}]}, "input[0]: expected a role"),
    (RESPONSES, {"input": [USER, call(arguments={"a": 1})]}, "input[1]: expected arguments"),
    (RESPONSES, {"input": [USER, call(name=None)]}, "input[1]: expected name"),
    (RESPONSES, {"input": [USER, call(color=1)]}, "input[1]: 'color'"),
    (RESPONSES, {"input": [USER, call(name="f f")], "instructions": "Be terse."}, "input[1].name"),
    (RESPONSES, {"input": [USER, {**OUTPUT, "call_id": 5}]}, "input[1]: expected call_id"),
    (RESPONSES, {"input": [USER, call(), {**OUTPUT, "call_id": "2"}]}, "input"),
    (RESPONSES, {"text": {"format": {"type": "json_object", "schema": {"type": "object"}}}}, "text"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}}, "text"),
    (RESPONSES, {"tool_choice": 5}, "tool_choice"),
    (RESPONSES, {"input": [{"role": "user", "content": [{**WORDS, "color": 1}]}]}, "input[0]"),
    (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools"),
    (MESSAGES, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (MESSAGES, {"system": 5}, "system"),
    (MESSAGES, {"system": [{"type": "image", "text": "x"}]}, "system"),
    (MESSAGES, {"system": [WORDS, {**WORDS, "color": 1}]}, "system[1]: 'color'"),
    (MESSAGES, answered(USED, content=[{**WORDS, "color": 1}]), "messages[2].content[0][0]: 'color'"),
    (MESSAGES, blocks(before=[USER]), "messages[1].content"),
    (MESSAGES, blocks({"type": "text", "text": "x", "color": 1}), "messages[0].content[0]"),
    (MESSAGES, blocks({"type": "thinking", "thinking": "x", "signature": "y"}), "messages[0].content[0]"),
    (MESSAGES, blocks(use(input="x"), role="assistant", before=[USER]), "messages[1].content[0]"),
    (MESSAGES, blocks(use(id=None), role="assistant", before=[USER]), "messages[1].content[0]"),
    (MESSAGES, {**blocks(use(name="f f"), role="assistant", before=[USER]), "system": "s"}, "messages[1].content.name"),
    (MESSAGES, blocks(use(), WORDS, role="assistant", before=[USER]), "messages[1].content[1]"),
    (MESSAGES, answered(USED, tool_use_id=None), "messages[2].content[0]"),
    (MESSAGES, answered(USED, tool_use_id="2"), "messages"),
    (MESSAGES, answered(USED, is_error=1), "messages[2].content[0]"),
    (MESSAGES, blocks(WORDS, {"type": "tool_result", "tool_use_id": "1"}, before=USED), "messages[2].content[1]"),
    (MESSAGES, {**ONE, "tool_choice": {"type": "auto", "name": "f"}}, "tool_choice"),
    (MESSAGES, {**ONE, "tool_choice": {"type": "tool"}}, "tool_choice"),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools"),
    ("/v1/embeddings", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": []}, "input"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "named"), REFUSED, ids=lambda value: json.dumps(value)[:70])
def test_what_a_body_gets_wrong_is_named_where_it_stands_in_that_body(service, path, body, named):
    error = refusal(service.post(path, **{**GOOD[path], **body}))
    assert error["param"] == re.split(r"[\[.:]", named)[0]
    assert error["message"].startswith(named)
    foreign = {RESPONSES: ("messages", "tool_call", "response_format"), MESSAGES: ("tool_call", "parameters.")}
    assert not [name for name in foreign.get(path, ()) if name in error["message"]]


@pytest.mark.parametrize(("arguments", "written"), [("", "{}"), ({}, "{}"), ({"a": "ß"}, '{"a": "ß"}')], ids=str)
def test_arguments_of_the_history_may_be_an_object_or_nothing(service, arguments, written):
    def history(value):
        function = {"name": "f", "arguments": value}
        return [USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}, result("1")]

    assert prompt_of(service, history(arguments)) == prompt_of(service, history(written))


@pytest.mark.parametrize(("path", "name"), [(CHAT, "messages"), (RESPONSES, "input")])
def test_a_refusal_of_the_history_is_its_text(service, path, name):
    lengths = set()
    for content in ("no", [{"type": "refusal", "refusal": "no"}]):
        usage = ask(service, path, **{name: [USER, {"role": "assistant", "content": content}, USER]})["usage"]
        lengths.add(usage.get("prompt_tokens") or usage["input_tokens"])
    assert len(lengths) == 1


def test_a_call_of_the_history_is_written_as_the_model_writes_it(service):
    prompt = prompt_of(service, [*chat_calls("1"), result("1")])
    assert write_call("call_1", "{}") in prompt and prompt.endswith("result of 1<|assistant|>")


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"continue_final_message": True}], ids=str)
def test_a_conversation_is_tokenized_as_it_is_continued(service, more):
    messages = [USER, {"role": "assistant", "content": "y"}] if "continue_final_message" in more else [USER]
    continued = ask(service, CHAT, messages=messages, return_token_ids=True, **more)["choices"][0]["prompt_token_ids"]
    body = service.post("/tokenize", messages=messages, return_token_strs=True, **more).json()
    assert body["tokens"] == continued and body["count"] == len(continued) == len(body["token_strs"])
    assert body["token_strs"][-2 if "continue_final_message" in more else -1] == "<|assistant|>"


def test_a_conversation_is_tokenized_without_a_place_to_speak_where_that_is_asked_for(service):
    whole = service.post("/tokenize", messages=[USER], add_special_tokens=True).json()["tokens"]
    assert service.post("/tokenize", messages=[USER], add_generation_prompt=False).json()["tokens"] == whole[:-1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [USER]}, "messages"),
        ({"prompt": "x", "tools": TOOLS}, "tools"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized_is_refused(service, body, param):
    assert refusal(service.post("/tokenize", **body))["param"] == param


def test_a_text_is_filled_in_where_the_tokenizer_has_marks_for_it_and_refused_where_not(service):
    error = refusal(service.post("/v1/completions", prompt="def ", suffix="return"))
    assert error["param"] == "suffix" and "no fill-in-the-middle tokens" in error["message"]
    assert refusal(service.post("/v1/completions", prompt="x", suffix="y", echo=True))["param"] == "suffix"
    with running_service(chat_template=TEMPLATE) as other:
        known = other.tokenizer.get_added_vocab()
        roles = [known[f"<|{role}|>"] for role in ("system", "user", "tool")]
        names = dict(zip(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), roles, strict=True))
        other.tokenizer.get_added_vocab = lambda: names
        body = {"prompt": "def ", "suffix": "return", "max_tokens": 1, "return_token_ids": True}
        ids = ask(other, "/v1/completions", **body)["choices"][0]["prompt_token_ids"]
        before, between, middle = roles
        assert ids == [before, *other.engine.encode("def "), between, *other.engine.encode("return"), middle]


def test_training_and_serving_write_a_conversation_with_tools_as_the_same_tokens(service):
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}} for i in "12"]
    messages = [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "größer <|tool|>?"},
        {"role": "assistant", "content": "So:", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "second"},
        {"role": "tool", "tool_call_id": "1", "content": "first"},
        {"role": "assistant", "content": "Done."},
    ]
    functions = [tool["function"] for tool in TOOLS]
    for served in (messages, messages[1:]):
        turns = turns_of(read_messages(served, "here", functions).decode())
        encode = FastEncoder(service.tokenizer).encode
        trained = ChatEncoder(service.tokenizer, encode, 1024).encode(turns).ids.tolist()
        body = {"messages": served, "tools": TOOLS, "add_generation_prompt": False}
        assert service.post("/tokenize", **body).json()["tokens"] == trained
        asked = {"messages": served[:-1], "tools": TOOLS, "return_token_ids": True}
        prompt = ask(service, CHAT, **asked)["choices"][0]["prompt_token_ids"]
        assert trained[: len(prompt)] == prompt
