"""The routes: an ASGI app that BentoML mounts and that tests call without a server.

This module has the app and the service's own routes; those of the OpenAI API are in `openai/routes.py`. A route
validates a request, submits it to the engine and returns the engine's events as one JSON answer or as server-sent
events. When the client disconnects, the generation is canceled. The model loader publishes a model through
`app.state.models`.
"""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from bento.errors import ApiError, validation_error, without_route
from bento.http.body import JsonRoute
from bento.http.middleware import add_middleware
from bento.http.openapi import GENERATING, describe, stream_of, without
from bento.http.probes import add_probes
from bento.openai.endpoints.embeddings import embedding_routes
from bento.openai.endpoints.messages import message_routes
from bento.openai.endpoints.responses import response_routes
from bento.openai.endpoints.similarity import similarity_routes
from bento.openai.endpoints.tokenizing import token_routes
from bento.openai.routes import openai_routes
from bento.page import add_page
from bento.schema import (
    DEFAULT_MAX_TOKENS,
    GenerateRequest,
    GenerateResponse,
    GenerateTextRequest,
    GenerateTextResponse,
    GenerateTextWithoutPromptRequest,
    Sampling,
    Usage,
)
from bento.serving.admission import Admission
from bento.serving.answers import Answers, Batch, EventStream, server_sent
from bento.serving.backend import Backend, BackendOf, Prompt, challenger_named
from bento.serving.heavy import HeavyWork
from bento.serving.models import Models
from bento.telemetry.metrics import CONTENT_TYPE, ServiceMetrics
from model.generation.requests import Finished, TextPiece

MAX_CHOICES = 64
EXACT_COUNT = "num_of_token_generated"
"""A body that sets the number of tokens, not a maximum."""
PLAIN = Sampling.model_validate({})


