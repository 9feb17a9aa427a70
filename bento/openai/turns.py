"""The message schemas of the chat route."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from bento.neutral import EMPTY, is_neutral
from bento.openai.tools import ToolCall
from bento.schema import StrictRequest, forms

MAX_MESSAGES = 1024
LONGEST_LABEL = 512
MESSAGE_LABELS = {
    "annotations", "cache_control", "created", "id", "metadata", "model", "phase", "provider_specific_fields",
    "reasoning", "reasoning_content",
    "reasoning_details", "refusal", "status", "thinking", "thinking_blocks", "timestamp",
}  # fmt: skip
"""Message fields that clients copy from other servers' answers; no chat template here reads them."""
OWN_TEMPLATE_VALUES = {"chat_template", "conversation", "messages", "tokenize", "tools"}
"""Names that the service gives to the chat template's renderer."""
PART_LABELS = {"annotations", "cache_control", "id"}

Label = Annotated[str, Field(max_length=LONGEST_LABEL)]


def unsupported(*neutral: str) -> Any:
    """An unsupported field: only its neutral values are accepted."""
    names = ", ".join(("null", *neutral))
    return Field(None, description=f"Not supported: only {names}.")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(part, dict) and _is_text_part(part) for part in value):
            texts = [part["text"] for part in value if part["type"] == "text"]
            if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
                return "\n".join(texts)
        raise PydanticCustomError("content_part", 'the model reads text: expected parts {"type": "text", "text": ...}')
    raise PydanticCustomError("content_type", "expected a string or a list of text parts")


def _is_without_text(message: dict[str, Any]) -> bool:
    """Whether a message has no text: content null, or only calls."""
    if "content" not in message or message["content"] == []:
        return bool(message.get("tool_calls"))
    return message["content"] is None


def _is_text_part(part: dict[str, Any]) -> bool:
    extras = part.keys() - {"type", "text"}
    return {"type", "text"} <= part.keys() and all(
        name in PART_LABELS or is_neutral(name, part[name]) for name in extras
    )


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}, **{key: {} for key in sorted(PART_LABELS)}},
    "required": ["type", "text"],
    "additionalProperties": {"anyOf": EMPTY},
}
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

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
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
