"""Pairs of answers to a prompt, of which one is preferred: the data of preference tuning.

JSON Lines (also .gz or .zst) with `prompt`, `chosen` and `rejected`. Each is a text, or a list of messages with `role`
and `content`; answers end with the assistant's message. A broken record ends the run with one line that names it.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from model.errors import PipelineError, json_type, names_of, not_json
from model.text.chat.conversations import ROLES
from model.text.chat.template import MARKS, Turn, has_marks, text_of
from model.text.compression import CODECS, BrokenFile
from model.text.encodings import Utf8Stream
from model.text.files import list_files, open_file, reading
from model.text.sources import MAX_LINE_BYTES, content_of
from model.text.tokenizer import FastEncoder

FIELDS = ("prompt", "chosen", "rejected")
_SURROGATE = re.compile("[\ud800-\udfff]")
HELD_OUT = 0.1
"""Fraction of the pairs, by a hash of the prompt, that is not trained on but scored at the end."""


@dataclass(frozen=True)
class Preference:
    """A prompt as turns, and two answers to it."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str

    @property
    def is_held_out(self) -> bool:
        """Whether the pair is scored instead of trained on; the same prompt always is, or never."""
        digest = hashlib.blake2b(json.dumps(self.prompt).encode(), digest_size=8).digest()
        return int.from_bytes(digest) < HELD_OUT * 2**64


def read_preferences(paths: Sequence[str]) -> Iterator[Preference]:
    """The pairs in files, globs or URLs, in order.

    Raises PipelineError, one line, for a pattern without a match, a broken file and a record that is not a preference.
    """
    for file in list_files(paths, "training.preferences").files:
        name = PurePosixPath(file.path.lower())
        codec = CODECS.get(name.suffix)
        if (PurePosixPath(name.stem).suffix if codec else name.suffix) not in (".jsonl", ".ndjson"):
            raise PipelineError(f"{file.source} in training.preferences is not a .jsonl, .jsonl.gz or .jsonl.zst file")
        number = 0
        try:
            with reading(file.source, file.fs), open_file(file) as stored:
                stream = io.BufferedReader(Utf8Stream(content_of(file.source, stored, codec)))
                for number, line in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES), b""), 1):
                    if not line.isspace():
                        yield preference(line, f"{file.source}, line {number}")
        except BrokenFile as error:
            raise PipelineError(
                f"{file.source}, line {number + 1}: broken {codec} file ({error}); fetch or write it again"
            ) from error


def preference(line: bytes, where: str) -> Preference:
    """The pair of one line. Raises PipelineError if it is none; where: names the line."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{where} is not JSON in UTF-8 ({not_json(error)}); expected one object a line") from error
    if not isinstance(row, dict):
        raise PipelineError(f"{where} is a JSON {json_type(row)}; expected one object a line")
    for field in FIELDS:
        if field not in row:
            found = names_of(row)
            raise PipelineError(f"{where} has no field {field!r}; found: {found}; expected {', '.join(FIELDS)}")
    prompt = _turns(row["prompt"], "user", f"{where}, prompt")
    answers = []
    for field in FIELDS[1:]:
        turns = _turns(row[field], "assistant", f"{where}, {field}")
        if len(turns) > 1 and turns[:-1] == prompt:  # the whole conversation, as some datasets have it
            turns = turns[-1:]
        if len(turns) != 1 or turns[0].role != "assistant":
            raise PipelineError(
                f"{where}, {field}: {len(turns)} messages, the last of {turns[-1].role if turns else 'no role'}; "
                "expected one of the assistant, after those of the prompt or alone"
            )
        answers.append(turns[0].content)
    if not prompt or prompt[-1].role == "assistant":
        raise PipelineError(f"{where}, prompt: expected a question, which the assistant has not answered yet")
    if any(map(_SURROGATE.search, (*answers, *(turn.content for turn in prompt)))):
        raise PipelineError(f"{where} has half of a surrogate pair, which no text has; correct or remove it")
    if answers[0] == answers[1]:
        raise PipelineError(
            f"{where}: chosen and rejected are equal; expected two different answers, or remove the line"
        )
    return Preference(tuple(prompt), *answers)


def _turns(value: Any, role: str, where: str) -> list[Turn]:
    if isinstance(value, str):
        return [Turn(role, value)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise PipelineError(f"{where} is a {json_type(value)}; expected text, or a list of messages")
    turns = []
    for number, message in enumerate(value, 1):
        name = message.get("role", message.get("from"))
        if not isinstance(name, str) or name not in ROLES:
            known = ", ".join(MARKS)
            raise PipelineError(f"{where}, message {number} has the role {name!r}; expected one of {known}")
        try:
            turns.append(Turn(ROLES[name], text_of({"content": message.get("value"), **message, "role": ROLES[name]})))
        except ValueError as error:
            raise PipelineError(f"{where}, message {number}: {error}") from None
    return turns


class PreferenceEncoder:
    """Encodes pairs for a window of `length` tokens, as conversations are encoded for training and serving.

    A longer pair loses the start of its prompt, and then the end of its answers, which keep three quarters of the
    window.
    cut: pairs that lost something.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        self._encode: Callable[[str], npt.NDArray[np.uint32]] = FastEncoder(tokenizer).encode
        self._vocabulary = tokenizer.get_vocab() if has_marks(tokenizer) else {}
        self._end, self._length = tokenizer.eos_token_id, length
        self.cut = 0

    def encode(self, pair: Preference) -> dict[str, list[int]]:
        """prompt_ids, chosen_ids and rejected_ids; an end-of-text token ends each answer."""
        prompt = [token for turn in pair.prompt for token in [*self._mark(turn.role), *self._ids(turn.content)]]
        prompt += self._mark("assistant")
        answers = [[*self._ids(text), self._end] for text in (pair.chosen, pair.rejected)]
        room = min(max(map(len, answers)), self._length - min(len(prompt), self._length // 4))
        start = max(len(prompt) - (self._length - room), 0)
        self.cut += bool(start) or any(len(answer) > room for answer in answers)
        return {
            "prompt_ids": prompt[start:],
            "chosen_ids": answers[0][:room],
            "rejected_ids": answers[1][:room],
        }

    def _mark(self, role: str) -> list[int]:
        return [self._vocabulary[MARKS[role]]] if self._vocabulary else []

    def _ids(self, text: str) -> list[int]:
        return [int(number) for number in self._encode(text)]
