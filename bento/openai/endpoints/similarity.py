"""/score and /rerank, in vLLM's form: how similar texts are.

A score is the cosine of the angle between two embeddings (`embeddings.py`, the mean of the hidden states), -1 to 1, as
vLLM scores with embedding models. REX is a decoder, not a trained cross-encoder: the scores order texts, and are not
probabilities of relevance.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, Response

from bento.http.body import JsonRoute
from bento.http.openapi import GENERATING
from bento.openai.endpoints.embeddings import MAX_INPUTS, embed_tokens, encode_inputs
from bento.openai.schema import not_zero
from bento.openai.turns import Label
from bento.schema import MAX_COUNT, WHOLE, StrictRequest, forms
from bento.serving.backend import Backend, BackendOf


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("text_type", "expected a text or a list of texts")
    if not texts or not all(texts):
        raise PydanticCustomError("empty_text", "expected a text or a list of texts, none of them empty")
    if len(texts) > MAX_INPUTS:
        raise PydanticCustomError("too_many_texts", f"{len(texts)} texts: at most {MAX_INPUTS} in a request")
    return texts


_TEXT = {"type": "string", "minLength": 1}
_LIST = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_INPUTS}
Texts = Annotated[Any, AfterValidator(_texts), forms(_TEXT, _LIST)]
NAMES = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
"""Names of the two sides, in vLLM's releases."""
SCORE_PATHS, RERANK_PATHS = ("/score", "/v1/score"), ("/rerank", "/v1/rerank", "/v2/rerank")


class _SimilarityRequest(StrictRequest):
    model: str | None = Field(None, description="The served model, the only one; /v1/models names it.")
    truncate_prompt_tokens: Annotated[int, WHOLE, AfterValidator(not_zero)] | None = Field(
        None, ge=-1, le=MAX_COUNT, description="Keep this many of a text's last tokens; -1: as many as fit."
    )
    user: Label | None = Field(None, description="Accepted and ignored.")


class ScoreRequest(_SimilarityRequest):
    """Two sides of equal length, compared pair by pair, or one text and several."""

    text_1: Texts | None = Field(None, description="A text or a list of texts.", examples=["def main():"])
    text_2: Texts | None = Field(None, description="As many texts, or several for one.", examples=[["import os", "x"]])
    queries: Texts | None = Field(None, description="Another name of text_1.")
    documents: Texts | None = Field(None, description="Another name of text_2.")
    data_1: Texts | None = Field(None, description="Another name of text_1.")
    data_2: Texts | None = Field(None, description="Another name of text_2.")

    @model_validator(mode="after")
    def _check_sides(self) -> "ScoreRequest":
        given = [names for names in NAMES if any(getattr(self, name) is not None for name in names)]
        if len(given) > 1:
            raise PydanticCustomError("score_sides", "not together with {other}", {
                "param": given[1][0], "other": given[0][0]
            })  # fmt: skip
        first, second = given[0] if given else NAMES[0]
        for name in (first, second):
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "it is missing", {"param": name})
        counts = len(getattr(self, first)), len(getattr(self, second))
        if counts[0] not in (1, counts[1]):
            raise PydanticCustomError(
                "score_sides",
                "{first} and {second} texts: expected as many on both sides, or one to compare with all",
                {"param": first, "first": counts[0], "second": counts[1]},
            )
        return self

    def sides(self) -> list[tuple[str, list[str]]]:
        """Name and texts of each side."""
        names = next(names for names in NAMES if getattr(self, names[0]) is not None)
        return [(name, getattr(self, name)) for name in names]


class RerankRequest(_SimilarityRequest):
    """A query, and texts to order by their similarity to it."""

    query: str = Field(min_length=1, description="The text to compare with.", examples=["def main():"])
    documents: Texts = Field(description="The texts to order.", examples=[["import os", "def run():"]])
    top_n: Annotated[int, WHOLE] | None = Field(
        None, ge=0, le=MAX_COUNT, description="Return this many of the most similar texts; 0, the default: all."
    )
    return_documents: bool | None = Field(None, description="Return the texts too. Default: true.")


class ScoreObject(BaseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreUsage(BaseModel):
    """Tokens of the texts, each counted once."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ScoreResponse(BaseModel):
    """The scores, in the order of the pairs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreObject]
    usage: ScoreUsage


class RankedDocument(BaseModel):
    """A text."""

    text: str


class Ranked(BaseModel):
    """A text's place in the request and its similarity to the query."""

    index: int
    document: RankedDocument | None = None
    relevance_score: float


class RerankUsage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class RerankResponse(BaseModel):
    """The texts, the most similar first."""

    id: str
    model: str
    results: list[Ranked]
    usage: RerankUsage


def similarity_routes(backend_of: BackendOf) -> APIRouter:
    """The routes; each has the paths of vLLM's releases."""
    router = APIRouter(route_class=JsonRoute, tags=["Similarity"])

    post = partial(router.post, responses=GENERATING)

    for path in SCORE_PATHS:

        @post(path, response_model=ScoreResponse, summary="Compare texts", include_in_schema=path == SCORE_PATHS[0])
        async def score(body: ScoreRequest, request: Request) -> Response:
            return await _score(backend_of(request, body.model), body, request)

    for path in RERANK_PATHS:

        @post(path, response_model=RerankResponse, summary="Order texts", include_in_schema=path == RERANK_PATHS[0])
        async def rerank(body: RerankRequest, request: Request) -> Response:
            return await _rerank(backend_of(request, body.model), body, request)

    return router


async def _score(backend: Backend, body: ScoreRequest, request: Request) -> Response:
    scores, tokens = await _similarities(backend, request, body, body.sides())
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return JSONResponse(
        {
            "id": f"score-{request.state.record.id}",
            "object": "list",
            "created": int(time.time()),
            "model": backend.model_name,
            "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
            "usage": usage,
        }
    )


async def _rerank(backend: Backend, body: RerankRequest, request: Request) -> Response:
    documents: list[str] = body.documents
    scores, tokens = await _similarities(backend, request, body, [("query", [body.query]), ("documents", documents)])
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    is_shown = body.return_documents is not False
    results = [
        {
            "index": index,
            **({"document": {"text": documents[index]}} if is_shown else {}),
            "relevance_score": scores[index],
        }
        for index in order
    ]
    return JSONResponse(
        {
            "id": f"rerank-{request.state.record.id}",
            "model": backend.model_name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _similarities(
    backend: Backend, request: Request, body: _SimilarityRequest, sides: Sequence[tuple[str, list[str]]]
) -> tuple[list[float], int]:
    """The score of each pair, and the tokens of all texts. A single text on the first side pairs with all others."""
    encoded = [await encode_inputs(backend, texts, body.truncate_prompt_tokens, name) for name, texts in sides]
    tokens = [ids for side in encoded for ids in side]
    vectors_ND = np.array(await embed_tokens(backend, request, tokens), dtype=np.float64)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    units_ND = vectors_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)
    first_ND, second_ND = np.split(units_ND, [len(encoded[0])])
    scores_N = np.clip((first_ND * second_ND).sum(axis=1), -1.0, 1.0)
    return scores_N.tolist(), sum(map(len, tokens))
