"""OpenAI's /v1/responses, over the chat path. Nothing is stored: a request contains its whole conversation."""

import json
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from bento.errors import ApiError
from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING, stream_of
from bento.neutral import is_neutral
from bento.openai.conversation import (
    Block,
    Blocks,
    Conversation,
    Place,
    as_chat,
    named_event,
    read_conversation,
    send,
    submit,
)
from bento.openai.schema import ChatRequest
from bento.openai.structured import Schema
from bento.openai.tools import MAX_TOOLS, Name, Parameters
from bento.openai.turns import MAX_MESSAGES, MESSAGE_LABELS, Label, part_text, unsupported
from bento.schema import Count, OnlyFalse, StrictRequest, TextOrObjects, forms
from bento.serving.answers import Batch
from bento.serving.backend import BackendOf
from model.generation.requests import Finished, TextPiece

NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "tool_call_id": "call_id",
}
ROLES = ("user", "assistant", "system", "developer")


class ResponseTool(StrictRequest):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = Field(None, max_length=16_384)
    parameters: Parameters | None = None
    strict: bool | None = None


class TextFormat(StrictRequest):
    """The format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    json_schema: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(StrictRequest):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = unsupported('"medium"')


class Reasoning(StrictRequest):
    """Reasoning is not supported."""

    effort: Literal["none"] | None = unsupported('"none"')
    summary: None = unsupported()


def _not_empty(value: Any) -> Any:
    if not value:
        raise PydanticCustomError("empty_input", "there is nothing to answer")
    return value


def _choice(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    if isinstance(value, dict) and value.keys() == {"type", "name"} and value["type"] == "function":
        return value
    raise PydanticCustomError("tool_choice", 'expected "none", "auto", "required" or {"type": "function", "name": ...}')


_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
    "additionalProperties": False,
}
ToolChoice = Annotated[
    Any, AfterValidator(_choice), forms({"enum": ["none", "auto", "required"]}, _NAMED, {"type": "null"})
]


class ResponsesRequest(StrictRequest):
    """A conversation to continue."""

    model: str | None = Field(None, description="The served model, the only one; /v1/models names it.")
    input: Annotated[TextOrObjects, AfterValidator(_not_empty)] = Field(
        description="A text of the user's, or items: messages, function_call, function_call_output.",
        examples=["Write a function."],
    )
    instructions: str | None = Field(None, description="Instructions before the conversation.")
    max_output_tokens: Count | None = Field(
        None, description="Most tokens to generate. Default: as many as fit.", examples=[16]
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the most likely token. Default: 1.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Draw from the most likely tokens with this total probability. Default: 1."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false.")
    text: TextOptions | None = Field(None, description="`format`: text, json_object or json_schema.")
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS, description="Functions.")
    tool_choice: ToolChoice = Field(
        None, description='Default: auto. {"type": "function", "name": ...}: a call of this function.'
    )
    parallel_tool_calls: bool | None = Field(None, description="Several calls in one answer. Default: true.")
    reasoning: Reasoning | None = Field(None, description="Not supported, except the effort none.")
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(None, description="There is no reasoning.")
    store: bool | None = Field(None, description="Accepted and ignored: nothing is stored.")
    truncation: Literal["disabled"] | None = unsupported('"disabled"')
    background: OnlyFalse | None = unsupported("false")
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = unsupported("0")
    previous_response_id: None = unsupported()
    conversation: None = unsupported()
    prompt: None = unsupported()
    max_tool_calls: None = unsupported()
    stream_options: dict[str, OnlyFalse] | None = Field(None, description="Only include_obfuscation: false.")
    metadata: dict[Label, Label] | None = Field(
        None, max_length=16, description="Returned in the answer, and otherwise ignored."
    )
    user: Label | None = Field(None, description="Accepted and ignored.")
    safety_identifier: Label | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: Label | None = Field(None, description="Accepted and ignored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one tier.")


class ResponseUsage(BaseModel):
    """Tokens of the request."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """The answer. output: items of the types message and function_call."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage


def response_routes(backend_of: BackendOf) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])

    @router.post(
        "/responses",
        response_model=ResponseObject,
        responses={200: stream_of("response.created"), **GENERATING},
        summary="Continue a conversation",
    )
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        backend = backend_of(request, body.model)
        chat = _as_chat(body)
        conversation = await read_conversation(backend, chat, NAMES)
        answers = submit(backend, request, chat, conversation)
        form = _Form(request.state.record.id, backend.model_name, body, conversation)
        return await send(request, answers, form, is_stream=bool(body.stream))

    return router


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if len(items) > MAX_MESSAGES:
        raise _refusal("input", f"{len(items):,} items: at most {MAX_MESSAGES:,}")
    messages: list[dict[str, Any]] = []
    places: list[Place] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
        places.append(("instructions",))
    for number, item in enumerate(items):
        _add_item(messages, item, f"input[{number}]")
        places += [("input", number)] * (len(messages) - len(places))
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    if body.tools:
        shown = [tool.model_dump(exclude={"type"}) for tool in body.tools]
        fields["tools"] = [{"type": "function", "function": function} for function in shown]
    fields["parallel_tool_calls"] = body.parallel_tool_calls
    if isinstance(body.tool_choice, dict):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice["name"]}}
    else:
        fields["tool_choice"] = body.tool_choice
    form = body.text.format if body.text else None
    if form and (form.type == "json_schema") != (form.json_schema is not None):
        raise _refusal("text", "expected format.schema with the type json_schema, and only then")
    if form and form.type == "json_schema":
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.json_schema}}
    elif form:
        fields["response_format"] = {"type": form.type}
    return as_chat(fields, NAMES, places)


