"""/v1/messages through the `anthropic` package: texts, functions, streams, counted tokens and errors."""

import json
from collections.abc import Iterator

import anthropic
import pytest

from tests.bento.openai_service import CHAT_TEMPLATE, MODEL, Service, on_a_port, running_service

USER = [{"role": "user", "content": "größer?"}]
TOOL = {
    "name": "pick",
    "description": "Picks.",
    "input_schema": {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
GREEDY = {"model": MODEL, "max_tokens": 12, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(chat_template=CHAT_TEMPLATE, context=1024, api_keys=["secret"]) as running:
        yield running


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with on_a_port(service.app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as made:
        yield made


def test_a_message_is_answered_and_streamed_alike(client):
    whole = client.messages.create(messages=USER, system="Be terse.", **GREEDY)
    assert whole.role == "assistant" and whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 12
    with client.messages.stream(messages=USER, system=[{"type": "text", "text": "Be terse."}], **GREEDY) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == whole.content[0].text == streamed.content[0].text
    assert streamed.stop_reason == "max_tokens" and streamed.usage.output_tokens == 12


def test_tokens_are_counted_as_they_are_used(client):
    counted = client.messages.count_tokens(model=MODEL, messages=USER)
    usage = client.messages.create(messages=USER, **GREEDY).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_a_stop_sequence_is_named(client):
    text = client.messages.create(messages=USER, **GREEDY).content[0].text
    stop = next(text[at : at + 2] for at in range(2, len(text) - 2) if "\ufffd" not in text[at : at + 2])
    message = client.messages.create(messages=USER, stop_sequences=[stop], **GREEDY)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_a_last_message_of_the_assistants_is_continued(client):
    first = client.messages.create(messages=USER, **{**GREEDY, "max_tokens": 4})
    prefill = [*USER, {"role": "assistant", "content": first.content[0].text}]
    counted = client.messages.count_tokens(model=MODEL, messages=prefill).input_tokens
    assert counted < client.messages.count_tokens(model=MODEL, messages=[*prefill, *USER]).input_tokens
    assert client.messages.create(messages=prefill, **GREEDY).content


def test_an_answer_is_appended_as_it_came(client):
    first = client.messages.create(messages=USER, **GREEDY)
    plain = {"role": "assistant", "content": first.content[0].text}
    whole = {**first.model_dump(mode="json"), "cache_control": {"type": "ephemeral"}}
    counts = {
        client.messages.count_tokens(model=MODEL, messages=[*USER, message, *USER]).input_tokens
        for message in (plain, whole, {**plain, "id": "msg_1", "timestamp": 1})
    }
    assert len(counts) == 1


def test_functions_are_called_streamed_and_their_results_read(client):
    asked = {**GREEDY, "max_tokens": 100, "tools": [TOOL], "messages": USER}
    for choice in ({"type": "tool", "name": "pick"}, {"type": "any", "disable_parallel_tool_use": True}):
        message = client.messages.create(tool_choice=choice, **asked)
        (call,) = message.content
        assert call.type == "tool_use" and call.name == "pick" and call.input["n"] in (1, 2)
        assert message.stop_reason == "tool_use"
        with client.messages.stream(tool_choice=choice, **asked) as stream:
            streamed = stream.get_final_message()
        assert streamed.content[0].input == call.input and streamed.stop_reason == "tool_use"
    results = [
        *USER,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "7"}]}],
        },
    ]
    after = client.messages.create(**{**asked, "messages": results, "max_tokens": 3})
    assert after.usage.input_tokens + after.usage.cache_read_input_tokens > message.usage.input_tokens


def test_errors_have_the_packages_classes_and_shape(url, client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(messages=USER, **{**GREEDY, "model": "claude"})
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="is not supported here") as caught:
        client.messages.create(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}], **GREEDY)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(
        anthropic.BadRequestError, match=r"prompt is too long: .* maximum context length is 1024 tokens"
    ):
        client.messages.create(messages=[{"role": "user", "content": "word " * 1024}], **GREEDY)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(messages=USER, **{**GREEDY, "max_tokens": 0})
    with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            stranger.messages.create(messages=USER, **GREEDY)
        assert refused.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "bad",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"tools": [{**TOOL, "input_schema": {"type": "objekt"}}]},
        {"tool_choice": {"type": "tool", "name": "gone"}, "tools": [TOOL]},
        {"color": 1},
        {"messages": []},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "pick"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"top_p": 2},
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_cannot_be_done_is_refused(client, bad):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{"messages": USER, **GREEDY, "extra_body": bad})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
