"""The routes: an ASGI app that BentoML mounts, and that a test can call without a server.

A route checks a request, hands it to the engine and passes the engine's events on, as one JSON answer or as server-sent
events. When the client leaves, the generation is cancelled. The engine is set by whoever loads the model:
`app.state.engine`, None until then.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from bento.admission import Admission, never_started, queue_timeout
from bento.errors import ApiError, server_error, validation_error
from bento.metrics import CONTENT_TYPE, ServiceMetrics
from bento.middleware import surround
from bento.page import add_page
from bento.record import CLIENT_LEFT, RequestRecord
from bento.schema import (
    DEFAULT_MAX_TOKENS,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    GenerateTextRequest,
    GenerateTextResponse,
    GenerateTextWithoutPromptRequest,
    Usage,
)
from model.generation.requests import (
    EngineBusy,
    EngineStopped,
    Event,
    Finished,
    GenerationRequest,
    SamplingParameters,
    TextPiece,
)

if TYPE_CHECKING:
    from model.generation.engine import Engine

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is wrong; the message names the field."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    429: {"model": ErrorResponse, "description": "The queue is full; Retry-After says when to try again."},
    500: {"model": ErrorResponse, "description": "The server failed."},
    503: {"model": ErrorResponse, "description": "The model is not loaded, or it stopped."},
    504: {"model": ErrorResponse, "description": "The answer was not complete in time."},
}
T = TypeVar("T")
STREAM = {"description": "The text, or a stream of it.", "content": {"text/event-stream": {"schema": {}}}}


def create_app(
    *,
    model_name: str,
    request_timeout_s: float,
    max_body_bytes: int,
    queue_timeout_s: float | None = None,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The service's routes.

    request_timeout_s: from a request's arrival to its last token. queue_timeout_s: to its start.
    api_keys: any of them opens every route; none lets anybody in. cors_origins: web sites whose pages may call.
    """
    app = FastAPI(title="REX text generation", description="Continues text with a REX language model.", version="1")
    app.state.engine = None
    metrics = ServiceMetrics(lambda: app.state.engine)
    admission = app.state.admission = Admission(lambda: app.state.engine)
    surround(
        app,
        metrics=metrics,
        admission=admission,
        max_body_bytes=max_body_bytes,
        api_keys=api_keys,
        cors_origins=cors_origins,
    )
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse)
    _describe(app)

    async def start(
        request: Request, text: str | None, sampling: SamplingParameters, max_tokens: int | None
    ) -> "_Answer":
        engine: Engine = app.state.engine  # admission has refused where there is none
        if text is None:
            prompt_ids = [min(engine.end_of_text_ids, default=0)]
        else:
            # A long text takes seconds, and the event loop serves everybody.
            prompt_ids = await asyncio.to_thread(engine.encode, text)
        max_tokens = _fit(len(prompt_ids), max_tokens, engine.context_length, _NAMES[request.url.path])
        record: RequestRecord = request.state.record
        record.prompt_tokens = len(prompt_ids)
        left_s = request_timeout_s - (time.monotonic() - record.started)
        generation = GenerationRequest(
            prompt_ids, max_tokens, sampling, queue_timeout_s=queue_timeout_s, timeout_s=left_s
        )
        return _Answer(engine, generation, record)

    @app.post(
        "/generate", response_model=GenerateResponse, responses={200: STREAM, **ERRORS}, summary="Continue a text"
    )
    async def generate(body: GenerateRequest, request: Request) -> Response:
        answer = await start(request, body.prompt, body.sampling(), body.max_tokens)
        if body.stream:
            return EventStream(answer)
        text, last = await _until_disconnect(request.receive, answer.whole())
        content = {"text": text, "finish_reason": last.finish_reason, "usage": usage(last), "model": model_name}
        return JSONResponse(content)

    @app.post(
        "/generate_text", response_model=GenerateTextResponse, responses=ERRORS, summary="Continue a text by n tokens"
    )
    async def generate_text(body: GenerateTextRequest, request: Request) -> Response:
        answer = await start(request, body.text(), SamplingParameters(), body.num_of_token_generated)
        text, _ = await _until_disconnect(request.receive, answer.whole())
        return JSONResponse({"generated_text": text})

    @app.post(
        "/generate_text_without_prompt",
        response_model=GenerateTextResponse,
        responses=ERRORS,
        summary="Begin a text of n tokens",
    )
    async def generate_text_without_prompt(body: GenerateTextWithoutPromptRequest, request: Request) -> Response:
        answer = await start(request, None, SamplingParameters(), body.num_of_token_generated)
        text, _ = await _until_disconnect(request.receive, answer.whole())
        return JSONResponse({"generated_text": text})

    @app.get("/metrics", include_in_schema=False)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_page(app)
    return app


