"""Schemas of request and response bodies, for validation and for the OpenAPI document.

A field is supported exactly or refused: types are strict; unknown fields and non-finite numbers are errors.
null means the same as an absent field. Limits that depend on the model (tokens that fit into its context, ids that
are in its vocabulary) are checked in `serving/backend.py`. The OpenAI API's bodies are in `openai/schema.py`.
"""

import functools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from bento.neutral import document_neutral, is_neutral, without_confusion
from model.generation.grammar.grammar import Grammar
from model.generation.requests import MAX_LOGIT_BIAS, MAX_SEED, GenerationRequest, SamplingParameters

DEFAULT_MAX_TOKENS = 128
MAX_COUNT = 2**31 - 1
MAX_TOKENS = 2**63 - 1
"""Largest max_tokens: clients write the largest integer of their language for "all that fits"."""
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 64, 256
MAX_ALLOWED = 16_384
MAX_PENALTY = 100.0
MIN_TOP_P = 1e-9
DRAWN_SEED = -1
MIN_REPETITION_PENALTY = 0.01
"""Smallest penalty: logits are divided by it and must stay finite."""


def _whole(value: Any) -> Any:
    """Convert integral floats: 4.0 is an integer in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
ALL_THAT_FITS = -1
"""-1 as a number of tokens: up to the end of the context."""


def _count(value: Any) -> Any:
    if type(value) is int and (value == 0 or value < ALL_THAT_FITS):
        raise PydanticCustomError("greater_than_equal", "expected 1 or more, or -1 for all that fits")
    return value


Count = Annotated[int, AfterValidator(_count), WHOLE, Field(ge=ALL_THAT_FITS, le=MAX_TOKENS)]


def whole_items(value: Any) -> Any:
    """A list with its integral floats as integers; anything else as it is. For 100,000 token ids it holds the GIL for
    2 ms, a validator of each item would for 40.
    """
    return [_whole(item) for item in value] if type(value) is list and float in set(map(type, value)) else value


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_COUNT)]], BeforeValidator(whole_items)]


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("string_type", "expected a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("too_many_stops", f"{len(stops)} strings: expected at most {MAX_STOPS}")
    if not all(stops):
        raise PydanticCustomError("empty_stop", "an empty string would end every text at once")
    if max(map(len, stops), default=0) > MAX_STOP_LENGTH:
        raise PydanticCustomError("stop_too_long", f"a string is longer than {MAX_STOP_LENGTH} characters")
    return stops


def _biases(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) > MAX_BIASES:
            raise PydanticCustomError("too_many_biases", f"{len(value)} tokens: at most {MAX_BIASES}")
        if not all(name.isascii() and name.isdecimal() and len(name) <= 10 for name in value):
            raise PydanticCustomError("bias_token", "the names are token ids, written in decimal")
        if len({int(name) for name in value}) < len(value):
            raise PydanticCustomError("bias_token", "a token id is named twice")
    return value


def forms(*schemas: dict[str, Any]) -> WithJsonSchema:
    """JSON schema of a field of several forms, distinguished by a validator, because pydantic would report one error
    per form.
    """
    return WithJsonSchema({"anyOf": list(schemas)})


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
Stops = Annotated[
    Any,
    AfterValidator(_stops),
    forms(_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}),
]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
Biases = Annotated[
    dict[str, Bias],
    BeforeValidator(_biases),
    Field(json_schema_extra={"maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^[0-9]{1,10}$"}}),
]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]


def _only_false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported_value", "only false is supported")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_only_false), WithJsonSchema({"type": "boolean", "enum": [False]})]
"""A strict check, because `Literal[False]` would accept 0."""


def _text_or_objects(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        return value
    raise PydanticCustomError("text_or_objects", "expected a text, or a list of objects")


TextOrObjects = Annotated[
    Any, AfterValidator(_text_or_objects), forms({"type": "string"}, {"type": "array", "items": {"type": "object"}})
]
"""A union of the two would be refused with the name of a Python type."""


class StrictRequest(BaseModel):
    """A body: JSON types, no NaN, no infinity, and no unknown field unless its value is neutral."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=document_neutral)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = _names(cls)
        return {
            name: without_confusion(name, one)
            for name, one in value.items()
            if name in known or not is_neutral(name, one, value)
        }


@functools.cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


