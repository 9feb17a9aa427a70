"""Where documents come from and how they are split (`configs/corpus/`)."""

import codecs
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from model.errors import PipelineError
from model.settings.option import Settings, expect, expect_types, option


@dataclass
class CorpusSettings(Settings, group="corpus"):
    """Where documents come from and how they are split (`configs/corpus/`)."""

    source: Literal["stdlib", "docstrings", "files", "huggingface", "mixture"] = option(
        "stdlib",
        "stdlib: the standard library of the running Python; docstrings: the same as prompts and responses; files: "
        "`paths`; huggingface: `dataset`; mixture: those that `mixture` names.",
    )
    mixture: dict[str, Any] = option(
        {},
        "Sources by name, each with options of this group (source, paths, dataset, fields, encoding, max_bytes). "
        "`training.mixture_weights` says how often each is trained on.",
    )
    paths: list[str] = option(
        [],
        "Files, globs or URLs (s3://, https://, ...). .jsonl and .parquet are read as records, all else as plain text, "
        "each also as .gz or .zst.",
    )
    encoding: str = option(
        "",
        "Encoding of plain text, JSON Lines and bytes in Parquet, as Python names it (cp1252, shift_jis, utf-16-le, "
        "...); empty: UTF-8, or UTF-16 or UTF-32 if a byte order mark or NULs show it.",
    )
    text_field: str = option("text", "Field or column of a record that holds its text, or what the user says.")
    response_field: str = option(
        "", "Field or column of a record that holds what the assistant says; empty: documents are plain text."
    )
    messages_field: str = option(
        "",
        "Field or column of a record that holds a conversation: a list of {role, content}, or of {from, value}. A "
        "record without it is a prompt and its response.",
    )
    dataset: str = option("", "Dataset on the Hugging Face hub, or a local folder that datasets.load_dataset reads.")
    dataset_config: str | None = option(None, "Configuration of that dataset; null: its only one.")
    dataset_split: str = option("train", "The dataset's own split to read.")
    document_bytes: int = option(
        0,
        "Plain text files are split at line ends into documents of about this size; 0: a file is one document.",
        unit="bytes",
        minimum=0,
        maximum=2**30,
    )
    split_by: Literal["hash", "position"] = option(
        "hash",
        "hash: a document's hash decides its split, so it never moves; position: the text's last part validates.",
    )
    validation_fraction: float = option(
        0.1, "Fraction of the documents (or of the text) in the validation split.", above=0, below=1
    )
    validation_bytes: int = option(
        1_000_000,
        "Least text in a validation split by hash, or 5 % of the text if that is less; 0: only the fraction counts.",
        unit="bytes",
        minimum=0,
        maximum=10**9,
    )
    max_bytes: int = option(
        0, "Reading stops after this much text; 0: all is read.", unit="bytes", minimum=0, maximum=10**15
    )
    shard_bytes: int = option(
        67_108_864, "Text in one Parquet file; a document may not be larger.", unit="bytes", above=0, maximum=2**30
    )
    license: str = option("unknown", "License of the text, for the summary and the model card.")

    @property
    def holds_conversations(self) -> bool:
        """Whether documents are conversations, which must not be split."""
        if self.source == "mixture":
            return all(part.holds_conversations for part in self.parts.values())
        return self.source == "docstrings" or bool(self.response_field or self.messages_field)

    @property
    def parts(self) -> dict[str, "CorpusSettings"]:
        """The settings of each source of a mixture, by name."""
        return {
            name: CorpusSettings(**{"source": "files", **options, "shard_bytes": self.shard_bytes})
            for name, options in self.mixture.items()
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding:
            is_known = bool(codec_of(self.encoding))
            expect(is_known, "corpus.encoding", self.encoding, "an encoding of text that Python knows, as cp1252")
            expect(self.source == "files", "corpus.encoding", self.encoding, "source 'files'")
        if self.source == "files":
            expect(bool(self.paths), "corpus.paths", self.paths, "at least one path, glob or URL for source 'files'")
        for name in ("response_field", "messages_field"):
            if field := getattr(self, name):
                has_records = self.source in ("files", "huggingface")
                expect(has_records, f"corpus.{name}", field, "source 'files' (JSON Lines or Parquet) or 'huggingface'")
        if self.source == "huggingface":
            expect(bool(self.dataset), "corpus.dataset", self.dataset, "a dataset's name for source 'huggingface'")
        expect((self.source == "mixture") == bool(self.mixture), "corpus.mixture", self.mixture, _MIXTURE)
        if self.source == "mixture":
            self._check_mixture()

    def _check_mixture(self) -> None:
        expect(self.split_by == "hash", "corpus.split_by", self.split_by, "'hash' for a mixture")
        own = {field.name for field in dataclasses.fields(self)} - _OF_THE_WHOLE
        for name, options in self.mixture.items():
            where = f"corpus.mixture.{name}"
            expect(
                bool(re.fullmatch(r"\w[\w.-]*", name)), "corpus.mixture", name, "names of letters, digits, _, . and -"
            )
            expect(isinstance(options, dict), where, options, "options of the group corpus, as {paths: [a/*.txt]}")
            for key in options:
                expect(key in own, where, key, f"only options of one source: {', '.join(sorted(own))}")
        for name in self.mixture:
            try:
                expect_types(self.parts[name])
            except PipelineError as error:
                raise PipelineError(f"corpus.mixture.{name}: {error}") from None
        kinds = {name: part.holds_conversations for name, part in self.parts.items()}
        expect(len(set(kinds.values())) == 1, "corpus.mixture", kinds, "sources that all hold conversations, or none")


_MIXTURE = "sources by name for source 'mixture', and none for another"
_OF_THE_WHOLE = {"mixture", "split_by", "validation_fraction", "validation_bytes", "shard_bytes"}


def codec_of(name: str) -> str:
    """Python's name of an encoding of text; empty for one that it does not know or that files do not have."""
    try:
        info = codecs.lookup(name)
        is_text = isinstance(codecs.getincrementaldecoder(name)().decode(b""), str)  # base64 is from bytes to bytes
    except (LookupError, ValueError, TypeError, AttributeError):
        return ""
    return info.name if is_text and info.name not in _OF_PROGRAMS else ""


_OF_PROGRAMS = ("charmap", "idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")
"""Python's codecs for names and source text: they would change plain text."""
