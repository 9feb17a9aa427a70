"""Formats the engine's events as the OpenAI API's responses: whole answers and stream chunks.

Most chunks carry only text. Such a chunk is concatenated from two constant parts and the text, because encoding its
whole JSON would cost more for each token of each stream.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, ClassVar

from bento.openai.logprobs import (
    PositionedToken,
    TokenAligner,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    position_prompt,
    prompt_logprobs,
)
from bento.serving.answers import Batch, server_sent
from bento.serving.backend import Prompt
from model.generation.requests import Event, Finished, PromptScores, TextPiece, TokenLogprob

if TYPE_CHECKING:
    from model.generation.engine import Engine

TEXT_GOES_HERE = "a7c3text91f0goes5e2dhere"


@dataclass(frozen=True)
class ChoiceOptions:
    """The parts of a choice besides its text.

    is_echoed: the text begins with the prompt. endings: end-of-text tokens that are shown, because the engine continues
    after them.
    """

    is_scored: bool
    has_ids: bool
    is_echoed: bool = False
    has_prompt_scores: bool = False
    endings: frozenset[int] = frozenset()


class Choice:
    """A text under generation: its tokens and their character offsets."""

    def __init__(self, prompt: Prompt, shown: ChoiceOptions, engine: "Engine") -> None:
        self.prompt, self._shown = prompt, shown
        self._token_bytes = engine.token_bytes
        self._start = ""
        if shown.is_echoed:
            self._start = engine.decode(prompt.ids) if prompt.text is None else prompt.text
        has_tokens = shown.is_scored or shown.has_ids
        self._aligner = TokenAligner(engine.token_bytes, len(self._start)) if has_tokens else None
        self.is_opened = self.has_shown_prompt = False
        self.generated_tokens = 0
        self._last_token = -1
        self.prompt_scores: tuple[TokenLogprob | None, ...] = ()

    def read(self, event: Event) -> tuple[str, list[PositionedToken]]:
        """The text and tokens that an event completes; the first ones begin with an echoed prompt."""
        text, self._start = self._start, ""
        tokens: list[PositionedToken] = []
        if isinstance(event, PromptScores):
            self.prompt_scores = event.logprobs
            if self._shown.is_echoed and self._shown.is_scored:
                tokens = position_prompt(self.prompt.ids, event.logprobs, self._token_bytes)
        elif isinstance(event, TextPiece):
            text += event.text
            self.generated_tokens += len(event.token_ids)
            if self._aligner:
                tokens = self._aligner.push(event)
                self._last_token = event.token_ids[-1] if event.token_ids else self._last_token
        elif isinstance(event, Finished):
            self.generated_tokens = event.generated_tokens
            tokens = self._aligner.flush(event.stopped_by) if self._aligner else []
        return text, tokens

    def finish_reason(self, last: Finished) -> str:
        """The OpenAI API's reason for the end of the text."""
        return "stop" if self._last_token in self._shown.endings else last.finish_reason


