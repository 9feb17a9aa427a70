"""/tokenize and /detokenize: from a text or a conversation to tokens, and back."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, Response

from bento.http.body import JsonRoute
from bento.http.openapi import READING
from bento.http.probes import SPECIAL_TOKENS
from bento.openai.conversation import encode_dialogue
from bento.openai.logprobs import TokenNames
from bento.openai.schema import Dialogue
from bento.openai.turns import MAX_MESSAGES, Message
from bento.schema import StrictRequest, TokenIds
from bento.serving.backend import BackendOf
from bento.serving.heavy import json_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FEW_TOKENS = 4096
"""Largest answer, in tokens, that is rendered in the event loop."""


class TokenizeRequest(Dialogue):
    """A text or a conversation to tokenize. Special tokens in it are ordinary text, but a prompt that is one, as
    /tokenizer_info names it, is that token.
    """

    model: str | None = Field(None, description="The served model, the only one.")
    prompt: str | None = Field(None, description="The text, in place of messages.", examples=["def main():\n"])
    messages: list[Message] | None = Field(  # type: ignore[assignment]
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A conversation, whose tokens are those that /v1/chat/completions continues.",
    )
    add_special_tokens: bool | None = Field(None, description="Accepted and ignored: the tokenizer has none to add.")
    return_token_strs: bool | None = Field(None, description="Show each token's text as well.")

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if self.messages is None and self.prompt is None:
            raise PydanticCustomError("missing", "it is missing, and so is messages", {"param": "prompt"})
        if self.messages is not None and self.prompt is not None:
            raise PydanticCustomError("one_text", "not together with prompt", {"param": "messages"})
        for field in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if self.messages is None and getattr(self, field):
                raise PydanticCustomError("one_text", "only with messages", {"param": field})
        return self


class TokenizeResponse(BaseModel):
    """The tokens of a text. max_model_len: most tokens of a prompt and its answer together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictRequest):
    """Tokens to detokenize."""

    model: str | None = Field(None, description="The served model, the only one.")
    tokens: TokenIds = Field(description="Token ids of the model's vocabulary.", examples=[[2, 3, 4]])


class DetokenizeResponse(BaseModel):
    """The text of the tokens; bytes that are not UTF-8 become U+FFFD."""

    prompt: str


def _special_token(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int] | None:
    """The token if `text` is exactly one that /tokenizer_info names: evaluation harnesses look up its id this way."""
    for name in SPECIAL_TOKENS:
        if text == getattr(tokenizer, name):
            return [getattr(tokenizer, f"{name}_id")]
    return None


def token_routes(backend_of: BackendOf) -> APIRouter:
    """The routes /tokenize and /detokenize."""
    router = APIRouter(route_class=JsonRoute, tags=["Tokens"])

    @router.post("/tokenize", response_model=TokenizeResponse, responses=READING, summary="The tokens of a text")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        backend = backend_of(request, body.model)
        if body.prompt is None:
            ids = await encode_dialogue(backend, body, is_continued=False)
        else:
            ids = _special_token(backend.engine.tokenizer, body.prompt) or await backend.encode(body.prompt)
        engine = backend.engine

        def content() -> dict[str, Any]:
            names = TokenNames.of(engine)
            shown = {"token_strs": [names[token] for token in ids]} if body.return_token_strs else {}
            return {"count": len(ids), "max_model_len": engine.context_length, "tokens": ids, **shown}

        return await json_response(backend.heavy, content, is_short=len(ids) <= FEW_TOKENS)

    @router.post("/detokenize", response_model=DetokenizeResponse, responses=READING, summary="The text of tokens")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        backend = backend_of(request, body.model)
        backend.check_ids(body.tokens, param="tokens")
        decode = backend.engine.decode
        is_short = len(body.tokens) <= FEW_TOKENS
        text = decode(body.tokens) if is_short else await backend.heavy.run(decode, body.tokens)
        return JSONResponse({"prompt": text})

    return router
