"""Writes conversations as tokens, for training and as the tokenizer's chat template renders them.

Each turn is the mark of its role and its text; the end-of-text token ends a turn of the assistant, and with it a
generation. Marks are special tokens, which texts cannot spell: in training here and in the service, a mark that is
written out in a text is plain text and starts no turn. Records are read in `model.text.chat.conversations`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.errors import PipelineError, json_type

if TYPE_CHECKING:  # seconds to import, and reading a corpus needs none of it
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MARKS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
"""The special token that starts a turn, by the role that speaks."""

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|assistant|>' + message['content'] + eos_token }}
{%- elif message['role'] == 'user' -%}
{{ '<|user|>' + message['content'] }}
{%- elif message['role'] == 'system' or message['role'] == 'developer' -%}
{{ '<|system|>' + message['content'] }}
{%- elif message['role'] == 'tool' -%}
{{ '<|tool|>' + message['content'] }}
{%- else -%}
{{ raise_exception('no turn of the role ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- endif -%}"""
"""Jinja, for `PreTrainedTokenizerFast.chat_template`. It does not join parts of text: callers pass one text a turn."""

Ids = npt.NDArray[np.uint32]


class Turn(NamedTuple):
    """A role of `MARKS` and its text."""

    role: str
    content: str


def document(turns: Sequence[Turn]) -> str:
    """The text that a corpus keeps of a conversation: JSON with `messages`, as datasets of conversations have it."""
    return json.dumps({"messages": [turn._asdict() for turn in turns]}, ensure_ascii=False)


def turns_of(text: str) -> list[Turn]:
    """The turns that `document` wrote. Raises PipelineError for another text."""
    try:
        return [Turn(message["role"], message["content"]) for message in json.loads(text)["messages"]]
    except (ValueError, TypeError, KeyError) as error:
        raise PipelineError(
            f"tokenizer.chat is true, but a document of the corpus is not a conversation ({text[:40]!r}...): expected "
            "messages, or prompts and responses; set corpus.messages_field or corpus.response_field"
        ) from error


def add_marks(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Make the marks special tokens of `tokenizer`, at the end of its vocabulary if it lacks them, and set the
    chat template.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS.values())})
    tokenizer.chat_template = TEMPLATE


def has_marks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether conversations are written with `TEMPLATE`, which has turns of tools."""
    return bool(tokenizer.chat_template == TEMPLATE)


def end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end a generation: end of text and, if the tokenizer has marks, each that starts a turn."""
    known = tokenizer.get_vocab() if has_marks(tokenizer) else {}
    ends = [tokenizer.eos_token_id, *(known[mark] for mark in MARKS.values() if mark in known)]
    return [int(number) for number in ends if number is not None]


@dataclass
class EncodedConversation:
    """ids: the tokens, shape (T,). answers: first token of each answer and the one after its last, all that is learned.

    cuts_turns, cuts_prompt, cuts_response: the parts that did not fit into the window.
    """

    ids: Ids
    answers: list[tuple[int, int]]
    cuts_turns: bool = False
    cuts_prompt: bool = False
    cuts_response: bool = False


class ChatEncoder:
    """Encodes conversations for a window of `length` tokens.

    A conversation that is longer keeps the system's turns at its start and as many of its last exchanges as fit whole;
    an exchange goes from the question to the answer, calls of tools and their results included. The last exchange is
    kept even if it does not fit: its prompts lose their start, so that its answers are whole; answers longer than
    three quarters of the window, after prompts of more than a quarter, leave them that quarter and lose their own end.
    Turns after the last answer go first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", encode: Callable[[str], Ids], length: int) -> None:
        """encode: ids of ordinary text, without special tokens."""
        vocabulary = tokenizer.get_vocab()
        self._marks = {role: vocabulary[mark] for role, mark in MARKS.items()}
        self._end = tokenizer.eos_token_id
        self._encode, self._length = encode, length

    def encode(self, turns: Sequence[Turn]) -> EncodedConversation | None:
        """The tokens of a conversation, an end-of-text token last; None if the assistant has no turn."""
        roles = [turn.role for turn in turns]
        if "assistant" not in roles:
            return None
        parts = [self._encode_turn(turn) for turn in turns]
        last = [] if roles[-1] == "assistant" else [np.array([self._end], np.uint32)]
        if sum(map(len, [*parts, *last])) <= self._length:
            return EncodedConversation(np.concatenate([*parts, *last]), _answers(roles, parts))
        kept = _last_exchanges(roles, [len(part) for part in parts], self._length)
        roles, whole = [roles[index] for index in kept], [parts[index] for index in kept]
        shown = _cut_turns(roles, whole, self._length)
        cut = {role == "assistant" for role, a, b in zip(roles, whole, shown, strict=True) if len(a) > len(b)}
        return EncodedConversation(
            np.concatenate(shown), _answers(roles, shown), len(kept) < len(parts), False in cut, True in cut
        )

    def _encode_turn(self, turn: Turn) -> Ids:
        end = [self._end] if turn.role == "assistant" else []
        return np.concatenate([[self._marks[turn.role]], self._encode(turn.content), end]).astype(np.uint32)


def _answers(roles: Sequence[str], parts: Sequence[Ids]) -> list[tuple[int, int]]:
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return [
        (end - len(part) + 1, end) for role, part, end in zip(roles, parts, ends, strict=True) if role == "assistant"
    ]


def _last_exchanges(roles: Sequence[str], lengths: Sequence[int], length: int) -> list[int]:
    """The turns that a window keeps."""
    beyond = len(roles) - list(reversed(roles)).index("assistant")
    head = next(index for index, role in enumerate(roles) if role != "system")
    starts = [
        index
        for index in range(head, beyond)
        if index == head or (roles[index - 1] == "assistant" and roles[index] not in ("assistant", "tool"))
    ]
    room = length - sum(lengths[:head])
    start = next((start for start in starts if sum(lengths[start:beyond]) <= room), starts[-1])
    # Of more turns than a window has room for marks, the last ones.
    return [*range(head), *range(start, beyond)][-(length // 4) :]


def _cut_turns(roles: Sequence[str], parts: Sequence[Ids], length: int) -> list[Ids]:
    """The turns cut to `length` tokens together, the longest ones first; every mark stays."""
    prompts = [len(part) for role, part in zip(roles, parts, strict=True) if role != "assistant"]
    answers = [len(part) - 1 for role, part in zip(roles, parts, strict=True) if role == "assistant"]
    room = max(length - sum(answers), min(sum(prompts) + len(answers), length // 4))  # marks of answers included
    prompt = _largest_share(prompts, room - len(answers))
    answer = 1 + _largest_share(answers, length - room)
    return [
        part[:answer] if role == "assistant" else np.concatenate([part[:1], part[1:][max(len(part) - prompt, 0) :]])
        for role, part in zip(roles, parts, strict=True)
    ]


def _largest_share(lengths: Sequence[int], total: int) -> int:
    """The largest number such that lengths cut to it sum to at most `total`."""
    left = total
    for waiting, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        if length * waiting > left:
            return left // waiting
        left -= length
    return max(lengths, default=0)


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, its parts joined by line breaks. Raises ValueError if a part is not text."""
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        content = "\n".join(map(_text_of_part, content))
    if isinstance(content, str):
        return content
    raise ValueError(f"content is {_kind(content)}; expected text, or parts of text")


def _text_of_part(part: dict[str, Any]) -> str:
    text = part.get("text")
    if part.get("type", "text") != "text" or not isinstance(text, str):
        raise ValueError(f"content has a part of the type {part.get('type')!r}; the model reads text")
    return text


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {json_type(value)}"
