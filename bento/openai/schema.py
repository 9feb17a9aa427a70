"""Request bodies of the OpenAI API: supported fields, and fields accepted only with a neutral value (named in the
description). `answer_schema.py` has the answers.

Anything else in a body is refused by name. `user`, `metadata`, `safety_identifier`, `prompt_cache_key` and
`service_tier` are labels of the caller: they change no text and are neither stored nor logged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from bento.openai.structured import Structured
from bento.openai.tools import ToolFields, dialogue_messages
from bento.openai.turns import MAX_MESSAGES, Label, Message, TemplateValues, unsupported
from bento.schema import (
    ALL_THAT_FITS,
    MAX_COUNT,
    MAX_TOKENS,
    WHOLE,
    Count,
    OnlyFalse,
    Sampling,
    StrictRequest,
    forms,
    whole_items,
)
from model.generation.requests import MAX_LENGTH_PENALTY, Beams, GenerationRequest
from model.text.chat.tools import has_unpaired_results

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 64
MAX_PROMPTS = 64
MAX_LOGPROBS = 20


def _nothing(value: list[Any]) -> list[Any]:
    if value:
        raise PydanticCustomError("none_required", "only an empty list")
    return value


EmptyList = Annotated[list[Any], AfterValidator(_nothing), Field(json_schema_extra={"maxItems": 0})]
Logprobs = Annotated[int, WHOLE, Field(ge=0, le=MAX_LOGPROBS)]


def not_zero(value: int) -> int:
    """A number of tokens or -1. Raises for 0."""
    if value == 0:
        raise PydanticCustomError("greater_than_equal", "expected 1 or more, or -1")
    return value


def _early_stopping(value: Any) -> Any:
    if value not in (None, "never") and not isinstance(value, bool):
        raise PydanticCustomError("early_stopping", 'expected true, false or "never"')
    return value


def _false_is_none(value: Any) -> Any:
    return None if value is False else value


def read_prompts(value: Any, most: int = MAX_PROMPTS) -> list[str] | list[list[int]]:
    """A text, a list of texts or tokens in any of their forms, as a list of texts or of token lists. most: maximum
    number of texts.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise PydanticCustomError(
            "prompt_type", "expected a string, a list of strings, token ids or lists of token ids"
        )
    value = [whole_items(one) for one in value] if list in set(map(type, value)) else whole_items(value)
    if _are_ids(value) and value:
        value = [value]
    if len(value) > most:
        raise PydanticCustomError("too_many_prompts", f"{len(value)} texts: at most {most} in a request")
    if not value or any(prompt == [] for prompt in value):
        raise PydanticCustomError("empty_prompt", "an empty list: expected a text or tokens")
    if all(isinstance(prompt, str) for prompt in value):
        return value
    if all(isinstance(prompt, list) and _are_ids(prompt) for prompt in value):
        return value
    raise PydanticCustomError("prompt_type", "expected a string, a list of strings, token ids or lists of token ids")


def _are_ids(value: list[Any]) -> bool:
    return set(map(type, value)) <= {int}  # a bool is an int


def prompts_schema(most: int, min_length: int = 0) -> WithJsonSchema:
    """The JSON schema of `read_prompts`. min_length: of a text."""
    text = {"type": "string", **({"minLength": min_length} if min_length else {})}
    return forms(
        text,
        {"type": "array", "items": text, "minItems": 1, "maxItems": most},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": most},
    )


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}, "minItems": 1}
Prompts = Annotated[Any, AfterValidator(read_prompts), prompts_schema(MAX_PROMPTS)]


class StreamOptions(StrictRequest):
    """Additional content of a stream."""

    include_usage: bool | None = Field(None, description="End with a chunk without choices that has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Show the usage so far in every chunk.")
    include_obfuscation: OnlyFalse | None = unsupported("false")

    def asks(self) -> bool:
        """Whether it asks for any of these."""
        return bool(self.include_usage or self.continuous_usage_stats)


SAMPLED_ONLY: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1),
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "stream": (False,),
}
"""Fields that do not apply to a beam search, and their neutral values."""
UNCONSTRAINED_ONLY = ("logit_bias", "stop", "bad_words", "allowed_token_ids")


