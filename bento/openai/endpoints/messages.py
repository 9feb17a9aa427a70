"""Anthropic's /v1/messages, over the chat path: texts, tools, streams and counted tokens.

`ApiError.response` formats the errors of these paths as Anthropic's.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, Response

from bento.errors import ApiError, anthropic_error
from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING, READING, stream_of
from bento.neutral import is_neutral
from bento.openai.conversation import (
    Block,
    Blocks,
    Conversation,
    Place,
    as_chat,
    encode_dialogue,
    named_event,
    read_conversation,
    send,
    submit,
)
from bento.openai.schema import ChatRequest
from bento.openai.tools import MAX_TOOLS, Name, Parameters
from bento.openai.turns import MAX_MESSAGES, MESSAGE_LABELS
from bento.schema import WHOLE, Count, StrictRequest, TextOrObjects
from bento.serving.answers import Batch
from bento.serving.backend import BackendOf
from model.generation.requests import Finished, TextPiece

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
NAMES = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences", "tool_call_id": "tool_use_id"}
BLOCK_FIELDS = {
    "text": {"text"},
    "tool_use": {"id", "name", "input"},
    "tool_result": {"tool_use_id", "content", "is_error"},
    "thinking": {"thinking", "signature"},
    "redacted_thinking": {"data"},
}
BLOCK_LABELS = {"type", "cache_control", "citations", "caller"}
ANSWER_FIELDS = {"container", "stop_details", "stop_reason", "stop_sequence", "type", "usage"}
"""Fields of an answer beside its labels, which clients append to the conversation whole."""
BLOCKS_OF = {"user": {"text", "tool_result"}, "assistant": BLOCK_FIELDS.keys() - {"tool_result"}}


class AnthropicTool(StrictRequest):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = Field(None, max_length=16_384)
    input_schema: Parameters = Field(description="JSON schema of its arguments.")
    strict: bool | None = Field(None, description="Accepted and ignored: the schema is always enforced.")
    cache_control: dict[str, Any] | None = Field(None, description="Accepted and ignored.")


class AnthropicChoice(StrictRequest):
    """Whether functions are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> "AnthropicChoice":
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError(
                "tool_choice", "expected name with the type tool, and only then", {"param": "tool_choice"}
            )
        return self


class AnthropicMessage(StrictRequest):
    """One turn, or an earlier answer as it came."""

    @model_validator(mode="before")
    @classmethod
    def _drop_labels(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: one for name, one in value.items() if name not in MESSAGE_LABELS | ANSWER_FIELDS}

    role: Literal["user", "assistant"]
    content: TextOrObjects = Field(description="A text, or blocks: text, tool_use, tool_result.")


class Thinking(StrictRequest):
    """Thinking is not supported."""

    type: Literal["disabled"]


class CountRequest(StrictRequest):
    """A conversation whose tokens are counted."""

    model: str | None = Field(None, description="The served model, the only one; /v1/models names it.")
    messages: list[AnthropicMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far; a last message of the assistant's is continued.",
        examples=[[{"role": "user", "content": "Write a function."}]],
    )
    system: TextOrObjects | None = Field(None, description="Instructions before the conversation.")
    cache_control: dict[str, Any] | None = Field(None, description="Accepted and ignored.")
    tools: list[AnthropicTool] | None = Field(None, max_length=MAX_TOOLS, description="Functions.")
    tool_choice: AnthropicChoice | None = Field(None, description="Default: auto.")
    thinking: Thinking | None = Field(None, description='Not supported: only null, {"type": "disabled"}.')


class MessagesRequest(CountRequest):
    """A conversation to continue."""

    max_tokens: Count = Field(description="Most tokens to generate.", examples=[16])
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false.")
    stop_sequences: list[str] | None = Field(None, description="End the text when one of these strings appears.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the most likely token. Default: 1.")
    top_k: Annotated[int, WHOLE] | None = Field(
        None, ge=-1, le=2**31 - 1, description="Draw from this many most likely tokens. Default: all."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Draw from the most likely tokens with this total probability. Default: 1."
    )
    metadata: dict[str, Any] | None = Field(None, max_length=16, description="Accepted and ignored.")
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="There is one tier.")


