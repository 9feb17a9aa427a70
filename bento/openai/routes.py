"""The OpenAI API: models, completions and chat completions, as its clients expect them.

What is special to a route is how its body becomes a prompt; what both share, from the engine's requests to the choices,
is here and in `openai_format.py`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING, LISTING, stream_of
from bento.openai.chat import encode_chat
from bento.openai.format import ChatFormat, CompletionFormat, Format, Wish
from bento.openai.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    Model,
    ModelList,
    OpenAIRequest,
)
from bento.serving.answers import EventStream
from bento.serving.backend import SHORT_TEXT, Backend, BackendOf, Prompt, check_model
from bento.serving.models import Models


def openai_routes(backend_of: BackendOf, models: Models) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])
    started = int(time.time())

    def describe_model() -> dict[str, Any]:
        served = models.current
        return {
            "id": models.name,
            "object": "model",
            "created": started,
            "owned_by": "rex",
            "max_model_len": served.engine.context_length if served else None,
            "version": served.version if served else None,
        }

    @router.get("/models", response_model=ModelList, responses=LISTING, summary="List the models: the served one")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [describe_model()]})

    @router.get(
        "/models/{model:path}",
        response_model=Model,
        responses={**LISTING, 404: GENERATING[404]},
        summary="Describe a model",
    )
    async def describe_one(model: str) -> Response:
        check_model(model, models.name)
        return JSONResponse(describe_model())

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        responses={200: stream_of("text_completion"), **GENERATING},
        summary="Continue texts",
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        backend = backend_of(request)
        backend.check_model(body.model)
        prompts = [await _read(backend, prompt) for prompt in body.prompt]
        counts = [
            backend.fit(len(p.ids), body.max_tokens, default=DEFAULT_COMPLETION_TOKENS, names=("prompt", "max_tokens"))
            for p in prompts
        ]
        wish = Wish(is_scored=body.logprobs is not None, has_ids=bool(body.return_token_ids), is_echoed=bool(body.echo))
        if wish.is_scored and wish.is_echoed and body.max_tokens == 1 and not (body.min_tokens or body.ignore_eos):
            # Clients that score a prompt drop the one token that they had to ask for, so it must be there even where it
            # ends the text and the engine would not show it.
            endings = backend.engine.end_of_text_ids.union(body.stop_token_ids or ())
            wish = replace(wish, endings=endings)
            body = body.model_copy(update={"ignore_eos": True, "stop_token_ids": None})
        prompt_scores = body.logprobs if body.echo else None
        if body.max_tokens == 0:
            prompt_scores = body.logprobs or 0  # what the engine then does instead of generating
        scores = {"logprobs": body.logprobs, "prompt_logprobs": prompt_scores}
        return await answer(backend, body, request, prompts, counts, scores, partial(CompletionFormat, wish=wish))

    @router.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses={200: stream_of("chat.completion.chunk"), **GENERATING},
        summary="Continue a conversation",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        backend = backend_of(request)
        backend.check_model(body.model)
        engine = backend.engine
        if sum(len(message.content) for message in body.messages) <= SHORT_TEXT:
            ids = encode_chat(engine.tokenizer, body.messages, engine.encode)
        else:
            ids = await asyncio.to_thread(encode_chat, engine.tokenizer, body.messages, engine.encode)
        asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
        count = backend.fit(len(ids), asked, default=None, names=("messages", name))
        wish = Wish(is_scored=bool(body.logprobs), has_ids=bool(body.return_token_ids))
        scores = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        return await answer(backend, body, request, [Prompt(ids)], [count], scores, partial(ChatFormat, wish=wish))

    async def answer(
        backend: Backend,
        body: OpenAIRequest,
        request: Request,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        scores: dict[str, int | None],
        make_format: Callable[..., Format],
    ) -> Response:
        """Continue each prompt by its count of tokens, n times."""
        n = body.n or 1
        generations = backend.generations(body, prompts, counts, n, **scores)
        request.state.record.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        options = body.stream_options
        form = make_format(
            engine=backend.engine,
            model=backend.model_name,
            number=request.state.record.id,
            prompts=prompts,
            n=n,
            has_usage=bool(options and options.include_usage),
            has_running_usage=bool(options and options.continuous_usage_stats),
        )
        answers = backend.submit(request, generations)
        if body.stream:
            return EventStream(answers, form.stream)
        return JSONResponse(form.whole(await answers.whole(request.receive)))

    return router


async def _read(backend: Backend, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(await backend.encode(prompt), prompt)
    backend.check_ids(prompt, param="prompt")
    return Prompt(prompt)