def create_app(
    *,
    model_name: str,
    aliases: Sequence[str] = (),
    request_timeout_s: float,
    max_body_bytes: int,
    queue_timeout_s: float | None = None,
    receive_timeout_s: float = 30.0,
    max_choices: int = MAX_CHOICES,
    clamp_max_tokens: bool = True,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    compare_with: str = "",
) -> FastAPI:
    """The service's routes.

    model_name, aliases: see `Models`. request_timeout_s: from a request's arrival to its last token. queue_timeout_s:
    from its arrival to its start. receive_timeout_s: from a request's first byte to its last.
    max_choices: maximum number of texts per request. clamp_max_tokens: see `Backend`. api_keys: each grants access to
    every route; without keys the service is open. cors_origins: allowed CORS origins. compare_with: see
    `add_page`.
    """
    app = FastAPI(
        title="REX text generation",
        description="Continues text with a REX language model.",
        version="1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    models = app.state.models = Models(model_name, aliases)
    metrics = ServiceMetrics(
        models.stats,
        model_name=model_name,
        version=models.version,
        engine=models.engine_info,
        shadow=lambda: models.shadow,
    )
    admission = app.state.admission = Admission(models)
    heavy = app.state.heavy = HeavyWork()
    add_middleware(
        app,
        metrics=metrics,
        admission=admission,
        models=models,
        max_body_bytes=max_body_bytes,
        receive_timeout_s=min(receive_timeout_s, request_timeout_s),
        api_keys=api_keys,
        cors_origins=cors_origins,
    )
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.add_exception_handler(HTTPException, _refuse)

    def backend_of(request: Request, model: str | None = None) -> Backend:
        return Backend(
            challenger_named(model, models) or request.state.served,
            models,
            request_timeout_s,
            queue_timeout_s,
            max_choices,
            heavy,
            clamp_max_tokens,
        )

    app.include_router(openai_routes(backend_of, models))
    for routes in (embedding_routes, similarity_routes, response_routes, message_routes):
        app.include_router(routes(backend_of))
    app.include_router(own_routes(backend_of))
    app.include_router(token_routes(backend_of))
    describe(app)

    @app.get("/metrics", include_in_schema=False)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    add_probes(app, models, admission.refusal)
    add_page(app, compare_with)
    return app


def own_routes(backend_of: BackendOf) -> APIRouter:
    """/generate and the two legacy routes."""
    router = APIRouter(route_class=JsonRoute, tags=["Generate"])

    async def start(
        request: Request, text: str | None, body: Sampling, max_tokens: int | None, names: tuple[str, str]
    ) -> Answers:
        backend = backend_of(request)
        if text is None:
            prompt = Prompt([min(backend.engine.end_of_text_ids, default=0)])
        else:
            prompt = Prompt(await backend.encode(text), text)
        if names[1] == EXACT_COUNT:
            backend = replace(backend, clamp_max_tokens=False)
        count = backend.fit(len(prompt.ids), max_tokens, default=DEFAULT_MAX_TOKENS, names=names)
        generations = backend.generations(body, [prompt], [count])
        request.state.record.prompt_tokens = len(prompt.ids)
        return backend.submit(request, generations)

    async def whole(request: Request, answers: Answers) -> tuple[str, Finished]:
        ((events, last),) = await answers.whole(request.receive)
        return "".join(event.text for event in events if isinstance(event, TextPiece)), last

    @router.post(
        "/generate",
        response_model=GenerateResponse,
        responses={200: stream_of("text"), **without(GENERATING, 404)},
        summary="Continue a text",
    )
    async def generate(body: GenerateRequest, request: Request) -> Response:
        answers = await start(request, body.prompt, body, body.max_tokens, ("prompt", "max_tokens"))
        if body.stream:
            return EventStream(answers, _events)
        text, last = await whole(request, answers)
        return JSONResponse({"text": text, **_end(last), "model": backend_of(request).model_name})

    @router.post(
        "/generate_text",
        response_model=GenerateTextResponse,
        responses=without(GENERATING, 404),
        summary="Continue a text by n tokens",
    )
    async def generate_text(body: GenerateTextRequest, request: Request) -> Response:
        names = ("prompt", EXACT_COUNT)
        text, _ = await whole(request, await start(request, body.text(), PLAIN, body.num_of_token_generated, names))
        return JSONResponse({"generated_text": text})

    @router.post(
        "/generate_text_without_prompt",
        response_model=GenerateTextResponse,
        responses=without(GENERATING, 404),
        summary="Generate a new text of n tokens",
    )
    async def generate_text_without_prompt(body: GenerateTextWithoutPromptRequest, request: Request) -> Response:
        names = (EXACT_COUNT, EXACT_COUNT)
        text, _ = await whole(request, await start(request, None, PLAIN, body.num_of_token_generated, names))
        return JSONResponse({"generated_text": text})

    return router


async def _events(batches: AsyncGenerator[Batch]) -> AsyncGenerator[str]:
    """`{"text"}` for each piece, then `{"text", "finish_reason", "usage"}`; those of one step are sent in one write."""
    async for batch in batches:
        out = []
        for _, event in batch:
            if isinstance(event, Finished):
                out.append(server_sent(json.dumps({"text": "", **_end(event)})))
            elif isinstance(event, TextPiece) and event.text:
                out.append(server_sent(json.dumps({"text": event.text}, ensure_ascii=False)))
        if out:
            yield "".join(out)


def _end(last: Finished) -> dict[str, Any]:
    total = last.prompt_tokens + last.generated_tokens
    usage = Usage(prompt_tokens=last.prompt_tokens, generated_tokens=last.generated_tokens, total_tokens=total)
    return {"finish_reason": last.finish_reason, "usage": usage.model_dump()}


async def _refuse_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response(request.url.path)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405 and (allow := headers.get("Allow")):
        methods = {*allow.split(", "), "OPTIONS", *(["HEAD"] if "GET" in allow else [])}  # the middleware answers HEAD
        headers["Allow"] = ", ".join(sorted(methods))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    if not isinstance(error, ApiError):
        error = without_route(request.method, request.url.path, error.status_code, headers)
    request.state.record.error_code = error.content["error"]["code"]
    return error.response(request.url.path)
