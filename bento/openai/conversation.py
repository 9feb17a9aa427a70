"""Converts a body of a chat route to prompt, number of tokens and grammar.

/v1/responses and /v1/messages become a `ChatRequest` first, by `as_chat`; `Blocks` reads the answers of both.
"""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from bento.errors import ApiError, validation_error
from bento.openai.chat import encode_chat
from bento.openai.schema import ChatRequest, Dialogue
from bento.openai.structured import compile_form, compile_grammar
from bento.openai.tools import Arguments, CallReader, CallStart, Part, arguments_schema, dialogue_messages
from bento.serving.answers import Answers, Batch, EventStream
from bento.serving.backend import SHORT_TEXT, Backend, Prompt
from model.generation.grammar.grammar import Grammar
from model.generation.requests import Finished, TextPiece
from model.text.chat.template import has_marks
from model.text.chat.tools import OPENING, plain_turns

MESSAGE_COST = 64
"""Cost of a message besides its text, in characters of text."""


@dataclass(frozen=True)
class Conversation:
    """A conversation to continue by `count` tokens. may_call: the answer may contain function calls."""

    prompt: Prompt
    count: int
    grammar: Grammar | None
    may_call: bool


NO_NAMES: Mapping[str, str] = {}


async def read_conversation(backend: Backend, body: ChatRequest, names: Mapping[str, str] = NO_NAMES) -> Conversation:
    """The engine's request for a body. names: another API's names for the fields of the chat route.

    Raises ApiError 400 if the model, its chat template or the context does not accept it.
    """
    grammar: Grammar | None
    if source := body.calls_grammar():
        grammar = await _compile_calls(backend, body, source)
    else:
        grammar = await compile_form(backend, body, names)
    ids = await encode_dialogue(backend, body, names)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
    prompt = backend.truncate(Prompt(ids), body.truncate_prompt_tokens, asked)
    own = names.get("messages", "messages"), names.get(name, name)
    count = backend.fit(len(prompt.ids), asked, default=None, names=own)
    return Conversation(prompt, count, grammar, bool(body.callable_functions()))


async def _compile_calls(backend: Backend, body: ChatRequest, source: str) -> Grammar:
    """The grammar of an answer with calls. Raises ApiError 400 that names the function whose schema is wrong."""
    try:
        return await compile_grammar(backend, "tools", "calls", source)
    except ApiError:
        for function in body.callable_functions():
            place = f"tools: the schema of {function.name}"
            await compile_grammar(backend, "tools", "json", json.dumps(arguments_schema(function)), place)
        raise


async def encode_dialogue(
    backend: Backend, body: Dialogue, names: Mapping[str, str] = NO_NAMES, *, is_continued: bool = True
) -> list[int]:
    """The tokens of a conversation up to the start of the model's answer. Raises ApiError 400.

    is_continued: refuse a conversation that does not end there.
    """
    engine = backend.engine
    tools = [f.model_dump(include={"name", "description", "parameters"}) for f in body.callable_functions()]
    values = body.chat_template_kwargs or {}

    def encode() -> list[int]:
        return encode_chat(
            engine.tokenizer,
            plain_turns(dialogue_messages(body.messages), tools, has_tool_role=has_marks(engine.tokenizer)),
            engine.encode,
            opens_turn=body.add_generation_prompt is not False,
            continues=bool(body.continue_final_message),
            values=values,
            name=names.get("messages", "messages"),
            is_continued=is_continued,
        )

    calls = [call.function.arguments for message in body.messages for call in message.tool_calls or ()]
    texts = [*calls, *(message.content for message in body.messages), json.dumps([tools, values])]
    size = sum(len(text) + MESSAGE_COST for text in texts)
    return encode() if size <= SHORT_TEXT else await backend.heavy.run(encode)


Place = tuple[str | int, ...]