_NAMES = {
    "/generate": ("prompt", "max_tokens"),
    "/generate_text": ("prompt", "num_of_token_generated"),
    "/generate_text_without_prompt": ("num_of_token_generated", "num_of_token_generated"),
}
"""What each route calls the text and the number of tokens."""


def usage(last: Finished) -> dict[str, int]:
    """Token counts of a finished generation, as the answers give them."""
    total = last.prompt_tokens + last.generated_tokens
    return Usage(
        prompt_tokens=last.prompt_tokens, generated_tokens=last.generated_tokens, total_tokens=total
    ).model_dump()


class _Answer:
    """One generation under way, seen from the event loop."""

    def __init__(self, engine: "Engine", request: GenerationRequest, record: RequestRecord) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self._generation = engine.submit(request, deliver)
        except EngineBusy as busy:
            retry = {"Retry-After": str(busy.retry_after_s)}
            raise ApiError(429, str(busy), code="queue_full", type="rate_limit_error", headers=retry) from None
        except EngineStopped:
            raise server_error(503, "the model has stopped: the service restarts", code="stopped") from None
        self._clock = record.follow(self._generation)

    async def events(self) -> AsyncGenerator[Event]:
        """Events up to the last; leaving early cancels the generation."""
        last: Finished | None = None
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, TextPiece):
                    self._clock.tick()
                elif isinstance(event, Finished):
                    last = event
                yield event
                if last:
                    return
        finally:
            self._clock.stop(last)
            self._generation.cancel()

    async def whole(self) -> tuple[str, Finished]:
        """The whole text and the last event. Raises ApiError where the generation did not complete."""
        pieces: list[str] = []
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, TextPiece):
                    pieces.append(event.text)
                elif error := self.failure(event):
                    raise error
        return "".join(pieces), event  # type: ignore[return-value]

    def failure(self, last: Finished) -> ApiError | None:
        """Why the generation did not complete, None where it did."""
        if last.finish_reason == "timeout" and never_started(self._generation):
            return queue_timeout()
        if last.finish_reason == "timeout":
            return server_error(
                504,
                f"the answer was not complete in time; {last.generated_tokens} tokens were generated: ask for fewer",
                code="timeout",
            )
        if last.finish_reason == "cancelled":  # not by this client, who would not be told
            return server_error(503, "the service is stopping", code="stopped")
        if last.finish_reason == "error":
            return server_error(500, "generating failed; the server's log has the reason", code="internal_error")
        return None


class EventStream(Response):
    """Server-sent events: `{"text"}` for each piece, then `{"text", "finish_reason", "usage"}`, then [DONE].

    A failure before the first piece is an ordinary error answer; after it, an event `{"error"}`.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: _Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await _until_disconnect(receive, self._send_events(send))
        except ApiError:
            # Before the first piece this still is an answer, and the server around it waits for one.
            if not self._is_started:
                raise

    async def _send_events(self, send: Send) -> None:
        async def event(content: dict[str, Any]) -> None:
            if not self._is_started:
                self._is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            data = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async with aclosing(self._answer.events()) as pieces:
            async for piece in pieces:
                if isinstance(piece, TextPiece):
                    if piece.text:
                        await event({"text": piece.text})
                    continue
                error = self._answer.failure(piece)
                if error and not self._is_started:
                    raise error
                last = {"text": "", "finish_reason": piece.finish_reason, "usage": usage(piece)}
                await event(error.content if error else last)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ApiError 499 then: nobody reads it."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_LEFT, "the client left", code="client_left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _fit(prompt: int, max_tokens: int | None, context: int, names: tuple[str, str]) -> int:
    """The number of tokens to generate. Raises ApiError where prompt and answer do not fit into the context."""
    text_name, count_name = names
    free = context - prompt
    wanted = min(DEFAULT_MAX_TOKENS, max(free, 1)) if max_tokens is None else max_tokens
    if wanted > free:
        too_long = free < 1
        raise ApiError(
            400,
            f"{text_name} has {prompt:,} tokens and {count_name} is {wanted:,}: together {prompt + wanted:,}, but the "
            f"model's context holds {context:,}; {'shorten the text' if too_long else 'ask for fewer tokens'}",
            code="context_length_exceeded",
            param=text_name if too_long else count_name,
        )
    return wanted


async def _refuse_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        headers = error.headers or {}
        error = ApiError(error.status_code, str(error.detail), code=f"http_{error.status_code}", headers=headers)
    request.state.record.error_code = error.content["error"]["code"]
    return error.response()


def _describe(app: FastAPI) -> None:
    """The OpenAPI document, without the 422 that FastAPI lists for every body: wrong ones get a 400."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
