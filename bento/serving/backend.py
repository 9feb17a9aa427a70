"""The engine behind the routes: converts validated bodies to generations and checks limits that depend on the model.

A request gets its backend once and keeps that model until it ends, even if another model takes over.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from fastapi import Request

from bento.errors import UNSUPPORTED_VALUE, ApiError, context_exceeded, server_error
from bento.schema import ALL_THAT_FITS, Sampling
from bento.serving.answers import Answers
from bento.serving.heavy import HeavyWork
from bento.serving.models import Models, Served
from model.errors import PipelineError
from model.generation.grammar.grammar import Grammar
from model.generation.requests import EngineBusy, EngineStopped, Finished, GenerationRequest, UnsupportedValue

if TYPE_CHECKING:
    from model.generation.engine import Engine

SHORT_TEXT = 4096
"""Longest text, in characters, that is tokenized in the event loop: waking a thread would take longer."""
PART_OF_TEXTS = 65_536
"""Characters of several texts that are tokenized in one turn of the other thread."""


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt, and its text if the request had one."""

    ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True)
class Backend:
    """The engine of one model and the service's limits, for routes.

    served: the model, which no rollover changes. request_timeout_s: from a request's arrival to its last token.
    queue_timeout_s: to its start; None waits on. max_choices: texts per request, prompts times choices. heavy: runs
    work that would block the event loop. clamp_max_tokens: reduce max_tokens to what fits (finish_reason "length")
    instead of refusing.
    """

    served: Served
    models: Models
    request_timeout_s: float
    queue_timeout_s: float | None
    max_choices: int
    heavy: HeavyWork
    clamp_max_tokens: bool = True

    @property
    def engine(self) -> "Engine":
        """The model's engine."""
        return self.served.engine

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.served.name or self.models.name

    async def encode(self, text: str) -> list[int]:
        """The tokens of a text; special tokens in it are ordinary text."""
        if len(text) <= SHORT_TEXT:
            return self.engine.encode(text)
        # Tokenizing a long text takes seconds, and the event loop serves every request.
        return await self.heavy.run(self.engine.encode, text, holds_lock=False)

    async def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of several texts, short or long."""
        if len(texts) == 1 or sum(map(len, texts)) <= SHORT_TEXT:
            return [await self.encode(text) for text in texts]
        encoded: list[list[int]] = []
        part: list[str] = []
        size = 0
        for number, text in enumerate(texts, start=1):
            part.append(text)
            size += len(text)
            if size > PART_OF_TEXTS or number == len(texts):
                encoded += await self.heavy.run(self._encode_part, part, holds_lock=False)
                part, size = [], 0
        return encoded

    def _encode_part(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.engine.encode(text) for text in texts]

    def check_ids(self, ids: Collection[int], *, param: str) -> None:
        """Raises ApiError 400 if a token is not in the vocabulary."""
        size = self.engine.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = next(token for token in ids if not 0 <= token < size)
            raise ApiError(
                400,
                f"{param} has the token id {str(wrong)[:20]}: the vocabulary has 0 to {size - 1}",
                code="invalid_token_id",
                param=param,
            )

    def truncate(self, prompt: Prompt, most: int | None, wanted: int | None) -> Prompt:
        """The prompt's last `most` tokens; None: all, -1: as many as leave room for `wanted` tokens, or for one."""
        if most is None:
            return prompt
        if most < 0:
            most = max(self.engine.context_length - max(wanted or 1, 1), 1)
        return prompt if len(prompt.ids) <= most else Prompt(prompt.ids[-most:])

    def fit(self, prompt: int, wanted: int | None, *, default: int | None, names: tuple[str, str]) -> int:
        """The number of tokens to generate after `prompt` tokens.

        wanted: None takes the default, or what fits if less; a default of None and ALL_THAT_FITS mean all that fits.
        names: the request's fields of the text and of the number. Raises ApiError 400 if the text leaves no room for a
        token or, with `clamp_max_tokens` off, less room than wanted. Clients match on the message, which is OpenAI's.
        """
        context = self.engine.context_length
        text_name, count_name = names
        free = context - prompt
        is_given = wanted is not None and wanted != ALL_THAT_FITS
        if wanted is None:
            wanted = max(free if default is None else min(default, free), 1)
        elif wanted == ALL_THAT_FITS:
            wanted = max(free, 1)
        is_too_long = free < min(wanted, 1)
        if is_too_long or (wanted > free and not self.clamp_max_tokens):
            limit = f"This model's maximum context length is {context} tokens. However, "
            if is_given and text_name == count_name:  # a body without a text
                message = f"you requested {wanted} tokens. Please reduce {count_name} to at most {free}."
            elif is_given:
                message = (
                    f"you requested {prompt + wanted} tokens: {prompt} tokens in the {text_name} and {wanted} in the "
                    f"completion ({count_name}). "
                    f"Please reduce the length of the {text_name if is_too_long else 'completion'}."
                )
            else:
                message = (
                    f"your {text_name} resulted in {prompt} tokens. Please reduce the length of the {text_name}; "
                    "the completion needs at least one token."
                )
            raise context_exceeded(limit + message, param=text_name if is_too_long else count_name)
        return min(wanted, free)

    def generations(
        self,
        body: Sampling,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        n: int = 1,
        *,
        grammar: Grammar | None = None,
        stop_until: str | None = None,
        **scores: int | None,
    ) -> list[GenerationRequest]:
        """The engine's form of a request: each prompt continued by its count of tokens, n times.

        grammar: what each text follows. stop_until: see `GenerationRequest`. scores: logprobs, prompt_logprobs. Raises
        ApiError 400 if they request more than the service offers.
        """
        if len(prompts) * n > self.max_choices:
            raise ApiError(
                400,
                f"the request asks for {len(prompts) * n} texts (prompts times n): at most {self.max_choices} at once",
                code="too_many_choices",
                param="n" if n > 1 else "prompt",
            )
        if body.min_tokens and body.min_tokens > min(counts):
            raise ApiError(
                400,
                f"min_tokens is {body.min_tokens:,}, but at most {min(counts):,} tokens are generated",
                code="min_tokens",
                param="min_tokens",
            )
        self.check_ids([int(token) for token in body.logit_bias or ()], param="logit_bias")
        self.check_ids(body.stop_token_ids or (), param="stop_token_ids")
        self.check_ids(body.allowed_token_ids or (), param="allowed_token_ids")
        if grammar and (body.bad_words or body.allowed_token_ids):
            name = "bad_words" if body.bad_words else "allowed_token_ids"
            raise ApiError(
                400,
                f"{name}: not together with a form of the text, which may need what it excludes",
                code="unsupported_parameter",
                param=name,
            )
        return [
            body.generation(prompt.ids, count, choice, grammar=grammar, stop_until=stop_until, **scores)
            for prompt, count in zip(prompts, counts, strict=True)
            for choice in range(n)
        ]

    def submit(self, request: Request, generations: Sequence[GenerationRequest]) -> Answers:
        """Start all of `generations` or none. Raises ApiError if the queue is full or the engine stopped."""
        record = request.state.record
        left_s = self.request_timeout_s - (time.monotonic() - record.started)
        client, connection = _sender(request)
        limited = [
            replace(
                one,
                timeout_s=left_s,
                queue_timeout_s=self.queue_timeout_s,
                client=client,
                connection=connection,
            )
            for one in generations
        ]
        try:
            return Answers(self.engine, limited, record, self._observer(limited))
        except EngineBusy as busy:
            retry = {"Retry-After": str(busy.retry_after_s)}
            raise ApiError(429, str(busy), code="queue_full", type="rate_limit_error", headers=retry) from None
        except EngineStopped:
            raise server_error(503, "the model has stopped: the service restarts", code="stopped") from None
        except UnsupportedValue as error:
            raise ApiError(400, str(error), code=UNSUPPORTED_VALUE) from None
        except PipelineError as error:
            raise ApiError(400, str(error), code="invalid_request") from None

    def _observer(self, generations: Sequence[GenerationRequest]) -> Callable[[Finished, float], None] | None:
        """Copies the request to a challenger. Returns the observer of each generation's end."""
        shadow, rollback = self.models.shadow, self.models.rollback
        copied = shadow.copy(self.engine, generations) if shadow else None
        if copied is None and rollback is None:
            return None

        def observe(last: Finished, seconds: float) -> None:
            if copied:
                copied(last, seconds)
            current = self.models.current
            if rollback and current and current.engine is self.engine:  # not the end of a former model's request
                rollback.add(last, seconds)

        return observe


class BackendOf(Protocol):
    """The backend of a request that was admitted."""

    def __call__(self, request: Request, model: str | None = None) -> Backend:
        """model: the name in the request. Raises ApiError 404 for one that is not served."""


def _sender(request: Request) -> tuple[str, str]:
    """The client, by API key or address, and its connection."""
    host, port = request.client or ("", 0)
    return getattr(request.state, "api_key", None) or host, f"{host}:{port}"


def challenger_named(name: str | None, models: Models) -> Served | None:
    """The challenger if a request names it, None for the served model, which an empty name means as well.

    Raises ApiError 404 for another name.
    """
    if challenger := models.challenger_named(name):
        return challenger
    if name and name not in models.names():
        raise ApiError(
            404,
            f"model {name[:100]!r} is not served here: {models.name!r} is",
            code="model_not_found",
            param="model",
        )
    return None
