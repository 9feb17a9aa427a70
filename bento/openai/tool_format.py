"""Answers of a chat model that may call functions: calls are separated from the text."""

from collections.abc import Sequence
from typing import Any

from bento.openai.format import ChatFormat
from bento.openai.tools import Arguments, CallReader, CallStart, Content, Part, read_answer
from model.generation.requests import Event, Finished


class ToolChatFormat(ChatFormat):
    """/v1/chat/completions with tools."""

    is_plain_text = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._readers = [CallReader() for _ in self._choices]
        self._whole = 0
        """Choices of a whole answer that were read."""

    def whole(self, results: Sequence[tuple[list[Event], Finished]]) -> dict[str, Any]:
        """The answer in one piece."""
        answer = super().whole(results)
        for choice in answer["choices"]:
            choice["finish_reason"] = self._finish_reason(choice["index"], choice["finish_reason"])
        return answer

    def _content(self, text: str) -> dict[str, Any]:
        content, calls = read_answer(text, self._readers[self._whole])
        self._whole += 1
        message = {"role": "assistant", "content": content, "refusal": None}
        return {"message": {**message, "tool_calls": calls} if calls else message}

    def _deltas(self, index: int, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        reader = self._readers[index]
        parts = [*reader.push(text), *(reader.flush() if is_last else ())]
        return [{"delta": _delta(part)} for part in parts]

    def _finish_reason(self, index: int, reason: str) -> str:
        reader = self._readers[index]
        return "tool_calls" if reason == "stop" and reader.calls and not reader.is_inside_call else reason


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, CallStart):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.number, "id": part.id, "type": "function", "function": function}]}
    assert isinstance(part, Arguments)
    return {"tool_calls": [{"index": part.number, "function": {"arguments": part.text}}]}
