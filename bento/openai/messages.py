"""Anthropic's /v1/messages, over the chat path: texts, tools, streams and counted tokens.

`ApiError.response` gives the errors of these paths Anthropic's shape.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from bento.errors import ApiError, anthropic_error
from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING, READING, stream_of
from bento.openai.conversation import Block, Blocks, Conversation, as_chat, named_event, read_conversation, submit
from bento.openai.schema import MOST_MESSAGES, ChatRequest
from bento.openai.tools import MOST_TOOLS, Name
from bento.schema import WHOLE, Count, StrictRequest
from bento.serving.answers import Batch, EventStream
from bento.serving.backend import BackendOf
from model.generation.requests import Finished, TextPiece

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
NAMES = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}


class AnthropicTool(StrictRequest):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = Field(None, max_length=16_384)
    input_schema: dict[str, Any] = Field(description="JSON schema of its arguments.")
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used.")


class AnthropicChoice(StrictRequest):
    """Whether functions are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicMessage(StrictRequest):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]] = Field(description="A text, or blocks: text, tool_use, tool_result.")


class Thinking(StrictRequest):
    """Thinking is not supported."""

    type: Literal["disabled"]


class CountRequest(StrictRequest):
    """A conversation whose tokens are counted."""

    model: str | None = Field(None, description="The served model, the only one; /v1/models names it.")
    messages: list[AnthropicMessage] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        description="The conversation so far; a last message of the assistant's is continued.",
        examples=[[{"role": "user", "content": "Write a function."}]],
    )
    system: str | list[dict[str, Any]] | None = Field(None, description="What the model is told first.")
    tools: list[AnthropicTool] | None = Field(None, max_length=MOST_TOOLS, description="Functions.")
    tool_choice: AnthropicChoice | None = Field(None, description="Default: auto.")
    thinking: Thinking | None = Field(None, description='Not supported: only null, {"type": "disabled"}.')


class MessagesRequest(CountRequest):
    """A conversation to continue."""

    max_tokens: Count = Field(description="Most tokens to generate.", examples=[16])
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false.")
    stop_sequences: list[str] | None = Field(None, description="End the text where one of these appears.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the most likely token. Default: 1.")
    top_k: Annotated[int, WHOLE] | None = Field(
        None, ge=-1, le=2**31 - 1, description="Of so many tokens. Default: all."
    )
    top_p: float | None = Field(None, ge=0, le=1, description="Of tokens with this probability together. Default: 1.")
    metadata: dict[str, Any] | None = Field(None, max_length=16, description="Taken and not used.")
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
        backend = backend_of(request)
        chat = _as_chat(body)
        conversation = await read_conversation(backend, chat, ("messages", "max_tokens"))
        answers = submit(backend, request, chat, conversation)
        form = _Form(request.state.record.id, backend.model_name, conversation)
        if body.stream:
            return EventStream(answers, form.stream, ending="", failure=_failure)
        ((events, last),) = await answers.whole(request.receive)
        return JSONResponse(form.whole("".join(e.text for e in events if isinstance(e, TextPiece)), last))

    @router.post("/messages/count_tokens", response_model=CountResponse, responses=READING, summary="Count tokens")
    async def count(body: CountRequest, request: Request) -> Response:
        conversation = await read_conversation(backend_of(request), _as_chat(body))
        return JSONResponse({"input_tokens": len(conversation.prompt.ids)})

    return router


def _as_chat(body: CountRequest) -> ChatRequest:
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        messages += _plain(message, f"messages[{number}].content")
    if not messages:
        raise _refusal("messages", "there is nothing to answer")
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
    return as_chat(fields, NAMES)


def _plain(message: AnthropicMessage, place: str) -> Iterator[dict[str, Any]]:
    """A turn as messages of the chat route: results of calls are messages of their own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts, calls = [], []
    for block in message.content:
        kind = block.get("type")
        if kind == "text":
            texts.append(_text([block], place))
        elif kind == "tool_use" and message.role == "assistant" and isinstance(block.get("name"), str):
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            calls.append({"type": "function", "function": {"name": block["name"], "arguments": arguments}})
        elif kind == "tool_result" and message.role == "user":
            call_id = str(block.get("tool_use_id", ""))
            yield {"role": "tool", "tool_call_id": call_id, "content": _text(block.get("content") or "", place)}
        elif kind not in ("thinking", "redacted_thinking"):
            raise _refusal(place, f"the model reads text: a block of the type {str(kind)[:40]!r} is not supported here")
    if texts or calls or message.role == "assistant":
        yield {"role": message.role, "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(block, dict) and isinstance(block.get("text"), str) for block in value
    ):
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
        except ValueError:  # max_tokens cut it off
            value = {}
    return {"type": "tool_use", "id": block.call.id.replace("call_", "toolu_"), "name": block.call.name, "input": value}


def _failure(error: ApiError) -> str:
    return named_event("error", anthropic_error(error))
