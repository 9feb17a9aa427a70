"""The OpenAI API: models, completions and chat completions.

The two generating routes differ in how a body becomes prompts. They share `_answer`, which submits the prompts, and the
formats of `format.py`, which turn the engine's events into choices.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from bento.errors import ApiError
from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING, LISTING, stream_of
from bento.openai.answer_schema import ChatResponse, CompletionResponse, Model, ModelList
from bento.openai.conversation import read_conversation
from bento.openai.format import ChatFormat, ChoiceOptions, CompletionFormat, Format
from bento.openai.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
)
from bento.openai.structured import compile_form
from bento.openai.tool_format import ToolChatFormat
from bento.serving.answers import EventStream
from bento.serving.backend import Backend, BackendOf, Prompt, challenger_named
from bento.serving.heavy import json_response
from bento.serving.models import Models, Served
from model.generation.grammar.grammar import Grammar
from model.generation.requests import Event, Finished, TextPiece
from model.text.chat.tools import OPENING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Result = tuple[list[Event], Finished]
INFILL_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>"),
)
"""Of the Qwen and Gemma, StarCoder, SantaCoder and DeepSeek families."""
MAX_SCORES = 400_000
"""Most log-probabilities of an answer: 64 prompts of 1,024 tokens with 5 likely tokens beside each token.

Each takes 400 bytes or more until the answer is sent.
"""
FEW_EVENTS = 4096
"""Largest answer, in events times log-probabilities per event, that is rendered in the event loop."""


def openai_routes(backend_of: BackendOf, models: Models) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])
    _add_model_routes(router, models)

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        responses={200: stream_of("text_completion"), **GENERATING},
        summary="Continue texts",
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _complete(backend_of(request, body.model), body, request)

    @router.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses={200: stream_of("chat.completion.chunk"), **GENERATING},
        summary="Continue a conversation",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _chat(backend_of(request, body.model), body, request)

    return router


def _add_model_routes(router: APIRouter, models: Models) -> None:
    started = int(time.time())

    def describe_model(served: Served | None) -> dict[str, Any]:
        return {
            "id": (served and served.name) or models.name,
            "object": "model",
            "created": started,
            "owned_by": "rex",
            "max_model_len": served.engine.context_length if served else None,
            "version": served.version if served else None,
            "has_chat_template": bool(served.engine.tokenizer.chat_template) if served else None,
        }

    @router.get(
        "/models",
        response_model=ModelList,
        responses=LISTING,
        summary="List the models: the served one, and the challenger of a shadow phase",
    )
    async def list_models() -> Response:
        model = describe_model(models.current)
        aliases = [{**model, "id": alias, "root": models.name} for alias in models.aliases]
        others = [describe_model(models.challenger)] if models.challenger else []
        return JSONResponse({"object": "list", "data": [model, *aliases, *others]})

    @router.get(
        "/models/{model:path}",
        response_model=Model,
        responses={**LISTING, 404: GENERATING[404]},
        summary="Describe a model",
    )
    async def describe_one(model: str) -> Response:
        return JSONResponse(describe_model(challenger_named(model, models) or models.current))


async def _complete(backend: Backend, body: CompletionRequest, request: Request) -> Response:
    marks = infill_marks(backend.engine.tokenizer) if body.suffix else None
    read = await _read(backend, body.prompt)
    if marks and body.suffix:
        after = await backend.encode(body.suffix)
        before, between, middle = marks
        read = [Prompt([before, *prompt.ids, between, *after, middle]) for prompt in read]
    prompts = [backend.truncate(prompt, body.truncate_prompt_tokens, body.count()) for prompt in read]
    counts = [
        backend.fit(len(p.ids), body.count(), default=DEFAULT_COMPLETION_TOKENS, names=("prompt", body.count_name()))
        for p in prompts
    ]
    shown = ChoiceOptions(
        is_scored=body.logprobs is not None,
        has_ids=bool(body.return_token_ids),
        is_echoed=bool(body.echo),
        has_prompt_scores=body.prompt_logprobs is not None,
    )
    if shown.is_scored and shown.is_echoed and body.count() == 1 and not (body.min_tokens or body.ignore_eos):
        # Clients that score a prompt request one token and discard it, so return the token even if it ends the text.
        shown = replace(shown, endings=backend.engine.end_of_text_ids.union(body.stop_token_ids or ()))
        body = body.model_copy(update={"ignore_eos": True, "stop_token_ids": None})
    prompt_scores = body.prompt_logprobs
    if prompt_scores is None and body.echo:
        prompt_scores = body.logprobs
    if body.count() == 0 and prompt_scores is None:
        prompt_scores = body.logprobs or 0  # the engine then scores the prompt instead of generating
    scores = {"logprobs": body.logprobs, "prompt_logprobs": prompt_scores}
    grammar = await compile_form(backend, body)
    make_format = partial(CompletionFormat, shown=shown)
    return await _answer(backend, body, request, prompts, counts, scores, grammar, make_format)


async def _chat(backend: Backend, body: ChatRequest, request: Request) -> Response:
    conversation = await read_conversation(backend, body)
    shown = ChoiceOptions(
        is_scored=bool(body.logprobs),
        has_ids=bool(body.return_token_ids),
        has_prompt_scores=body.prompt_logprobs is not None,
    )
    scores = {
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "prompt_logprobs": body.prompt_logprobs,
    }
    make_format = partial(ToolChatFormat if conversation.may_call else ChatFormat, shown=shown)
    return await _answer(
        backend,
        body,
        request,
        [conversation.prompt],
        [conversation.count],
        scores,
        conversation.grammar,
        make_format,
        OPENING if conversation.may_call else None,
    )


async def _answer(
    backend: Backend,
    body: OpenAIRequest,
    request: Request,
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    scores: dict[str, int | None],
    grammar: Grammar | None,
    make_format: Callable[..., Format],
    stop_until: str | None = None,
) -> Response:
    """Continue each prompt n times by its number of tokens."""
    n, drawn = body.n or 1, body.drawn()
    is_ranked = bool(body.use_beam_search)
    if drawn > n and not is_ranked and scores["logprobs"] is None:
        scores = {**scores, "logprobs": 0}
    scored = _scores(prompts, counts, drawn, scores)
    if scored > MAX_SCORES:
        raise ApiError(
            400,
            f"the answer would have up to {scored:,} log-probabilities: expected at most {MAX_SCORES:,}; ask for fewer "
            "likely tokens beside each, or send fewer prompts at once",
            code="too_many_logprobs",
            param="logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )
    generations = backend.generations(body, prompts, counts, drawn, grammar=grammar, stop_until=stop_until, **scores)
    request.state.record.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    options = body.stream_options
    form = make_format(
        engine=backend.engine,
        model=backend.model_name,
        fingerprint=backend.served.fingerprint,
        number=request.state.record.id,
        prompts=prompts,
        n=n,
        has_usage=bool(options and options.include_usage),
        has_running_usage=bool(options and options.continuous_usage_stats),
    )
    answers = backend.submit(request, generations)
    if body.stream:
        return EventStream(answers, form.stream)
    results = await answers.whole(request.receive)
    if drawn > n:
        form.unshown_tokens = sum(last.generated_tokens for _, last in results)
        results = _likeliest(results, drawn, n, is_ranked=is_ranked)
        form.unshown_tokens -= sum(last.generated_tokens for _, last in results)

    size = max(scored, sum(len(events) for events, _ in results))
    return await json_response(backend.heavy, partial(form.whole, results), is_short=size <= FEW_EVENTS)


def _scores(prompts: Sequence[Prompt], counts: Sequence[int], drawn: int, scores: dict[str, int | None]) -> int:
    """The most log-probabilities of the answers: each token's and those of the likely tokens beside it."""
    generated, prompted = scores["logprobs"], scores["prompt_logprobs"]
    total = 0 if generated is None else sum(counts) * drawn * (1 + generated)
    return total + (0 if prompted is None else sum(len(one.ids) for one in prompts) * drawn * (1 + prompted))