class Sampling(StrictRequest):
    """Sampling and stopping parameters, shared by every route that generates."""

    temperature: float | None = Field(
        None, ge=0, le=100, description="0 takes the most likely token each time. Default: 1."
    )
    top_k: Annotated[int, WHOLE] | None = Field(
        None,
        ge=-1,
        le=MAX_COUNT,
        description="Draw from the k most likely tokens; 0, the default, and -1 keep all.",
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Draw from the most likely tokens with this total probability; 0 keeps one. Default: 1.",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Drop tokens less likely than this fraction of the most likely one's probability. Default: 0.",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=MIN_REPETITION_PENALTY,
        le=MAX_PENALTY,
        description="Above 1 makes tokens that occurred, in the prompt too, less likely. Default: 1.",
    )
    presence_penalty: Penalty | None = Field(
        None, description="Subtracted from the logit of a token that was generated before. Default: 0."
    )
    frequency_penalty: Penalty | None = Field(
        None, description="Subtracted from the logit of a token for each time that it was generated. Default: 0."
    )
    logit_bias: Biases | None = Field(
        None, description=f"Added to the logits of these token ids, at most {MAX_BIASES} of them."
    )
    seed: Annotated[int, WHOLE] | None = Field(
        None,
        ge=-MAX_SEED - 1,
        le=MAX_SEED,
        description="The same seed gives the same text for the same request; the default and -1 draw one.",
    )
    stop: Stops = Field(
        None,
        description=f"End the text when one of these strings appears; it is not part of the text. At most "
        f"{MAX_STOPS}, of at most {MAX_STOP_LENGTH} characters.",
    )
    stop_token_ids: TokenIds | None = Field(
        None, max_length=MAX_STOP_IDS, description="End the text at one of these tokens, which is not part of it."
    )
    min_tokens: Annotated[int, WHOLE] | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="Only the end of its format ends the text before this many tokens. Default: 0.",
    )
    include_stop_str_in_output: bool | None = Field(
        None,
        description="Leave the stop string, or the text of the stop token, at the end of the text. Default: false.",
    )
    bad_words: list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]] | None = Field(
        None,
        max_length=MAX_BAD_WORDS,
        description="Strings that never appear in the text, however they are tokenized.",
    )
    allowed_token_ids: TokenIds | None = Field(
        None, max_length=MAX_ALLOWED, description="Choose only among these tokens; empty: all."
    )
    ignore_eos: bool | None = Field(None, description="Continue after the end-of-text token. Default: false.")

    def sampling(self, choice: int = 0) -> SamplingParameters:
        """These fields as engine parameters. choice: index of the text among those of one prompt, each with its own
        seed.
        """
        return SamplingParameters(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else max(self.top_p, MIN_TOP_P),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=None if self.seed in (None, DRAWN_SEED) else (self.seed + choice) % (MAX_SEED + 1),
        )

    def generation(
        self,
        prompt_ids: Any,
        max_tokens: int,
        choice: int = 0,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        stop_until: str | None = None,
    ) -> GenerationRequest:
        """The engine's form of the request for one prompt. See `GenerationRequest` for the other arguments."""
        return GenerationRequest(
            prompt_ids,
            max_tokens,
            self.sampling(choice),
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop or ()),
            stop_until=stop_until,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            allowed_token_ids=frozenset(self.allowed_token_ids) if self.allowed_token_ids else None,
            bad_words=tuple(self.bad_words or ()),
            include_stop=bool(self.include_stop_str_in_output),
        )


class GenerateRequest(Sampling):
    """A text to continue, with sampling parameters."""

    prompt: str = Field(min_length=1, description="The text to continue.", examples=["def main():\n"])
    max_tokens: Count | None = Field(
        None,
        description=f"Most tokens to generate. Default: {DEFAULT_MAX_TOKENS}, or as many as fit if fewer.",
        examples=[16],
    )
    stream: bool | None = Field(None, description="Answer with server-sent events, one for each piece of text.")


class GenerateTextRequest(StrictRequest):
    """A text to continue by a number of tokens; `context` precedes the prompt on a separate line."""

    prompt: str = Field(min_length=1, description="The text to continue.", examples=["def main():\n"])
    context: str | None = Field(None, description="Text before the prompt, separated from it by a newline.")
    num_of_token_generated: Count = Field(
        description="Tokens to generate; fewer only if the text ends before.", examples=[16]
    )

    def text(self) -> str:
        """The text to continue."""
        return f"{self.context}\n{self.prompt}" if self.context else self.prompt


class GenerateTextWithoutPromptRequest(StrictRequest):
    """A number of tokens from the beginning of a new text."""

    num_of_token_generated: Count = Field(
        description="Tokens to generate; fewer only if the text ends before.", examples=[16]
    )


class Usage(BaseModel):
    """Tokens of one request. The end-of-text token counts if it ended the text."""

    prompt_tokens: int
    generated_tokens: int
    total_tokens: int


class GenerateResponse(BaseModel):
    """The text after the prompt. finish_reason: "stop" (the text ended), "length" (max_tokens were generated)."""

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    model: str


class GenerateTextResponse(BaseModel):
    """The text after the prompt."""

    generated_text: str


class ErrorDetail(BaseModel):
    """The error in one line; `param` names the invalid field, if there is one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer of status 400 and above."""

    error: ErrorDetail
