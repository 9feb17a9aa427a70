"""Schemas of the OpenAI API's answers, for the OpenAPI document; `format.py` makes the answers."""

from typing import Literal

from pydantic import BaseModel


class CachedTokens(BaseModel):
    """cached_tokens: of the prompt's tokens, those that were computed for an earlier request."""

    cached_tokens: int


class CompletionUsage(BaseModel):
    """Tokens of one request; a prompt counts once however many texts it was continued by."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    r"""One item for each token of the text, also of an echoed prompt, whose first token has none.

    text_offset: where the token begins in the choice's text, in characters. A token that is not whole characters is
    written `bytes:\xe2\x80`; names of two tokens that are alike share an entry of top_logprobs, that of the more likely
    one.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """A token at one place of the prompt. rank: 1 for the most likely; null for a token outside the requested ones."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, the token and the most likely ones, by id; null for the first."""


class CompletionChoice(BaseModel):
    """One text. index: prompts times n; the choices of a prompt follow each other."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(BaseModel):
    """Texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class TopLogprob(BaseModel):
    """A token; bytes: of its text, null for a token without text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenScore(TopLogprob):
    """A token of the text and the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One item for each token of the text."""

    content: list[TokenScore]
    refusal: None


class AnsweredCall(BaseModel):
    """A call that the model makes; `function.arguments` is JSON that is valid under the function's schema."""

    id: str
    type: Literal["function"]
    function: dict[str, str]


class ChatMessage(BaseModel):
    """The answer. content: null if there are only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_logprobs: PromptLogprobs | None = None


class Model(BaseModel):
    """The served model. max_model_len: most tokens of a prompt and its answer together; version: changes where another
    version of the model takes over; has_chat_template: whether it takes conversations; root: the model that an alias
    stands for. Null until it is loaded.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    version: str | None
    has_chat_template: bool | None
    root: str | None = None


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[Model]
