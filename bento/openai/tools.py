"""Functions that a chat model may call: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`.

The functions, the assistant's earlier calls and their results become text (`model/text/chat/tools.py`), with any
chat template. A grammar constrains the answer to text, to calls whose arguments are valid under the functions'
schemas, or to both, depending on `tool_choice`. `CallReader` extracts the calls from the text, also while it streams.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from bento.schema import StrictRequest, forms
from model.text.chat.tools import CALL_TAIL, CLOSING, OPENING, Call, DialogueMessage, call_head

MAX_TOOLS = 128
MAX_CALLS = 16
NAME_PATTERN = "^[a-zA-Z0-9_.:-]{1,128}$"
OTHER_TYPES = ("array", "boolean", "integer", "null", "number", "string")
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    """A schema of arguments; its type defaults to "object"."""
    kind = value.get("type", "object")
    if isinstance(kind, list) or kind in OTHER_TYPES:
        raise PydanticCustomError("parameters", 'expected a schema of the type "object": arguments have names')
    return value


Parameters = Annotated[dict[str, Any], AfterValidator(_parameters)]


class Function(StrictRequest):
    """A function that the model may call."""

    name: Name = Field(description="Its name.")
    description: str | None = Field(None, max_length=16_384, description="Description of the function.")
    parameters: Parameters | None = Field(None, description="JSON schema of its arguments. Default: none.")
    strict: bool | None = Field(None, description="Accepted and ignored: the schema is always enforced.")


def arguments_schema(function: Function) -> dict[str, Any]:
    """The JSON schema of a function's arguments, whose type defaults to object."""
    return {"type": "object", **(function.parameters or NO_ARGUMENTS)}


class Tool(StrictRequest):
    """A tool: functions are the only type."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class NamedTool:
    """The function that must be called."""

    name: str


def _choice(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    if isinstance(value, dict) and _given(value) == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        if isinstance(function, dict) and _given(function) == {"name"} and isinstance(function["name"], str):
            return NamedTool(function["name"])
    raise PydanticCustomError(
        "tool_choice", 'expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


def _given(value: dict[str, Any]) -> set[str]:
    return {name for name, one in value.items() if one is not None}


_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": NAME_PATTERN}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
ToolChoice = Annotated[
    Any, AfterValidator(_choice), forms({"enum": ["none", "auto", "required"]}, _NAMED, {"type": "null"})
]


def _arguments(value: Any) -> Any:
    """Arguments as JSON text: some clients send them as an object, or nothing for a function without any."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value or "{}"


class CalledFunction(StrictRequest):
    """A call's function and arguments."""

    name: Name
    arguments: Annotated[
        str,
        BeforeValidator(_arguments),
        forms({"type": "string"}, {"type": "object", "additionalProperties": True}),
    ] = Field(description="JSON.")


class ToolCall(StrictRequest):
    """A call made by the assistant."""

    id: str | None = Field(None, max_length=256, description="Id by which a result refers to the call.")
    type: Literal["function"] | None = None
    index: int | None = None
    function: CalledFunction


class ToolFields(StrictRequest):
    """The fields of a conversation that concern functions."""

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="Functions that the model may call.")
    tool_choice: ToolChoice = Field(
        None, description="auto, the default: text or calls; none: text; required: calls; a function: a call of it."
    )
    parallel_tool_calls: bool | None = Field(
        None, description=f"Up to {MAX_CALLS} calls in one answer. Default: true; false: one."
    )

    @model_validator(mode="after")
    def _check_tools(self) -> "ToolFields":
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two functions have the same name", {"param": "tools"})
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise PydanticCustomError("no_tools", "only with tools", {"param": "tool_choice"})
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise PydanticCustomError("tool_choice", "no tool has this name", {"param": "tool_choice"})
        return self

    def callable_functions(self) -> list[Function]:
        """The functions that this answer may call."""
        choice = self.tool_choice
        functions = [tool.function for tool in self.tools or ()]
        if choice == "none":
            return []
        if isinstance(choice, NamedTool):
            return [function for function in functions if function.name == choice.name]
        return functions

    def calls_grammar(self) -> str | None:
        """The grammar of the answer, in llguidance's Lark; None if it cannot call."""
        functions = self.callable_functions()
        if not functions:
            return None
        is_named = isinstance(self.tool_choice, NamedTool)
        most = 1 if is_named or self.parallel_tool_calls is False else MAX_CALLS
        more = f' ("\\n{OPENING}" call){{0,{most - 1}}}' if most > 1 else ""
        rules = [f"calls: call{more}"]
        if is_named or self.tool_choice == "required":
            rules.append(f'start: "{OPENING}" calls')
        else:
            rules.append(f"start: before calls | TEXT\nbefore[lazy]: /(?s:.*){OPENING}/")
            rules.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*{OPENING}.*)/")
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
        for number, function in enumerate(functions):
            head = call_head(function.name).removeprefix(OPENING)
            rules.append(f"call_{number}: {_text(head)} arguments_{number} {_text(CALL_TAIL)}")
            schema = {**arguments_schema(function), "x-guidance": {"whitespace_flexible": False}}
            rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
        return "\n".join(rules)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class Content:
    """Text of an answer outside calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. number: among the calls of the answer."""

    number: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of a call's arguments, which are JSON."""

    number: int
    text: str


