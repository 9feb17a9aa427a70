"""Records of conversations: `messages` of roles, ShareGPT's `from` and `value`, or a prompt and its response.

Functions (`tools` beside the messages), calls of them (`tool_calls`) and their results (role `tool`) become text, as
the service writes them: `model.text.chat.tools`.

Each becomes the document that `model.text.chat.template.document` writes. A record without one raises PipelineError
with its place and the problem. Nothing is encoded or cut here: that is `model.text.chat.template`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import PipelineError, json_type, names_of, not_json
from model.settings import CorpusSettings
from model.text.chat.template import MARKS, Turn, document, text_of
from model.text.chat.tools import Call, DialogueMessage, compact, plain_turns

ROLES = {
    **{role: role for role in MARKS},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""The roles of messages, and the names that datasets give them."""


def conversation(row: dict[str, Any], settings: CorpusSettings, where: str) -> bytes:
    """The document of one record, UTF-8; a text that has none stays invalid, for the corpus to count.

    Raises PipelineError for a record that holds no conversation under the names of `settings`.
    """
    if settings.messages_field and settings.messages_field in row:
        tools = _tools(row.get("tools"), f"{where}, tools")
        return read_messages(row[settings.messages_field], f"{where}, {settings.messages_field}", tools)
    missing = [name for name in (settings.text_field, settings.response_field) if name not in row]
    if not settings.response_field or missing:
        name, setting = (
            (settings.messages_field, "corpus.messages_field")
            if settings.messages_field
            else (missing[0], "corpus.text_field" if missing[0] == settings.text_field else "corpus.response_field")
        )
        raise PipelineError(f"{where} has no field {name!r}; found: {names_of(row)}; set {setting} to one of them")
    return prompt_and_response(row[settings.text_field], row[settings.response_field], where)


def prompt_and_response(prompt: object, response: object, where: str) -> bytes:
    """The document of a prompt and its response. Raises PipelineError if one is not text or the response is empty."""
    if not isinstance(prompt, str) or not isinstance(response, str) or not response:
        kind = "an empty string" if response == "" else f"a {json_type(response)}"
        raise PipelineError(
            f"{where}: found a {json_type(prompt)} as prompt and {kind} as response; expected text, the response not "
            "empty; correct or remove it"
        )
    prompt, response = prompt.removeprefix("\ufeff"), response.removeprefix("\ufeff")
    return _encode([Turn("user", prompt), Turn("assistant", response)])


def read_messages(messages: object, where: str, tools: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """The document of a list of messages, each {role, content} or {from, value}. tools: the functions to call."""
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else f"a {json_type(messages)}"
        raise PipelineError(f"{where} is {found}; expected a list of messages, each with role and content")
    said = [_read_message(message, f"{where}[{index}]") for index, message in enumerate(messages)]
    return _encode([Turn(turn.role, turn.content) for turn in plain_turns(said, tools, has_tool_role=True)])


def _read_message(message: object, where: str) -> DialogueMessage:
    if not isinstance(message, dict):
        raise PipelineError(f"{where} is a {json_type(message)}; expected an object with role and content")
    # Tables give every row all fields of a struct, null if the record had none.
    if message.get("role") is None and message.get("from") is not None:
        message = {"role": message["from"], "content": message.get("value")}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise PipelineError(f"{where}.role is {role!r}; expected one of {', '.join(sorted(ROLES))}")
    calls = _calls(message, where)
    if calls and ROLES[role] != "assistant":
        raise PipelineError(f"{where} has tool_calls and the role {role!r}; only the assistant makes calls")
    message = {**message, "role": ROLES[role]}
    if calls and not message.get("content"):
        message["content"] = ""
    answers = message.get("tool_call_id")
    try:
        return DialogueMessage(
            ROLES[role], text_of(message), None, calls, answers if isinstance(answers, str) else None
        )
    except ValueError as error:
        raise PipelineError(f"{where}.{error}; correct or remove it") from error


def _calls(message: dict[str, Any], where: str) -> tuple[Call, ...]:
    """A message's calls, each `{"function": {"name", "arguments"}}` or the inner object alone."""
    given = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    calls = []
    for index, call in enumerate(_list(given)):
        inner = (call.get("function") or call) if isinstance(call, dict) else None
        name, arguments = (inner.get("name"), inner.get("arguments")) if isinstance(inner, dict) else (None, None)
        if not isinstance(name, str) or not name or not isinstance(arguments, str | dict | None):
            raise PipelineError(
                f"{where} has tool_calls, but number {index} is not a call; expected "
                '{"type": "function", "function": {"name": ..., "arguments": JSON}}'
            )
        if isinstance(arguments, dict):
            # A table's struct has the arguments of all calls, null if this one had none.
            arguments = compact({key: value for key, value in arguments.items() if value is not None})
        number = call.get("id")
        calls.append(Call(name, arguments or "{}", number if isinstance(number, str) else None))
    return tuple(calls)


def _tools(given: object, where: str) -> list[dict[str, Any]]:
    """A record's functions; none if it has none. Tables keep them as JSON."""
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise PipelineError(
                f"{where} is a text that is not JSON ({not_json(error)}); expected a list of functions"
            ) from None
    if not given:
        return []
    functions = [(one.get("function") or one) if isinstance(one, dict) else None for one in _list(given)]
    wrong = next((n for n, one in enumerate(functions) if not isinstance(one, dict) or not one.get("name")), None)
    if wrong is not None:
        raise PipelineError(
            f"{where}[{wrong}] is not a function; expected "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}'
        )
    return [one for one in functions if isinstance(one, dict)]


def _list(given: object) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _encode(turns: list[Turn]) -> bytes:
    return document(turns).encode("utf-8", "surrogatepass")