def as_chat(fields: Mapping[str, Any], names: Mapping[str, str], places: Sequence[Place] = ()) -> ChatRequest:
    """Convert a body of another API to /v1/chat/completions. Raises ApiError 400.

    names: of the other's fields. places: where in the other's body each message stands.
    """
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        context = dict(first.get("ctx", {}))
        if "param" in context:
            context["param"] = names.get(context["param"], context["param"])
        place = list(first["loc"])
        if place[:1] == ["messages"] and len(place) > 1 and places:
            place = [*places[place[1]], *[names.get(part, part) for part in place[2:][-1:]]]
        elif place:
            place[0] = names.get(str(place[0]), place[0])
        raise validation_error([{**first, "loc": place, "ctx": context}]) from None


def submit(backend: Backend, request: Request, body: ChatRequest, conversation: Conversation) -> Answers:
    """Submit the single answer to a conversation."""
    prompts, counts = [conversation.prompt], [conversation.count]
    until = OPENING if conversation.may_call else None
    generations = backend.generations(body, prompts, counts, grammar=conversation.grammar, stop_until=until)
    request.state.record.prompt_tokens = len(conversation.prompt.ids)
    return backend.submit(request, generations)


class AnswerForm(Protocol):
    """The format of an API's answer to a conversation."""

    def stream(self, batches: AsyncGenerator[Batch]) -> AsyncGenerator[str]:
        """Its events."""

    def whole(self, text: str, last: Finished) -> dict[str, Any]:
        """The object of an answer that is not streamed."""

    def failure(self, error: ApiError) -> str:
        """The event of an error after the first one."""


async def send(request: Request, answers: Answers, form: AnswerForm, *, is_stream: bool) -> Response:
    """The answer in the API's format, streamed or whole."""
    if is_stream:
        return EventStream(answers, form.stream, ending="", failure=form.failure)
    ((events, last),) = await answers.whole(request.receive)
    return JSONResponse(form.whole("".join(e.text for e in events if isinstance(e, TextPiece)), last))


@dataclass
class Block:
    """A part of an answer: a text, or a call. number: index among the parts; text: its text, or the call's
    arguments.
    """

    number: int
    call: CallStart | None = None
    text: str = ""


BlockEvent = tuple[Literal["open", "delta", "close"], Block, str]


@dataclass
class Blocks:
    """Splits streamed text into an answer's parts. may_call: the answer may contain calls."""

    may_call: bool
    all: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = CallReader() if self.may_call else None
        self._open: Block | None = None

    def push(self, text: str) -> Iterator[BlockEvent]:
        """The parts that this text completes."""
        if self._reader:
            for part in self._reader.push(text):
                yield from self._read(part)
        elif text:
            yield from self._add(text)

    def finish(self) -> Iterator[BlockEvent]:
        """The remaining parts at the end; an answer without parts has one empty text."""
        for part in self._reader.flush() if self._reader else ():
            yield from self._read(part)
        if not self.all:
            yield from self._begin(None)
        yield from self._close()

    def _read(self, part: Part) -> Iterator[BlockEvent]:
        if isinstance(part, CallStart):
            yield from self._begin(part)
        elif isinstance(part, Arguments):
            yield from self._add(part.text, is_text=False)
        else:
            yield from self._add(part.text)

    def _add(self, text: str, *, is_text: bool = True) -> Iterator[BlockEvent]:
        if self._open is None or (is_text and self._open.call):
            yield from self._begin(None)
        assert self._open
        self._open.text += text
        yield "delta", self._open, text

    def _begin(self, call: CallStart | None) -> Iterator[BlockEvent]:
        yield from self._close()
        self._open = Block(len(self.all), call)
        self.all.append(self._open)
        yield "open", self._open, ""

    def _close(self) -> Iterator[BlockEvent]:
        if self._open:
            yield "close", self._open, ""
        self._open = None


def named_event(name: str, data: dict[str, Any]) -> str:
    """A named server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