Part = Content | CallStart | Arguments


class CallReader:
    """Extracts calls from a streamed text that follows `calls_grammar`."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["content", "head", "arguments", "tail"] = "content"
        self.calls = 0

    def push(self, text: str) -> Iterator[Part]:
        """The parts that this text completes."""
        self._held += text
        while True:
            before = self._state, len(self._held)
            yield from getattr(self, f"_read_{self._state}")()
            if (self._state, len(self._held)) == before:
                return

    @property
    def is_inside_call(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._state != "content"

    def flush(self) -> Iterator[Part]:
        """The held-back text at the end. A call without a name is dropped."""
        if self._state == "content" and self._held:
            yield Content(self._held)
        elif self._state == "arguments" and self._held:
            yield Arguments(self.calls - 1, self._held)
        self._held = ""

    def _read_content(self) -> Iterator[Part]:
        at = self._held.find(OPENING)
        if at >= 0:
            text, self._held, self._state = self._held[:at], self._held[at + len(OPENING) :], "head"
        else:
            held = next((n for n in range(len(OPENING) - 1, 0, -1) if self._held.endswith(OPENING[:n])), 0)
            text, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        if text and not (self.calls and text.isspace()):  # each call is on a separate line
            yield Content(text)

    def _read_head(self) -> Iterator[Part]:
        head, comma, rest = self._held.partition(',"arguments":')
        if comma:
            name = json.loads(head.strip() + "}")["name"]
            self._held, self._state = rest, "arguments"
            self.calls += 1
            yield CallStart(self.calls - 1, f"call_{secrets.token_hex(12)}", name)

    def _read_arguments(self) -> Iterator[Part]:
        # JSON without whitespace has no line break: the first one belongs to the closing.
        line, newline, rest = self._held.partition("\n")
        if newline:
            text, self._held, self._state = line[:-1], rest, "tail"
        else:
            text, self._held = (line[:-1], "}") if line.endswith("}") else (line, "")
        if text:
            yield Arguments(self.calls - 1, text)

    def _read_tail(self) -> Iterator[Part]:
        if self._held.startswith(CLOSING):
            self._held, self._state = self._held[len(CLOSING) :], "content"
        yield from ()


def read_answer(text: str, reader: CallReader | None = None) -> tuple[str | None, list[dict[str, Any]]]:
    """The content and the calls of a whole answer in OpenAI's form; content is None if there are only calls."""
    reader = reader or CallReader()
    content, calls = "", list[dict[str, Any]]()
    for part in (*reader.push(text), *reader.flush()):
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, CallStart):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        else:
            calls[-1]["function"]["arguments"] += part.text
    return content or (None if calls else ""), calls


class MessageWithTools(Protocol):
    """A message that may contain calls, or the result of one (role "tool")."""

    @property
    def role(self) -> str:
        """The speaker's role."""

    @property
    def content(self) -> Any:
        """The message's text."""

    @property
    def name(self) -> str | None:
        """The speaker's name."""

    @property
    def tool_calls(self) -> list[ToolCall] | None:
        """The assistant's calls."""

    @property
    def tool_call_id(self) -> str | None:
        """The call that it answers."""


def dialogue_messages(messages: Sequence[MessageWithTools]) -> list[DialogueMessage]:
    """A conversation in the form that is written as text."""
    return [
        DialogueMessage(
            message.role,
            message.content,
            message.name,
            tuple(Call(c.function.name, c.function.arguments, c.id) for c in message.tool_calls or ()),
            message.tool_call_id,
        )
        for message in messages
    ]
