"""How functions that a model may call, its calls and their results are written as text in a conversation.

A call is the assistant's text `<tool_call>`, a line of JSON and `</tool_call>`, as models of the Hermes and Qwen
families write it. The JSON has no white space between its parts. `plain_turns` writes a whole conversation, for
training and for serving alike; serving constrains a model's answers to this form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A call of a function. arguments: JSON. id: by which a result refers to it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class DialogueMessage:
    """A message. calls: the assistant's. answers: id of the call that a result (role "tool") belongs to."""

    role: str
    content: str
    name: str | None = None
    calls: tuple[Call, ...] = ()
    answers: str | None = None


@dataclass(frozen=True)
class PlainTurn:
    """A message as a chat template takes it."""

    role: str
    content: str
    name: str | None = None


def plain_turns(
    messages: Sequence[DialogueMessage], tools: Sequence[Mapping[str, Any]], *, has_tool_role: bool
) -> list[PlainTurn]:
    """A conversation with tools, calls and results as text.

    Tools are listed in the system's message, a message's calls after its text, results in the order of the calls.
    has_tool_role: whether the chat template has turns of the role "tool"; results are else written in the user's.
    """
    turns: list[PlainTurn] = []
    was_result = False
    for message in _in_order(messages):
        calls = [write_call(call.name, _compacted(call.arguments)) for call in message.calls]
        content = "\n".join([*([message.content] if message.content or not calls else []), *calls])
        is_result = message.role == "tool" and not has_tool_role
        if is_result:
            content = write_result(content)
            if was_result:
                content = f"{turns.pop().content}\n{content}"
        turns.append(PlainTurn("user" if is_result else message.role, content, message.name))
        was_result = is_result
    if tools:
        shown = describe_tools(tools)
        if turns and turns[0].role in ("system", "developer"):
            turns[0] = replace(turns[0], content=f"{turns[0].content}\n\n{shown}")
        else:
            turns.insert(0, PlainTurn("system", shown))
    return turns


def has_unpaired_results(messages: Sequence[DialogueMessage]) -> bool:
    """Whether a result belongs to none of the calls before it, or a call lacks its result while others have one.

    Results without ids, and those of calls without ids or with one id for several, keep their places.
    """
    calls: list[str | None] = []
    answered: list[str | None] = []
    for message in [*messages, DialogueMessage("", "")]:
        if message.role == "tool":
            answered.append(message.answers)
            continue
        is_named = bool(calls and answered) and None not in [*calls, *answered] and len(set(calls)) == len(calls)
        if is_named and sorted(map(str, answered)) != sorted(map(str, calls)):
            return True
        calls, answered = [call.id for call in message.calls], []
    return False


def _in_order(messages: Sequence[DialogueMessage]) -> list[DialogueMessage]:
    """The messages with each call's result in the call's place."""
    ordered: list[DialogueMessage] = []
    calls: list[str | None] = []
    for message in messages:
        ordered.append(message)
        if message.role != "tool":
            calls = [call.id for call in message.calls]
            continue
        first = len(ordered) - 1
        while first and ordered[first - 1].role == "tool":
            first -= 1
        results = ordered[first:]
        if None not in calls and all(result.answers in calls for result in results):
            ordered[first:] = sorted(results, key=lambda result: calls.index(result.answers))
    return ordered


def _compacted(arguments: str) -> str:
    """A call's arguments as the model writes them; text that is not JSON stays unchanged."""
    try:
        return compact(json.loads(arguments))
    except (ValueError, RecursionError):
        return arguments


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text before a conversation that says which functions there are. tools: name, description, parameters (a JSON
    schema) of each.
    """
    lines = "\n".join(
        compact({key: tool[key] for key in ("name", "description", "parameters") if tool.get(key)}) for tool in tools
    )
    return (
        f"You can call these functions:\n{lines}\n"
        f'A call is written {OPENING}, a line {{"name":...,"arguments":{{...}}}} and {CLOSING}.'
    )


def call_head(name: str) -> str:
    """A call's text before its arguments."""
    return f'{OPENING}\n{{"name":{compact(name)},"arguments":'


CALL_TAIL = "}\n" + CLOSING
"""A call's text after its arguments."""


def write_call(name: str, arguments: str) -> str:
    """A call. arguments: JSON."""
    return call_head(name) + arguments + CALL_TAIL


def write_result(content: str) -> str:
    """A function's result as a turn of the user."""
    return f"<tool_response>\n{content}\n</tool_response>"


def compact(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