class Format(ABC):
    """The answers to one request. number: used for its id; n: consecutive choices per prompt."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]
    is_plain_text: ClassVar[bool] = True
    """Whether a text is shown unmodified."""

    def __init__(
        self,
        *,
        shown: ChoiceOptions,
        engine: "Engine",
        model: str,
        fingerprint: str,
        number: str,
        prompts: Sequence[Prompt],
        n: int,
        has_usage: bool,
        has_running_usage: bool,
    ) -> None:
        self.shown, self.names = shown, TokenNames.of(engine)
        self._prompts, self._n = prompts, n
        self._has_usage, self._has_running_usage = has_usage, has_running_usage
        self._choices = [Choice(prompt, shown, engine) for prompt in prompts for _ in range(n)]
        self._head = {
            "id": f"{self.id_prefix}-{number}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.unshown_tokens = 0
        """Tokens generated for texts that are not among the choices."""
        self._cached: list[int | None] = [None] * len(prompts)
        self._around: list[tuple[str, str]] = []

    def whole(self, results: Sequence[tuple[list[Event], Finished]]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, (events, last) in enumerate(results):
            choice = self._choices[index]
            read = [choice.read(event) for event in (*events, last)]
            tokens = [token for _, some in read for token in some]
            self._note_cached(index, last)
            content = self._content("".join(text for text, _ in read))
            extras = self._extras(choice, tokens, has_text=True)
            choices.append({"index": index, **content, "finish_reason": choice.finish_reason(last), **extras})
        return {**self._head, "object": self.object, "choices": choices, "usage": self._usage()}

    async def stream(self, batches: AsyncGenerator[Batch]) -> AsyncGenerator[str]:
        """Server-sent events; events of one step are sent in one write."""
        is_plain = self.is_plain_text and not (self.shown.is_scored or self.shown.has_ids or self._has_running_usage)
        self._around = [self._constant_parts(index) for index in range(len(self._choices))]
        async for batch in batches:
            out = []
            for index, event in batch:
                choice = self._choices[index]
                if not choice.is_opened:
                    choice.is_opened = True
                    out += self._opening(index)
                if isinstance(event, TextPiece) and is_plain:
                    text, _ = choice.read(event)
                    if text:
                        before, after = self._around[index]
                        out.append(f"{before}{encode_basestring(text)}{after}")
                    continue
                out += self._chunks(index, event)
            if out:
                yield "".join(out)
        if self._has_usage:
            yield self._event([], self._usage())

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """A choice's text, of a whole answer."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """A choice's text, of a chunk."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[PositionedToken]) -> dict[str, Any]:
        """Tokens of a choice with their log-probabilities."""

    def _opening(self, index: int) -> list[str]:
        """Chunks before a choice's first text."""
        return []

    def _chunks(self, index: int, event: Event) -> list[str]:
        choice = self._choices[index]
        text, tokens = choice.read(event)
        deltas = self._deltas(index, text, is_last=isinstance(event, Finished))
        finish_reason = None
        if isinstance(event, Finished):
            finish_reason = self._finish_reason(index, choice.finish_reason(event))
            self._note_cached(index, event)
        elif not (deltas or tokens):
            return []
        *first, last = deltas or [self._delta("")]
        usage = self._usage() if self._has_running_usage else None
        chunks = [{"index": index, **delta, "finish_reason": None, "logprobs": None} for delta in first]
        extras = self._extras(choice, tokens, has_text=bool(text))
        chunks.append({"index": index, **last, "finish_reason": finish_reason, **extras})
        return [self._event([chunk], usage) for chunk in chunks]

    def _deltas(self, index: int, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """The parts that wrap a choice's next text."""
        return [self._delta(text)] if text else []

    def _finish_reason(self, index: int, reason: str) -> str:
        """The reason for the end of a streamed choice."""
        return reason

    def _extras(self, choice: Choice, tokens: Sequence[PositionedToken], *, has_text: bool) -> dict[str, Any]:
        # A text without tokens has an empty list: its tokens came with an earlier part.
        is_scored = self.shown.is_scored and bool(tokens or has_text)
        extras: dict[str, Any] = {"logprobs": self._logprobs(tokens) if is_scored else None}
        if self.shown.has_ids:
            extras["token_ids"] = [token.token_id for token in tokens if not token.is_prompt]
            if not choice.has_shown_prompt:
                choice.has_shown_prompt = True
                extras["prompt_token_ids"] = list(choice.prompt.ids)
        return extras

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> str:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._has_usage or self._has_running_usage:
            chunk["usage"] = usage
        return server_sent(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))

    def _constant_parts(self, index: int) -> tuple[str, str]:
        choice = {"index": index, **self._delta(TEXT_GOES_HERE), "finish_reason": None, "logprobs": None}
        before, after = self._event([choice], None).split(f'"{TEXT_GOES_HERE}"')
        return before, after

    def _note_cached(self, index: int, last: Finished) -> None:
        # Of several choices of one prompt, the first to run finds the fewest cached tokens.
        prompt = index // self._n
        known = self._cached[prompt]
        self._cached[prompt] = last.cached_tokens if known is None else min(known, last.cached_tokens)

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        generated = self.unshown_tokens + sum(choice.generated_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached or 0 for cached in self._cached)},
        }


class CompletionFormat(Format):
    """/v1/completions."""

    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[PositionedToken]) -> dict[str, Any]:
        return completion_logprobs(tokens, self.names)

    def whole(self, results: Sequence[tuple[list[Event], Finished]]) -> dict[str, Any]:
        """The answer in one piece."""
        answer = super().whole(results)
        if self.shown.has_prompt_scores:
            for shown, choice in zip(answer["choices"], self._choices, strict=True):
                shown["prompt_logprobs"] = prompt_logprobs(choice.prompt_scores, self.names)
        return answer


class ChatFormat(Format):
    """/v1/chat/completions."""

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, tokens: Sequence[PositionedToken]) -> dict[str, Any]:
        return chat_logprobs(tokens, self.names)

    def whole(self, results: Sequence[tuple[list[Event], Finished]]) -> dict[str, Any]:
        """The answer in one piece."""
        answer = super().whole(results)
        if self.shown.has_prompt_scores:
            answer["prompt_logprobs"] = prompt_logprobs(self._choices[0].prompt_scores, self.names)
        return answer

    def _opening(self, index: int) -> list[str]:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": None,
            "logprobs": None,
        }
        return [self._event([choice], self._usage() if self._has_running_usage else None)]