def _likeliest(results: list[Result], drawn: int, n: int, *, is_ranked: bool) -> list[Result]:
    """The n of each prompt's `drawn` texts with the highest mean token log-probability, best first. is_ranked: they
    are in order, best first, by another score.
    """

    def score(result: Result) -> float:
        scores = [s.logprob for event in result[0] if isinstance(event, TextPiece) for s in event.logprobs]
        return sum(scores) / max(len(scores), 1)

    prompts = [results[first : first + drawn] for first in range(0, len(results), drawn)]
    ordered = prompts if is_ranked else [sorted(texts, key=score, reverse=True) for texts in prompts]
    return [one for texts in ordered for one in texts[:n]]


def infill_marks(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int, int]:
    """The special tokens before the prompt, the suffix and the text between them. Raises ApiError 400 without."""
    known = tokenizer.get_added_vocab()
    for prefix, suffix, middle in INFILL_MARKS:
        if prefix in known and suffix in known and middle in known:
            return known[prefix], known[suffix], known[middle]
    raise ApiError(
        400,
        f"suffix: this model's tokenizer has no fill-in-the-middle tokens, such as {INFILL_MARKS[0][0]}",
        code="unsupported_parameter",
        param="suffix",
    )


async def _read(backend: Backend, prompts: Sequence[str] | Sequence[list[int]]) -> list[Prompt]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        for ids in prompts:
            backend.check_ids([token for token in ids if isinstance(token, int)], param="prompt")
        return [Prompt([token for token in ids if isinstance(token, int)]) for ids in prompts]
    beginning = [min(backend.engine.end_of_text_ids, default=0)]  # of a new text
    return [Prompt(ids or beginning, text) for text, ids in zip(texts, await backend.encode_all(texts), strict=True)]
