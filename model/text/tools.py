"""How functions that a model may call, its calls and their results are written as text in a conversation.

A call is the assistant's text `<tool_call>`, a line of JSON and `</tool_call>`, as models of the Hermes and Qwen
families write it. The JSON has no white space between its parts. Serving constrains a model to this form; a corpus that
teaches calls should be written by these functions.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"


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
    """What a function answered, as a turn of the user."""
    return f"<tool_response>\n{content}\n</tool_response>"


def compact(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