class OpenAIRequest(Structured, Sampling):
    """Fields of both routes of the OpenAI API."""

    model: str | None = Field(None, description="The served model, the only one; /v1/models names it.")
    n: Annotated[int, WHOLE] | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Texts for each prompt; with a seed, the seeds that follow. Default: 1.",
    )
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    truncate_prompt_tokens: Annotated[int, WHOLE, AfterValidator(not_zero)] | None = Field(
        None,
        ge=-1,
        le=MAX_COUNT,
        description="Keep this many of the prompt's last tokens; -1: as many as leave room for the text. Default: all.",
    )
    prompt_logprobs: Annotated[
        Logprobs | None,
        BeforeValidator(_false_is_none),
        forms({"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"enum": [False]}, {"type": "null"}),
    ] = Field(
        None,
        description="Show the log-probability of each token of the prompt, and of this many most likely ones beside "
        "it. Not with stream.",
    )
    return_token_ids: bool | None = Field(None, description="Show the token ids of prompt and text as well.")
    user: Label | None = Field(None, description="Accepted and ignored.")
    metadata: dict[Label, Label] | None = Field(None, max_length=16, description="Accepted and ignored.")
    safety_identifier: Label | None = Field(None, description="Accepted and ignored.")
    prompt_cache_key: Label | None = Field(None, description="Accepted and ignored: common prefixes are always reused.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one tier.")
    store: OnlyFalse | None = unsupported("false")
    best_of: Annotated[int, WHOLE] | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Generate this many texts and return the n whose tokens are likeliest on average; with "
        "use_beam_search, the number of beams. Default: n.",
    )
    use_beam_search: bool | None = Field(
        None,
        description="Search the n likeliest texts instead of sampling, with best_of beams. Not with stream, and not "
        "with parameters of sampling, stop strings or a form of the text. Default: false.",
    )
    length_penalty: float | None = Field(
        None,
        ge=-MAX_LENGTH_PENALTY,
        le=MAX_LENGTH_PENALTY,
        description="Of a beam search: a text's log-probability is divided by its length to this power. Default: 1.",
    )
    early_stopping: Annotated[
        Any, AfterValidator(_early_stopping), forms({"type": "boolean"}, {"enum": ["never"]}, {"type": "null"})
    ] = Field(
        None,
        description="Of a beam search: true ends it at best_of complete texts, false when no running text is better "
        'at its length, "never" when none can become better. Default: false.',
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "OpenAIRequest":
        if self.stream_options is not None and self.stream_options.asks() and not self.stream:
            raise PydanticCustomError("stream_options", "only with stream=true", {"param": "stream_options"})
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError("unsupported_parameter", "not with stream=true", {"param": "prompt_logprobs"})
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> "OpenAIRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise PydanticCustomError("best_of", "expected at least n", {"param": "best_of"})
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise PydanticCustomError("best_of", "more than n not with stream=true", {"param": "best_of"})
        return self

    @model_validator(mode="after")
    def _check_beams(self) -> "OpenAIRequest":
        if not self.use_beam_search:
            for field, neutral in (("length_penalty", 1), ("early_stopping", False)):
                if getattr(self, field) not in (None, neutral):
                    raise PydanticCustomError("beam_search", "only with use_beam_search=true", {"param": field})
            return self
        wrong = [name for name, neutral in SAMPLED_ONLY.items() if getattr(self, name) not in (None, *neutral)]
        wrong += [name for name in UNCONSTRAINED_ONLY if getattr(self, name)]
        wrong += [field for field, _, _ in self.forms()]
        if wrong:
            raise PydanticCustomError("beam_search", "not with use_beam_search=true", {"param": wrong[0]})
        return self

    def drawn(self) -> int:
        """Texts to generate for each prompt."""
        return self.best_of or self.n or 1

    def generation(self, prompt_ids: Any, max_tokens: int, choice: int = 0, **options: Any) -> GenerationRequest:
        """The engine's form of the request; see `Sampling.generation`."""
        made = super().generation(prompt_ids, max_tokens, choice, **options)
        if not (self.use_beam_search and max_tokens):
            return made
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        return replace(made, beams=Beams(self.drawn(), choice, penalty, self.early_stopping or False))


class CompletionRequest(OpenAIRequest):
    """Texts or tokens to continue."""

    prompt: Prompts = Field(
        description=f"A text, a list of texts, the tokens of a text or a list of these; at most {MAX_PROMPTS}.",
        examples=["def main():\n"],
    )
    max_tokens: Annotated[int, WHOLE] | None = Field(
        None,
        ge=ALL_THAT_FITS,
        le=MAX_TOKENS,
        description=f"Most tokens to generate. Default: {DEFAULT_COMPLETION_TOKENS}, or as many as fit if "
        "fewer; -1 for all that fits. 0 is for echo, which then only repeats and scores the prompt.",
        examples=[16],
    )
    max_completion_tokens: Annotated[int, WHOLE] | None = Field(
        None, ge=ALL_THAT_FITS, le=MAX_TOKENS, description="Another name of max_tokens."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt. Default: false.")
    logprobs: Annotated[
        Logprobs | None,
        BeforeValidator(_false_is_none),
        forms({"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"enum": [False]}, {"type": "null"}),
    ] = Field(None, description="Show the log-probability of each token, and of this many most likely ones beside it.")
    suffix: str | None = Field(
        None,
        description="Fill in the text between prompt and suffix, if the tokenizer has tokens for it. Not with echo.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.prompt_logprobs is not None and self.echo and self.logprobs not in (None, self.prompt_logprobs):
            raise PydanticCustomError(
                "prompt_logprobs", "with echo expected as many as logprobs", {"param": "prompt_logprobs"}
            )
        for field in ("echo", "truncate_prompt_tokens"):
            if self.suffix and getattr(self, field):
                raise PydanticCustomError("suffix", "not together with {field}", {"param": "suffix", "field": field})
        _check_one_count(self.max_tokens, self.max_completion_tokens)
        if self.count() == 0 and not self.echo:
            raise PydanticCustomError(
                "max_tokens", "0 needs echo=true: there would be no text", {"param": self.count_name()}
            )
        return self

    def count(self) -> int | None:
        """Most tokens to generate, under either name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def count_name(self) -> str:
        """The field name in the request; the more common one if the request has neither."""
        return (
            "max_completion_tokens"
            if self.max_completion_tokens is not None and self.max_tokens is None
            else "max_tokens"
        )


def _check_one_count(max_tokens: int | None, max_completion_tokens: int | None) -> None:
    if None not in (max_tokens, max_completion_tokens) and max_tokens != max_completion_tokens:
        raise PydanticCustomError("max_tokens", "max_completion_tokens has another value", {"param": "max_tokens"})


def _answers_no_call(messages: Sequence[Message]) -> bool:
    """Whether a result follows no message with calls, other results aside."""
    may_answer = False
    for message in messages:
        if message.role == "tool" and not may_answer:
            return True
        may_answer = message.role == "tool" or bool(message.tool_calls)
    return False


class Dialogue(ToolFields):
    """A conversation, and the start of the model's answer."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far.",
        examples=[[{"role": "user", "content": "Write a function."}]],
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn. Default: true, except with continue_final_message."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, which is the assistant's, instead of a new one. Default: false."
    )
    chat_template_kwargs: TemplateValues | None = Field(
        None,
        description="Values of variables of the model's chat template, such as enable_thinking. A name that the "
        "template does not read changes nothing.",
    )

    @model_validator(mode="after")
    def _check_turns(self) -> "Dialogue":
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue_final_message",
                "add_generation_prompt opens another turn: only one of them can be true",
                {"param": "continue_final_message"},
            )
        if self.continue_final_message and self.messages and self.messages[-1].role != "assistant":
            raise PydanticCustomError(
                "continue_final_message",
                "the last message is not the assistant's",
                {"param": "continue_final_message"},
            )
        opens, continues = self.add_generation_prompt is not False, bool(self.continue_final_message)
        fields = {"add_generation_prompt": opens and not continues, "continue_final_message": continues}
        for name, value in fields.items():
            if (self.chat_template_kwargs or {}).get(name) not in (None, value):
                raise PydanticCustomError(
                    "template_value",
                    "{name} contradicts the request's field of that name",
                    {"param": "chat_template_kwargs", "name": name},
                )
        messages = self.messages or ()
        has_tools = any(message.role == "tool" or message.tool_calls for message in messages)
        if has_tools and (_answers_no_call(messages) or has_unpaired_results(dialogue_messages(messages))):
            raise PydanticCustomError(
                "unpaired_results",
                "the results after the assistant's calls are not one for each call, by its id",
                {"param": "messages"},
            )
        return self


class ChatRequest(Dialogue, OpenAIRequest):
    """A conversation to continue."""

    max_completion_tokens: Count | None = Field(
        None, description="Most tokens to generate. Default: as many as fit after the conversation.", examples=[16]
    )
    max_tokens: Count | None = Field(None, description="The earlier name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Show the log-probability of each token.")
    top_logprobs: Logprobs | None = Field(
        None, description="Show this many most likely tokens at each place too; with logprobs."
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = unsupported('["text"]')
    function_call: Literal["auto", "none"] | None = unsupported('"auto"', '"none"')
    functions: EmptyList | None = unsupported("[]")
    audio: None = unsupported()
    prediction: None = unsupported()
    reasoning_effort: Literal["none"] | None = unsupported('"none"')
    verbosity: Literal["medium"] | None = unsupported('"medium"')
    web_search_options: None = unsupported()

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        _check_one_count(self.max_tokens, self.max_completion_tokens)
        if self.callable_functions() and self.forms():
            field = self.forms()[0][0]
            raise PydanticCustomError("one_form", "not together with tools that may be called", {"param": field})
        if self.use_beam_search and self.callable_functions():
            raise PydanticCustomError("beam_search", "not with use_beam_search=true", {"param": "tools"})
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "only with logprobs=true", {"param": "top_logprobs"})
        return self
