"""/v1/embeddings: one vector per text, from the model's hidden states.

A causal model is not trained as an encoder: the vectors are only as good as its hidden states. Texts of one request are
computed a few at a time, so that a long list leaves slots to other clients.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from bento.errors import ApiError, context_exceeded
from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING
from bento.openai.schema import not_zero, prompts_schema, read_prompts
from bento.openai.turns import Label
from bento.schema import WHOLE, StrictRequest
from bento.serving.backend import Backend, BackendOf
from bento.serving.heavy import json_response
from model.generation.requests import Embedding, GenerationRequest

MAX_INPUTS = 2048
AT_ONCE = 16
"""Most texts of one request in the queue."""


def _inputs(value: Any) -> list[str] | list[list[int]]:
    inputs = read_prompts(value, most=MAX_INPUTS)
    if not all(inputs):
        raise PydanticCustomError("empty_input", "a text is empty: there is nothing to embed")
    return inputs


class EmbeddingRequest(StrictRequest):
    """Texts or tokens to embed."""

    input: Annotated[Any, AfterValidator(_inputs), prompts_schema(MAX_INPUTS, min_length=1)] = Field(
        description=f"A text, a list of texts, the tokens of a text or a list of these; at most {MAX_INPUTS}.",
        examples=["def main():\n"],
    )
    model: str | None = Field(None, description="The served model, the only one; /v1/models names it.")
    dimensions: Annotated[int, WHOLE] | None = Field(
        None, ge=1, le=1_000_000, description="Keep this many of the first numbers. Default: the model's hidden size."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32. Default: float."
    )
    pooling: Literal["mean", "last"] | None = Field(
        None, description="Of a text's hidden states: their mean, or the last one. Default: mean."
    )
    normalize: bool | None = Field(None, description="Make vectors of length 1. Default: true.")
    truncate_prompt_tokens: Annotated[int, WHOLE, AfterValidator(not_zero)] | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep this many of a text's last tokens; -1: as many as fit the context."
    )
    user: Label | None = Field(None, description="Accepted and ignored.")
    add_special_tokens: bool | None = Field(None, description="Accepted and ignored: the tokenizer has none to add.")


class EmbeddingObject(BaseModel):
    """The vector of one text, as numbers or base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingObject]
    usage: EmbeddingUsage


def embedding_routes(backend_of: BackendOf) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/embeddings", response_model=EmbeddingResponse, responses=GENERATING, summary="Embed texts")
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        return await _embed(backend_of(request, body.model), body, request)

    return router


@dataclass(frozen=True)
class _Form:
    """Encoding of vectors. dimensions: length of each."""

    dimensions: int
    is_normalized: bool
    is_base64: bool

    def write(self, vector: np.ndarray) -> list[float] | str:
        kept = vector[: self.dimensions]
        norm = float(np.linalg.norm(kept))
        if self.is_normalized and norm > 0:
            kept = kept / norm
        kept = kept.astype("<f4")
        return base64.b64encode(kept.tobytes()).decode() if self.is_base64 else kept.tolist()


async def _embed(backend: Backend, body: EmbeddingRequest, request: Request) -> Response:
    hidden_size = backend.engine.hidden_size
    if body.dimensions and body.dimensions > hidden_size:
        raise ApiError(
            400,
            f"dimensions is {body.dimensions:,}: the model's vectors have {hidden_size:,}",
            code="invalid_dimensions",
            param="dimensions",
        )
    texts = await encode_inputs(backend, body.input, body.truncate_prompt_tokens)
    count = sum(map(len, texts))
    form = _Form(body.dimensions or hidden_size, body.normalize is not False, body.encoding_format == "base64")
    vectors = await embed_tokens(backend, request, texts, body.pooling or "mean")

    def content() -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": form.write(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": backend.model_name, "data": data, "usage": usage}

    return await json_response(backend.heavy, content, is_short=len(vectors) * form.dimensions <= AT_ONCE * 1024)


async def embed_tokens(
    backend: Backend, request: Request, texts: Sequence[Sequence[int]], pooling: Literal["mean", "last"] = "mean"
) -> list[np.ndarray]:
    """The vector of each text, float32, shape (D,). texts: their tokens."""
    request.state.record.prompt_tokens = sum(map(len, texts))
    vectors: list[np.ndarray] = []
    for start in range(0, len(texts), AT_ONCE):
        requests = [GenerationRequest(ids, 0, embedding=pooling) for ids in texts[start : start + AT_ONCE]]
        for events, _ in await backend.submit(request, requests).whole(request.receive):
            vectors += [event.vector for event in events if isinstance(event, Embedding)]
    return vectors


async def encode_inputs(
    backend: Backend, inputs: list[str] | list[list[int]], most: int | None, name: str = "input"
) -> list[list[int]]:
    """The tokens of each input. most: of the last ones to keep, -1 for the context's, None for all. name: the request's
    field of the texts. Raises ApiError 400 for a text that the context does not hold.
    """
    texts = [one for one in inputs if isinstance(one, str)]
    encoded = await backend.encode_all(texts) if texts else [one for one in inputs if isinstance(one, list)]
    context = backend.engine.context_length
    if not texts:
        for ids in encoded:
            backend.check_ids(ids, param=name)
    if most is not None:
        encoded = [ids[-(context if most < 0 else most) :] for ids in encoded]
    longest = max(map(len, encoded))
    if longest > context:
        raise context_exceeded(
            f"This model's maximum context length is {context} tokens. However, your {name} resulted in {longest} "
            f"tokens. Please reduce the length of the {name}, or set truncate_prompt_tokens.",
            param=name,
        )
    return encoded
