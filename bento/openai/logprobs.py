"""Log-probabilities in the OpenAI API's form: the tokens of a text with their names and offsets.

The engine reports a token when it is sampled, but its text only once it is final: a stop string may remove it, a
character may be incomplete. `TokenAligner` aligns the two.
"""

import codecs
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from bento.serving.heavy import rest
from model.generation.requests import TextPiece, TokenLogprob

if TYPE_CHECKING:
    from model.generation.engine import Engine

LOWEST = -9999.0
"""Represents minus infinity, which JSON cannot represent."""


class TokenNames(dict[int, str]):
    r"""A token's name: its text, `bytes:\xe2\x80` for incomplete characters, `<|name|>` for a token without text.

    Names are made when they are first looked up: an answer with log-probabilities has thousands.
    """

    _of_engines: ClassVar[WeakKeyDictionary["Engine", "TokenNames"]] = WeakKeyDictionary()

    def __init__(self, engine: "Engine") -> None:
        super().__init__()
        self._token_bytes, self._tokenizer = engine.token_bytes, engine.tokenizer

    @classmethod
    def of(cls, engine: "Engine") -> "TokenNames":
        """The names of an engine's tokens, shared by its requests."""
        return cls._of_engines.setdefault(engine, cls(engine))

    def data(self, token_id: int) -> bytes:
        """The bytes of a token's text; empty for special tokens and ids that pad the vocabulary."""
        return self._token_bytes[token_id]

    def __missing__(self, token_id: int) -> str:
        name = self[token_id] = self._name(token_id)
        return name

    def _name(self, token_id: int) -> str:
        data = self.data(token_id)
        if not data:
            return str(self._tokenizer.convert_ids_to_tokens(token_id) or f"<|{token_id}|>")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True)
class PositionedToken:
    """A token of a text. offset: where its text begins, in characters."""

    offset: int
    token_id: int
    score: TokenLogprob | None = None
    is_prompt: bool = False


class TokenOffsets:
    """Character offsets of consecutive tokens in the text that `Detokenizer` makes of them."""

    def __init__(self, token_bytes: Sequence[bytes], start: int = 0) -> None:
        self._token_bytes, self._end = token_bytes, start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token_id: int) -> int:
        """Offset of the character in which the next token begins; an earlier token may have begun that character."""
        data = self._token_bytes[token_id]
        was_inside = bool(self._decoder.getstate()[0])
        first = self._decoder.decode(data[:1])
        # A byte that cannot continue an incomplete character turns that one into U+FFFD and begins after it.
        is_broken = was_inside and first.startswith("\ufffd") and (len(first) > 1 or bool(self._decoder.getstate()[0]))
        place = self._end + is_broken
        self._end += len(first) + len(self._decoder.decode(data[1:]))
        return place


def position_prompt(
    ids: Iterable[int], scores: Iterable[TokenLogprob | None], token_bytes: Sequence[bytes]
) -> list[PositionedToken]:
    """The tokens of an echoed prompt with their offsets."""
    offsets = TokenOffsets(token_bytes)
    return [PositionedToken(offsets.next(i), i, score, is_prompt=True) for i, score in zip(ids, scores, strict=True)]


class TokenAligner:
    """The tokens of one generated text. start: characters of the text before it."""

    def __init__(self, token_bytes: Sequence[bytes], start: int = 0) -> None:
        self._offsets, self._certain = TokenOffsets(token_bytes, start), start
        self._held: deque[PositionedToken] = deque()

    def push(self, piece: TextPiece) -> list[PositionedToken]:
        """The tokens whose text is final with this piece."""
        for number, token_id in enumerate(piece.token_ids):
            score = piece.logprobs[number] if piece.logprobs else None
            self._held.append(PositionedToken(self._offsets.next(token_id), token_id, score))
        self._certain += len(piece.text)
        certain = []
        while self._held and self._held[0].offset < self._certain:
            certain.append(self._held.popleft())
        return certain

    def flush(self, stopped_by: str | int | None) -> list[PositionedToken]:
        """The remaining tokens at the end; none if a stop string removed their text."""
        rest = [] if isinstance(stopped_by, str) else list(self._held)
        self._held.clear()
        return rest


def prompt_logprobs(scores: Sequence[TokenLogprob | None], names: TokenNames) -> list[dict[str, Any] | None]:
    """A prompt's log-probabilities: by token id, the token and the most likely ones, in vLLM's format."""
    shown: list[dict[str, Any] | None] = []
    for score in scores:
        rest()
        if score is None:
            shown.append(None)
            continue
        ids, logprobs = _ranked(score)
        place: dict[str, Any] = {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": names[token]}
            for rank, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), start=1)
        }
        own = {"logprob": _finite(score.logprob), "rank": None, "decoded_token": names[score.token_id]}
        place.setdefault(str(score.token_id), own)
        shown.append(place)
    return shown


def completion_logprobs(tokens: Sequence[PositionedToken], names: TokenNames) -> dict[str, Any]:
    """The format of /v1/completions."""
    return {
        "tokens": [names[token.token_id] for token in tokens],
        "token_logprobs": [None if token.score is None else _finite(token.score.logprob) for token in tokens],
        "top_logprobs": [None if token.score is None else _legacy_top(token.score, names) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[PositionedToken], names: TokenNames) -> dict[str, Any]:
    """The format of /v1/chat/completions."""
    content = []
    for token in tokens:
        rest()
        if token.score is not None:
            top = [_chat_token(names, *one) for one in zip(*_ranked(token.score), strict=True)]
            content.append({**_chat_token(names, token.token_id, _finite(token.score.logprob)), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    data = names.data(token_id)
    return {"token": names[token_id], "logprob": logprob, "bytes": list(data) if data else None}


def _legacy_top(score: TokenLogprob, names: TokenNames) -> dict[str, float]:
    rest()
    ids, logprobs = _ranked(score)
    top = dict(zip(map(names.__getitem__, ids), logprobs, strict=True))
    if len(top) < len(ids):  # two ids can have one name: the first, more likely one stays
        top = {}
        for token_id, logprob in zip(ids, logprobs, strict=True):
            top.setdefault(names[token_id], logprob)
    top.setdefault(names[score.token_id], _finite(score.logprob))  # the token itself is always among them
    return top


def _ranked(score: TokenLogprob) -> tuple[list[int], list[float]]:
    """The most likely tokens and their log-probabilities. Raises ValueError as `_finite`."""
    ids, logprobs = score.ranked
    # All are at most 0: a sum above the lowest has none below it, and no NaN.
    return ids, logprobs if sum(logprobs) > LOWEST else [_finite(logprob) for logprob in logprobs]


def _finite(logprob: float) -> float:
    if math.isnan(logprob):
        raise ValueError("a log-probability is not a number: the model's weights or its cache hold broken numbers")
    return max(logprob, LOWEST)
