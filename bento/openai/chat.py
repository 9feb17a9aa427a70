"""Renders a conversation to tokens with the model's chat template.

A template puts special tokens around messages, and a message must not be able to inject one. So the template is
rendered with random placeholders in place of the contents, and only special tokens in that rendering count as such.
Then the contents replace the placeholders. The text between two special tokens is encoded as ordinary text in one
piece, so the tokens equal those of `apply_chat_template` for every content without special tokens. Values of template
variables (`chat_template_kwargs`) may be tested and compared by the template: they are passed as they are, and refused
if they spell a special token.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from bento.errors import ApiError
from model.text.chat.check import variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


HIDDEN = re.compile("content[0-9a-f]{32}")
DECIDED_BY_FIELDS = ("add_generation_prompt", "continue_final_message")
_LIMITS = (MemoryError, RecursionError)
"""Reached by a template that repeats a text, or calls itself, for some conversations."""
NO_VALUES: Mapping[str, Any] = MappingProxyType({})


class Turn(Protocol):
    """One message."""

    @property
    def role(self) -> str:
        """The speaker's role."""

    @property
    def content(self) -> str:
        """The message's text."""

    @property
    def name(self) -> str | None:
        """The speaker's name."""


def encode_chat(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Turn],
    encode: Callable[[str], list[int]],
    *,
    opens_turn: bool = True,
    continues: bool = False,
    values: Mapping[str, Any] = NO_VALUES,
    name: str = "messages",
    is_continued: bool = True,
) -> list[int]:
    """The tokens of a conversation, up to the start of the assistant's answer.

    encode: tokens of ordinary text. opens_turn: render the heading of the assistant's turn. continues: end inside the
    last message instead. values: of the template's variables; those that it does not read are dropped. name: the
    request's field of the conversation. is_continued: the text has to end at the assistant's turn. Raises ApiError 400
    if it does not, if the model has no template or if its template refuses the conversation (its order of roles, say).
    """
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "this model has no chat template, it only continues texts: use /v1/completions",
            code="no_chat_template",
            param=name,
        )
    specials = _special_tokens(tokenizer)
    render = partial(_render, tokenizer, _read_values(tokenizer, values, specials))
    contents: dict[str, str] = {}

    def hide(text: str) -> str:
        # Whitespace and empty contents are not replaced: templates strip or test for them.
        core = text.strip()
        if not core:
            return text
        word = _new_word()
        contents[word] = core
        return text.replace(core, word, 1)

    hidden = [
        {"role": turn.role, "content": hide(turn.content), **({"name": hide(turn.name)} if turn.name else {})}
        for turn in messages
    ]
    if continues:
        text = _open_last_message(render, hidden, messages[-1].content, contents, name)
    else:
        text = render(hidden, name, opens_turn=opens_turn)
        if text and is_continued and not _ends_at_assistant_turn(render, hidden, text):
            raise _no_turn(messages[-1].role, name, opens_turn=opens_turn)
    ids: list[int] = []
    for part in _split(text, specials):
        if part in specials:
            ids.append(specials[part])
        elif part:
            # In one pass: a content may contain another content's placeholder.
            ids += encode(HIDDEN.sub(lambda found: contents.get(found[0], found[0]), part))
    if not ids:
        raise ApiError(400, f"{name}: there is nothing to continue", code="empty_prompt", param=name)
    return ids


def _new_word() -> str:
    return f"content{secrets.token_hex(16)}"


def _open_last_message(
    render: "Render",
    hidden: list[dict[str, str]],
    content: str,
    contents: dict[str, str],
    name: str,
) -> str:
    """The conversation up to the end of its last message's content."""
    word = _new_word()
    contents[word] = content
    text = render([*hidden[:-1], {**hidden[-1], "content": word}], name, opens_turn=False)
    before, found, _ = text.rpartition(word)
    if not found:
        raise ApiError(
            400,
            f"{name}: the model's chat template does not show the last message, so it cannot be continued",
            code="chat_template",
            param=name,
        )
    return before + word


def _ends_at_assistant_turn(render: "Render", hidden: list[dict[str, str]], text: str) -> bool:
    """Whether `text` opens the assistant's turn.

    It does if the template supports a generation prompt. A template without one must have put the heading after the
    user's last turn: the next message of the assistant then begins there.
    """
    word = _new_word()
    try:
        plain = render(hidden, "", opens_turn=False)
        if text != plain:
            return text.startswith(plain)
        answered = render([*hidden, {"role": "assistant", "content": word}], "", opens_turn=False)
    except ApiError:  # the template refuses one of the conversations
        return False
    return hidden[-1]["role"] == "user" and answered.startswith(text + word)


def _no_turn(role: str, name: str, *, opens_turn: bool) -> ApiError:
    if role == "assistant":
        how = "continue it with continue_final_message=true, or " if name == "messages" else ""
        reason = f"the last message is the assistant's: {how}end with a user's"
    elif not opens_turn:
        reason = "add_generation_prompt=false leaves the text without the assistant's turn, which it has to end with"
    else:
        reason = f"the model's chat template opens no turn of the assistant after a message of the role {role!r}"
    return ApiError(400, f"{name}: {reason}", code="no_assistant_turn", param=name)


def _read_values(
    tokenizer: "PreTrainedTokenizerFast", values: Mapping[str, Any], specials: Iterable[str]
) -> dict[str, Any]:
    """The values that the template reads. Raises ApiError 400 for one that spells a special token."""
    if not values:
        return {}
    names = variables(tokenizer.get_chat_template())
    kept = {name: value for name, value in values.items() if name in names and name not in DECIDED_BY_FIELDS}
    texts = list(_texts(list(kept.values())))
    for special in specials:
        if any(special in text for text in texts):
            raise ApiError(
                400,
                f"chat_template_kwargs: a value spells the special token {special!r}, which no request may",
                code="template_value",
                param="chat_template_kwargs",
            )
    return kept


def _texts(values: Iterable[Any]) -> Iterator[str]:
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]


class Render(Protocol):
    """Renders a conversation. name: the request's field of it."""

    def __call__(self, messages: list[dict[str, str]], name: str, *, opens_turn: bool) -> str:
        """The text. Raises ApiError."""


def _render(
    tokenizer: "PreTrainedTokenizerFast",
    values: Mapping[str, Any],
    messages: list[dict[str, str]],
    name: str,
    *,
    opens_turn: bool,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn, **values))
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, *_LIMITS) as error:
        reason = " ".join(str(error).split())[:200]
        raise ApiError(
            400,
            f"{name}: the model's chat template does not take this conversation ({reason})",
            code="chat_template",
            param=name,
        ) from None


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**special, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def _split(text: str, specials: Iterable[str]) -> list[str]:
    longest_first = sorted(specials, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]