class MessageUsage(BaseModel):
    """Tokens of the request."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class MessageResponse(BaseModel):
    """The answer. content: blocks of the types text and tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class CountResponse(BaseModel):
    """Tokens of a conversation."""

    input_tokens: int


def message_routes(backend_of: BackendOf) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["Anthropic"])

    @router.post(
        "/messages",
        response_model=MessageResponse,
        responses={200: stream_of("message_start"), **GENERATING},
        summary="Continue a conversation",
    )
    async def create(body: MessagesRequest, request: Request) -> Response:
        backend = backend_of(request, body.model)
        chat = _as_chat(body)
        conversation = await read_conversation(backend, chat, NAMES)
        answers = submit(backend, request, chat, conversation)
        form = _Form(request.state.record.id, backend.model_name, conversation)
        return await send(request, answers, form, is_stream=bool(body.stream))

    @router.post("/messages/count_tokens", response_model=CountResponse, responses=READING, summary="Count tokens")
    async def count(body: CountRequest, request: Request) -> Response:
        backend = backend_of(request, body.model)
        return JSONResponse({"input_tokens": len(await encode_dialogue(backend, _as_chat(body), NAMES))})

    return router


def _as_chat(body: CountRequest) -> ChatRequest:
    messages: list[dict[str, Any]] = []
    places: list[Place] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
        places.append(("system",))
    for number, message in enumerate(body.messages):
        is_last = number == len(body.messages) - 1
        messages += _plain(message, f"messages[{number}].content", is_last=is_last)
        places += [("messages", number, "content")] * (len(messages) - len(places))
    fields: dict[str, Any] = {"model": body.model, "messages": messages}
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in ("temperature", "top_k", "top_p")}
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or None}
    if messages[-1]["role"] == "assistant":
        fields["continue_final_message"] = True
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.input_schema},
            }
            for t in body.tools
        ]
    if choice := body.tool_choice:
        named = {"type": "function", "function": {"name": choice.name or ""}}
        fields["tool_choice"] = named if choice.type == "tool" else CHOICES[choice.type]
        fields["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    return as_chat(fields, NAMES, places)


def _plain(message: AnthropicMessage, place: str, *, is_last: bool) -> Iterator[dict[str, Any]]:
    """A turn as messages of the chat route: results of calls become separate messages."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    if not message.content and not (is_last and message.role == "assistant"):
        raise _refusal(place, "expected at least one block")
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        here = f"{place}[{number}]"
        kind = _kind(block, message.role, here)
        if kind == "text" and calls:
            raise _refusal(here, "expected calls at the end: the model writes no text after them")
        if kind == "text":
            texts.append(_text([block], here))
        elif kind == "tool_use":
            calls.append(_call(block, here))
        elif kind == "tool_result" and texts:
            raise _refusal(here, "expected results of tools first, before any text")
        elif kind == "tool_result":
            yield _result(block, here)
    if texts or calls or message.role == "assistant":
        yield {"role": message.role, "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}


def _kind(block: dict[str, Any], role: str, place: str) -> str:
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in BLOCKS_OF[role]:
        raise _refusal(place, f"a block of the type {str(kind)[:40]!r} is not supported here: the model reads text")
    _check_fields(block, kind, place)
    return kind


def _check_fields(block: dict[str, Any], kind: str, place: str) -> None:
    for name in sorted(block.keys() - BLOCK_FIELDS[kind] - BLOCK_LABELS):
        if not is_neutral(name, block[name]):
            raise _refusal(place, f"{name[:40]!r} is not a field of a block of the type {kind}")


def _call(block: dict[str, Any], place: str) -> dict[str, Any]:
    name, number = block.get("name"), block.get("id")
    if not isinstance(name, str) or not isinstance(number, str) or not isinstance(block.get("input"), dict):
        raise _refusal(place, "expected id, a string, name, a string, and input, an object")
    arguments = json.dumps(block["input"], ensure_ascii=False)
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(block: dict[str, Any], place: str) -> dict[str, Any]:
    number, is_error = block.get("tool_use_id"), block.get("is_error")
    if not isinstance(number, str):
        raise _refusal(place, "expected tool_use_id, a string")
    if is_error is not None and not isinstance(is_error, bool):
        raise _refusal(place, "expected true or false as is_error")
    content = block.get("content")
    text = "" if content is None or content == [] else _text(content, place)
    return {"role": "tool", "tool_call_id": number, "content": f"Error: {text}" if is_error else text}


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
        for block in value
    ):
        for number, block in enumerate(value):
            _check_fields(block, "text", f"{place}[{number}]")
        return "\n".join(block["text"] for block in value)
    raise _refusal(place, "expected a text or blocks of the type text")


def _refusal(place: str, reason: str) -> ApiError:
    return ApiError(400, f"{place}: {reason}", code="invalid_content", param=place.partition("[")[0])


class _Form:
    """One answer in Anthropic's form."""

    def __init__(self, number: str, model: str, conversation: Conversation) -> None:
        self._blocks = Blocks(conversation.may_call)
        self._prompt_tokens = len(conversation.prompt.ids)
        self._head = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": model}

    def failure(self, error: ApiError) -> str:
        """An error after the first event."""
        return named_event("error", anthropic_error(error))

    def whole(self, text: str, last: Finished) -> dict[str, Any]:
        """The answer in one piece."""
        list(self._blocks.push(text)), list(self._blocks.finish())
        content = [_block(block, is_whole=True) for block in self._blocks.all]
        return {**self._head, "content": content, **self._stop(last), "usage": self._usage(last)}

    async def stream(self, batches: AsyncGenerator[Batch]) -> AsyncGenerator[str]:
        """Named events."""
        none = {"stop_reason": None, "stop_sequence": None}
        message: dict[str, Any] = {**self._head, "content": [], **none, "usage": self._usage(None)}
        start = named_event("message_start", {"type": "message_start", "message": message})
        async for batch in batches:
            out, start = start, ""
            for _, event in batch:
                if isinstance(event, TextPiece):
                    out += self._events(event.text, None)
                elif isinstance(event, Finished):
                    out += self._events("", event)
            if out:
                yield out

    def _events(self, text: str, last: Finished | None) -> str:
        out = ""
        for kind, block, delta in (*self._blocks.push(text), *(self._blocks.finish() if last else ())):
            name = {"open": "content_block_start", "delta": "content_block_delta", "close": "content_block_stop"}[kind]
            data: dict[str, Any] = {"type": name, "index": block.number}
            if kind == "open":
                data["content_block"] = _block(block, is_whole=False)
            elif kind == "delta" and block.call:
                data["delta"] = {"type": "input_json_delta", "partial_json": delta}
            elif kind == "delta":
                data["delta"] = {"type": "text_delta", "text": delta}
            out += named_event(name, data)
        if last:
            end = {"type": "message_delta", "delta": self._stop(last), "usage": self._usage(last)}
            out += named_event("message_delta", end) + named_event("message_stop", {"type": "message_stop"})
        return out

    def _stop(self, last: Finished) -> dict[str, Any]:
        stopped_by = last.stopped_by if isinstance(last.stopped_by, str) else None
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif any(block.call for block in self._blocks.all):
            reason = "tool_use"
        else:
            reason = "end_turn" if stopped_by is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stopped_by}

    def _usage(self, last: Finished | None) -> dict[str, int]:
        cached = last.cached_tokens if last else 0
        return {
            "input_tokens": self._prompt_tokens - cached,
            "output_tokens": last.generated_tokens if last else 0,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }


def _block(block: Block, *, is_whole: bool) -> dict[str, Any]:
    if block.call is None:
        return {"type": "text", "text": block.text if is_whole else ""}
    value: Any = {}
    if is_whole:
        try:
            value = json.loads(block.text)
        except (ValueError, RecursionError):  # max_tokens cut it off, or it only opens brackets
            value = {}
    return {"type": "tool_use", "id": block.call.id.replace("call_", "toolu_"), "name": block.call.name, "input": value}