ITEM_FIELDS = {
    "message": {"role", "content"},
    "function_call": {"name", "arguments", "call_id"},
    "function_call_output": {"call_id", "output"},
    "reasoning": {"summary", "content", "encrypted_content"},
}
ITEM_LABELS = {"type", *MESSAGE_LABELS}


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], place: str) -> None:
    kind = "message" if item.get("type") is None else item["type"]
    if not isinstance(kind, str) or kind not in ITEM_FIELDS:
        raise _refusal(place, f"an item of the type {str(kind)[:40]!r} is not supported")
    for name in sorted(item.keys() - ITEM_FIELDS[kind] - ITEM_LABELS):
        if not is_neutral(name, item[name]):
            raise _refusal(place, f"{name[:40]!r} is not a field of a {kind}")
    if kind == "message":
        if item.get("role") not in ROLES:
            raise _refusal(place, f"expected a role of {', '.join(ROLES)}")
        is_empty = item["role"] == "assistant" and item.get("content") in (None, [])
        messages.append({"role": item["role"], "content": "" if is_empty else _text(item.get("content"), place)})
    elif kind == "function_call":
        name, arguments, call_id = (_string(item, name, place) for name in ("name", "arguments", "call_id"))
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        content = _text(item.get("output"), place)
        messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", place), "content": content})


def _string(item: dict[str, Any], name: str, place: str) -> str:
    if not isinstance(item.get(name), str):
        raise _refusal(place, f"expected {name}, a string")
    return str(item[name])


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [text for part in value if (text := part_text(part)) is not None]
        if len(texts) == len(value):
            return "\n".join(texts)
    raise _refusal(place, "expected a text or parts of the types input_text, output_text and refusal")


def _refusal(place: str, reason: str) -> ApiError:
    return ApiError(400, f"{place}: {reason}", code="invalid_input", param=place.partition("[")[0])


class _Form:
    """One answer as a response."""

    def __init__(self, number: str, model: str, body: ResponsesRequest, conversation: Conversation) -> None:
        self._blocks, self._number = Blocks(conversation.may_call), number
        self._prompt_tokens = len(conversation.prompt.ids)
        self._sent = 0
        self._head = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": _shown_text(body.text),
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
        }

    def whole(self, text: str, last: Finished) -> dict[str, Any]:
        """The answer in one piece."""
        list(self._blocks.push(text)), list(self._blocks.finish())
        return self._response(last)

    async def stream(self, batches: AsyncGenerator[Batch]) -> AsyncGenerator[str]:
        """Named events, numbered."""
        begun = {"response": self._response(None)}
        start = self._event("response.created", begun) + self._event("response.in_progress", begun)
        async for batch in batches:
            out, start = start, ""
            for _, event in batch:
                if isinstance(event, TextPiece):
                    out += self._events(event.text, None)
                elif isinstance(event, Finished):
                    out += self._events("", event)
            if out:
                yield out

    def failure(self, error: ApiError) -> str:
        """An error after the first event."""
        content = error.content["error"]
        return self._event("error", {key: content[key] for key in ("code", "message", "param")})

    def _response(self, last: Finished | None) -> dict[str, Any]:
        is_cut = last is not None and last.finish_reason == "length"
        status = "in_progress" if last is None else "incomplete" if is_cut else "completed"
        blocks = self._blocks.all if last else []
        items = [self._item(block, "incomplete" if is_cut and block is blocks[-1] else "completed") for block in blocks]
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": items,
            "usage": self._usage(last) if last else None,
        }

    def _usage(self, last: Finished) -> dict[str, Any]:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": last.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + last.generated_tokens,
        }

    def _item_id(self, block: Block) -> str:
        return f"{'fc' if block.call else 'msg'}_{self._number}_{block.number}"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.call:
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": block.text}
            return {**item, "type": "function_call", **call}
        content = [] if status == "in_progress" else [_part(block.text)]
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _events(self, text: str, last: Finished | None) -> str:
        status = "incomplete" if last and last.finish_reason == "length" else "completed"
        out = ""
        for kind, block, delta in (*self._blocks.push(text), *(self._blocks.finish() if last else ())):
            at = {"item_id": self._item_id(block), "output_index": block.number}
            in_text = {**at, "content_index": 0}
            if kind == "open":
                item = {"output_index": block.number, "item": self._item(block, "in_progress")}
                out += self._event("response.output_item.added", item)
                if not block.call:
                    out += self._event("response.content_part.added", {**in_text, "part": _part("")})
            elif kind == "delta" and block.call:
                out += self._event("response.function_call_arguments.delta", {**at, "delta": delta})
            elif kind == "delta":
                out += self._event("response.output_text.delta", {**in_text, "delta": delta, "logprobs": []})
            else:
                if block.call:
                    done = {**at, "name": block.call.name, "arguments": block.text}
                    out += self._event("response.function_call_arguments.done", done)
                else:
                    done = {**in_text, "text": block.text, "logprobs": []}
                    out += self._event("response.output_text.done", done)
                    out += self._event("response.content_part.done", {**in_text, "part": _part(block.text)})
                item = {"output_index": block.number, "item": self._item(block, status)}
                out += self._event("response.output_item.done", item)
        if last:
            out += self._event(f"response.{status}", {"response": self._response(last)})
        return out

    def _event(self, name: str, data: dict[str, Any]) -> str:
        self._sent += 1
        return named_event(name, {"type": name, "sequence_number": self._sent - 1, **data})


def _shown_text(text: TextOptions | None) -> dict[str, Any]:
    shown = text.model_dump(exclude_none=True, by_alias=True) if text else {}
    form = shown.setdefault("format", {"type": "text"})
    if "schema" in form:
        form["schema"] = json.loads(form["schema"])
    return shown


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
