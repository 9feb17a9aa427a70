"""Records of conversations: `messages` of roles, ShareGPT's `from` and `value`, or a prompt and its response.

Each becomes the document that `model.text.chat.document` writes. A record that holds none raises PipelineError with its
place and what is wrong. Nothing is encoded or cut here: that is `model.text.chat`.
"""

from typing import Any

from model.errors import PipelineError
from model.settings import CorpusSettings
from model.text.chat import MARKS, Turn, document, text_of

ROLES = {
    **{role: role for role in MARKS},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""The roles of messages, and the names that data sets give them."""


def conversation(row: dict[str, Any], settings: CorpusSettings, where: str) -> bytes:
    """The document of one record, UTF-8; a text that has none stays invalid, for the corpus to count.

    Raises PipelineError for a record that holds no conversation under the names of `settings`.
    """
    if settings.messages_field and settings.messages_field in row:
        return read_messages(row[settings.messages_field], f"{where}, {settings.messages_field}")
    missing = [name for name in (settings.text_field, settings.response_field) if name not in row]
    if not settings.response_field or missing:
        name, setting = (
            (settings.messages_field, "corpus.messages_field")
            if settings.messages_field
            else (missing[0], "corpus.text_field" if missing[0] == settings.text_field else "corpus.response_field")
        )
        found = ", ".join(sorted(map(str, row))) or "none"
        raise PipelineError(f"{where} has no field {name!r}; found: {found}; set {setting} to one of them")
    return prompt_and_response(row[settings.text_field], row[settings.response_field], where)


def prompt_and_response(prompt: object, response: object, where: str) -> bytes:
    """The document of a prompt and its response. Raises PipelineError where one is no text or the response empty."""
    if not isinstance(prompt, str) or not isinstance(response, str) or not response:
        raise PipelineError(f"{where}: expected text as prompt and as response, the response not empty; correct it")
    prompt, response = prompt.removeprefix("\ufeff"), response.removeprefix("\ufeff")
    return _encode([Turn("user", prompt), Turn("assistant", response)])


def read_messages(messages: object, where: str) -> bytes:
    """The document of a list of messages, each {role, content} or {from, value}."""
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else f"a {type(messages).__name__}"
        raise PipelineError(f"{where} is {found}; expected a list of messages, each with role and content")
    return _encode([_turn(message, f"{where}[{index}]") for index, message in enumerate(messages)])


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise PipelineError(f"{where} is a {type(message).__name__}; expected an object with role and content")
    # Tables give every row all names of a struct, without a value where the record had none.
    if message.get("role") is None and message.get("from") is not None:
        message = {"role": message["from"], "content": message.get("value")}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise PipelineError(f"{where}.role is {role!r}; expected one of {', '.join(sorted(ROLES))}")
    if message.get("tool_calls"):
        raise PipelineError(f"{where} has tool_calls, which have no form in the chat template; write them as content")
    message = {**message, "role": ROLES[role]}
    try:
        return Turn(ROLES[role], text_of(message))
    except ValueError as error:
        raise PipelineError(f"{where}.{error}; correct or remove it") from error


def _encode(turns: list[Turn]) -> bytes:
    return document(turns).encode("utf-8", "surrogatepass")
