"""The message schemas of the chat route."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from bento.neutral import EMPTY, is_neutral
from bento.openai.tools import ToolCall
from bento.schema import StrictRequest, forms

MAX_MESSAGES = 1024
MAX_LABEL_LENGTH = 512
MESSAGE_LABELS = {
    "annotations", "cache_control", "created", "id", "metadata", "model", "phase", "provider_specific_fields",
    "reasoning", "reasoning_content",
    "reasoning_details", "refusal", "status", "thinking", "thinking_blocks", "timestamp",
}  # fmt: skip
"""Message fields that clients copy from other servers' answers; no chat template here reads them."""
OWN_TEMPLATE_VALUES = {"chat_template", "conversation", "messages", "tokenize", "tools"}
"""Names that the service gives to the chat template's renderer."""
PART_LABELS = {"annotations", "cache_control", "id", "logprobs"}
PART_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of the parts that are texts, with the field that has the text: those of the chat route and of /v1/responses."""

Label = Annotated[str, Field(max_length=MAX_LABEL_LENGTH)]


def unsupported(*neutral: str) -> Any:
    """An unsupported field: only its neutral values are accepted."""
    names = ", ".join(("null", *neutral))
    return Field(None, description=f"Not supported: only {names}.")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [part_text(part) for part in value]
        if None not in texts:
            return "\n".join(text for text in texts if text is not None)
        raise PydanticCustomError("content_part", 'the model reads text: expected parts {"type": "text", "text": ...}')
    raise PydanticCustomError("content_type", "expected a string or a list of text parts")


def _is_without_text(message: dict[str, Any]) -> bool:
    """Whether a message has no text: content null, or only calls."""
    if "content" not in message or message["content"] == []:
        return bool(message.get("tool_calls"))
    return message["content"] is None


def part_text(part: Any) -> str | None:
    """The text of a part; None if it has another type, or a field that is not read."""
    kind = part.get("type") if isinstance(part, dict) else None
    field = PART_TEXTS.get(kind) if isinstance(kind, str) else None
    if field is None or not isinstance(part.get(field), str):
        return None
    extras = {name: one for name, one in part.items() if name not in ("type", field)}
    is_taken = all(name in PART_LABELS or is_neutral(name, one) for name, one in extras.items())
    return part[field] if is_taken else None


def _part_schema(kind: str, field: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, field: {"type": "string"}, **{key: {} for key in sorted(PART_LABELS)}},
        "required": ["type", field],
        "additionalProperties": {"anyOf": EMPTY},
    }


_PART = {"anyOf": [_part_schema(*item) for item in PART_TEXTS.items()]}
Content = Annotated[
    Any,
    AfterValidator(_content),
    forms({"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}, {"type": "null"}),
]


def _template_values(values: dict[str, Any]) -> dict[str, Any]:
    for name in values.keys() & OWN_TEMPLATE_VALUES:
        raise PydanticCustomError("template_value", "{name} cannot be set here", {"name": name})
    return values


TemplateValues = Annotated[dict[str, Any], AfterValidator(_template_values)]
"""Values of a chat template's variables, by name."""


class Message(StrictRequest):
    """One turn of a conversation."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unread_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {name: one for name, one in value.items() if name not in MESSAGE_LABELS}
        if kept.get("role") == "assistant" and _is_without_text(kept):
            kept["content"] = ""
        return kept

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Author of the message.")
    content: Content = Field(description="The message: a text, or parts that are texts.")
    name: Label | None = Field(None, description="Given to the chat template, which may use it.")
    audio: None = unsupported()
    tool_calls: list[ToolCall] | None = Field(
        None, max_length=MAX_MESSAGES, description="The assistant's: calls that it made."
    )
    tool_call_id: str | None = Field(
        None, max_length=256, description="The tool's: the id of the call whose result it is."
    )
    function_call: None = unsupported()

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "tool_calls: only the assistant makes calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("tool_call_id", "expected tool_call_id with the role tool, and only then")
        return self
