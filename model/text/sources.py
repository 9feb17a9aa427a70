"""Sources of raw documents: the standard library or its docstrings, files through fsspec, a Hugging Face dataset.

`Sources` yields (source, bytes) in a fixed order and holds one document, one line or one small Parquet batch at a time.
`model.text.corpus` cleans and splits. Text is converted to UTF-8 without a byte order mark (`encodings.py`); bytes that
do not decode are passed on as they are. Broken input raises PipelineError with the file and, for line formats, the
line; network failures raise TransientError.
"""

import hashlib
import io
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from model.errors import PipelineError, TransientError, json_type, names_of, not_json
from model.settings import CorpusSettings
from model.text.chat.conversations import conversation, prompt_and_response
from model.text.compression import CODECS, FORMAT_BYTES, BrokenFile, advice_on, decompressed, format_of
from model.text.docstrings import docstrings
from model.text.encodings import Utf8Stream, to_utf8
from model.text.files import File, Listing, list_files, open_file, reading

# Test folders are left out: Linux distributions and slim images ship Python without them, and the corpus should be the
# same there. They also hold the deliberately broken encodings. encodings/ and pydoc_data/ are generated tables, an
# eighth of the bytes, that a small model would learn instead of Python.
STDLIB_SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
PARQUET_BATCH_ROWS = 64
MAX_LINE_BYTES = 2**30
"""Longest line of JSON Lines in bytes, so that a file without line ends is refused before it fills the memory."""
NAMES_KEPT = 5


class Sources:
    """The documents behind `settings`, in the same order at every iteration.

    files: that are read, in order; none for a dataset. stored_bytes: their total size, None for a dataset; read_bytes:
    bytes of them read so far; opened: files or datasets opened so far; skipped: glob matches that are not files.
    converted: number of files or record values in another encoding or with a byte order mark, by encoding;
    converted_sources: the first few.
    Raises PipelineError for a pattern without a match, here, and for a broken file, while iterating.
    """

    def __init__(self, settings: CorpusSettings, files: Sequence[File] | None = None) -> None:
        """files: some of `files`, to read only these."""
        self._settings = settings
        listing = Listing(list(files or []))
        if files is None and settings.source in ("stdlib", "docstrings"):
            listing.files = _stdlib_files()
        elif files is None and settings.source == "files":
            listing = list_files(settings.paths)
        self.files, self.skipped = listing.files, listing.skipped
        self.stored_bytes = sum(file.size for file in self.files) if self.files else None
        self._start()

    def _start(self) -> None:
        self.read_bytes = self.opened = 0
        self.converted: Counter[str] = Counter()
        self.converted_sources: list[str] = []
        self._place, self._base = "byte", 0
        self._stream: Utf8Stream | None = None

    def place_of(self, offset: int) -> str:
        """Position in the source of byte `offset` of the last document: "byte 17", "line 3, byte 17"."""
        if self._stream is not None and self._stream.first_invalid is not None:
            return f"byte {self._stream.first_invalid:,}"
        return f"{self._place} {self._base + offset:,}"

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        self._start()
        if self._settings.source == "huggingface":
            self.opened = 1
            yield from self._read_dataset()
            return
        finished = 0
        for file in self.files:
            self.opened += 1
            is_read = False
            self._place, self._base = "byte", 0
            with reading(file.source, file.fs), open_file(file) as stored:
                for data in self._read_file(file, stored):
                    is_read = True
                    self.read_bytes = finished + min(stored.tell(), file.size)
                    yield file.source, data
                if not is_read and self._settings.source != "docstrings":
                    yield file.source, b""  # counted as empty: nothing is left out unseen
            finished += file.size
            self.read_bytes = finished

    def _read_file(self, file: File, stored: BinaryIO) -> Iterator[bytes]:
        name = PurePosixPath(file.path.lower())
        codec = CODECS.get(name.suffix)
        kind = PurePosixPath(name.stem).suffix if codec else name.suffix
        self._stream = None
        if kind == ".parquet":
            if codec:
                raise PipelineError(f"{file.source}: compressed Parquet is not read; store it uncompressed")
            yield from self._read_parquet(file, stored)
            return
        needing = [name for name in ("response_field", "messages_field") if getattr(self._settings, name)]
        if needing and kind not in JSON_SUFFIXES:
            raise PipelineError(
                f"{file.source} is plain text: corpus.{needing[0]} needs records; expected .jsonl or .parquet"
            )
        place = [0]  # lines read so far, for the message
        try:
            stored = content_of(file.source, stored, codec)
            if self._settings.source == "docstrings":
                yield from _read_docstrings(file, stored)
                return
            text = self._stream = Utf8Stream(stored, self._settings.encoding)
            self._count(file.source, text.found, text.marked)
            stream = io.BufferedReader(text, 1 << 20)
            yield from self._read_lines(file, stream, place) if kind in JSON_SUFFIXES else self._read_text(file, stream)
        except BrokenFile as error:
            line = f", line {place[0] + 1}" if kind in JSON_SUFFIXES else ""
            raise PipelineError(
                f"{file.source}{line}: broken {codec} file ({error}); fetch or write it again"
            ) from error

    def _count(self, source: str, codec: str, marked: bool) -> None:
        if codec == "utf-8" and not marked:
            return
        self.converted["UTF-8 with a mark" if codec == "utf-8" else codec.upper()] += 1
        if len(self.converted_sources) < NAMES_KEPT and source not in self.converted_sources:
            self.converted_sources.append(source)

    def _value(self, source: str, data: bytes, encoding: str = "") -> bytes:
        """The value of a record as UTF-8 without a byte order mark."""
        data, codec, marked = to_utf8(data, encoding)
        self._count(source, codec, marked)
        return data

    def _read_text(self, file: File, stream: BinaryIO) -> Iterator[bytes]:
        """The whole file, or chunks of about document_bytes, split at line ends."""
        limit, wanted = self._settings.shard_bytes, self._settings.document_bytes
        if wanted == 0:
            data = stream.read(limit + 1)
            if len(data) > limit:
                raise PipelineError(
                    f"{file.source} is one document of more than corpus.shard_bytes ({limit:,}): set "
                    "corpus.document_bytes to split it at line ends"
                )
            self._place, self._base = "byte", 0
            yield data
            return
        rest, start = b"", 0
        while piece := rest + stream.read(max(wanted - len(rest), 1)):
            # A line longer than document_bytes is cut at a character boundary.
            piece += stream.readline(wanted)
            cut = len(piece) if piece.endswith(b"\n") else whole_characters(piece, len(piece)) or len(piece)
            piece, rest = piece[:cut], piece[cut:]
            self._place, self._base = "byte", start
            yield piece
            start += cut

    def _read_lines(self, file: File, stream: BinaryIO, place: list[int]) -> Iterator[bytes]:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
            place[0] = number
            where = f"{file.source}, line {number}"
            if len(line) == MAX_LINE_BYTES:
                raise PipelineError(f"{where} has {MAX_LINE_BYTES:,} bytes or more; expected one object a line")
            if line.isspace():
                continue
            self._place, self._base = f"line {number}, byte", 0
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield line  # counted as invalid UTF-8 by the caller
                continue
            except (ValueError, RecursionError) as error:
                raise PipelineError(
                    f"{where} is not JSON ({not_json(error)}); expected one object a line, correct or remove it"
                ) from error
            if not isinstance(row, dict):
                raise PipelineError(f"{where} is a JSON {json_type(row)}; expected one object a line")
            yield self._document(file.source, row, where)

    def _document(self, source: str, row: dict[str, Any], where: str) -> bytes:
        """The document of one record."""
        if self._settings.holds_conversations:
            return conversation(row, self._settings, where)
        field = self._settings.text_field
        if field not in row:
            raise _unknown_field(where, field, row)
        return self._value(source, _encode(row[field], where, field))

    def _read_parquet(self, file: File, stored: BinaryIO) -> Iterator[bytes]:
        field, response = self._settings.text_field, self._settings.response_field
        try:
            with pq.ParquetFile(stored, buffer_size=1 << 20) as table:
                schema = table.schema_arrow
                if self._settings.messages_field in schema.names:
                    yield from self._read_messages(file, table)
                    return
                if self._settings.messages_field and not response:
                    raise _unknown_field(
                        file.source, self._settings.messages_field, schema.names, "corpus.messages_field"
                    )
                _check_column(file.source, schema, field, "corpus.text_field")
                if response:
                    _check_column(file.source, schema, response, "corpus.response_field")
                row = 0
                for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[field, *([response] if response else [])]):
                    texts = _bytes_of(batch.column(field))
                    answers = _bytes_of(batch.column(response)) if response else texts
                    for data, answer in zip(texts, answers, strict=True):
                        row += 1
                        self._place, self._base = f"row {row:,}, byte", 0
                        text = (
                            None if data is None else self._value(file.source, data, self._encoding_of(schema, field))
                        )
                        if not response:
                            yield text or b""
                            continue
                        if answer is not None:
                            answer = self._value(file.source, answer, self._encoding_of(schema, response))
                        yield _joined(text, answer, f"{file.source}, row {row}")
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise PipelineError(
                f"{file.source}: broken Parquet file ({_line(error)}); fetch or write it again"
            ) from error

    def _read_messages(self, file: File, table: pq.ParquetFile) -> Iterator[bytes]:
        """The conversations in a table that has a column of messages."""
        row = 0
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[self._settings.messages_field]):
            for record in batch.to_pylist():
                row += 1
                self._place, self._base = f"row {row:,}, byte", 0
                yield self._document(file.source, record, f"{file.source}, row {row}")

    def _encoding_of(self, schema: pa.Schema, name: str) -> str:
        """Text columns are UTF-8 by their type; binary columns have the encoding of the settings."""
        return self._settings.encoding if _holds_bytes(_value_type(schema.field(name).type)) else ""

    def _read_dataset(self) -> Iterator[tuple[str, bytes]]:
        import datasets  # seconds to import, and only this source needs it

        name, split, field = self._settings.dataset, self._settings.dataset_split, self._settings.text_field
        source = f"{name}:{split}"
        try:
            if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
                rows: Any = datasets.load_from_disk(name)
                rows = rows[split] if isinstance(rows, dict) else rows
            else:
                rows = datasets.load_dataset(name, self._settings.dataset_config, split=split, streaming=True)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            config = self._settings.dataset_config
            kind = TransientError if isinstance(error, ConnectionError | TimeoutError) else PipelineError
            raise kind(
                f"corpus.dataset {name!r} (config {config!r}, split {split!r}) cannot be opened: {_line(error)}; "
                "expected a local dataset folder or a dataset's name on a reachable hub"
            ) from error
        if rows.column_names is not None and not self._settings.holds_conversations:
            if field not in rows.column_names:
                raise _unknown_field(source, field, rows.column_names)
            rows = rows.select_columns([field])
        try:
            for number, row in enumerate(rows):
                if field not in row and not self._settings.holds_conversations:
                    raise _unknown_field(source, field, row)
                self._place, self._base = f"row {number:,}, byte", 0
                yield source, self._document(source, row, f"{source}, row {number}")
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise PipelineError(f"{source}: broken data ({_line(error)}); fetch or write the dataset again") from error
        except OSError as error:
            raise TransientError(f"{source} cannot be read: {_line(error)}; run again when the hub answers") from error


def fingerprint(settings: CorpusSettings) -> str:
    """Hash of the names, sizes and times of change of the files behind `settings`, 64 hex digits.

    Remote files count by the key of their file system (an ETag, a checksum), a Hugging Face dataset by its settings
    alone. Raises PipelineError for a pattern without a match.
    """
    total = hashlib.sha256()
    for part in settings.parts.values():
        total.update(fingerprint(part).encode())
    for file in Sources(settings).files:
        total.update(identity(file))
    return total.hexdigest()


def identity(file: File) -> bytes:
    """The name, size and time of change of a file; of a remote one, the key of its file system."""
    if isinstance(file.fs, LocalFileSystem):
        changed: object = Path(file.path).stat().st_mtime_ns
    else:
        changed = file.fs.ukey(file.path)
    return f"{file.source}\0{file.size}\0{changed}\n".encode(errors="surrogateescape")


def whole_characters(data: bytes, length: int) -> int:
    """The largest number of bytes, at most `length`, after which UTF-8 `data` splits between characters."""
    while 0 < length < len(data) and data[length] & 0xC0 == 0x80:
        length -= 1
    if length < len(data):
        return length
    for back in range(1, min(4, length) + 1):  # at the end of the data: is the last character complete?
        lead = data[length - back]
        if lead & 0xC0 != 0x80:
            size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return length if size <= back else length - back
    return length


def content_of(source: str, stored: BinaryIO, codec: str | None) -> BinaryIO:
    """The content of a file, decompressed if it has a codec. Raises PipelineError for a format that is not text."""
    content: io.BufferedReader[Any] = io.BufferedReader(cast(io.RawIOBase, stored))
    found = format_of(content.peek(FORMAT_BYTES))
    if found not in ("", codec):
        expected = f"{codec} by its name" if codec else "text"
        raise PipelineError(f"{source} holds {found} data: expected {expected}; {advice_on(found)}")
    if codec:
        content = decompressed(content, codec)
        if inner := format_of(content.peek(FORMAT_BYTES)):
            raise PipelineError(f"{source} holds {inner} data inside {codec}: expected text; {advice_on()}")
    return content


def _stdlib_files() -> list[File]:
    root = Path(sysconfig.get_path("stdlib"))
    fs = LocalFileSystem()
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        # _sysconfigdata is written when Python is built and holds that machine's paths.
        if not STDLIB_SKIPPED.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            files.append(File(relative.as_posix(), fs, str(path), path.stat().st_size))
    if not files:
        raise PipelineError(f"no .py file in the standard library at {root}; set corpus.source to 'files'")
    return files


def _encode(value: object, where: str, field: str) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str):
        raise PipelineError(
            f"{where}: field {field!r} holds a {json_type(value)}; expected text, set corpus.text_field or correct it"
        )
    return value.encode("utf-8", "surrogatepass")  # a lone surrogate stays invalid, for the caller to count


def _read_docstrings(file: File, stream: BinaryIO) -> Iterator[bytes]:
    for prompt, response in docstrings(stream.read()):
        yield prompt_and_response(prompt, response, file.source)


def _joined(prompt: bytes | None, response: bytes | None, where: str) -> bytes:
    """A conversation; bytes that are not UTF-8 are kept, for the caller to count."""
    asked, answered = (data and data.decode("utf-8", "surrogateescape") for data in (prompt, response))
    return prompt_and_response(asked, answered, where)


def _check_column(source: str, schema: pa.Schema, name: str, setting: str) -> None:
    if name not in schema.names:
        raise _unknown_field(source, name, schema.names, setting)
    if (times := schema.names.count(name)) > 1:
        raise PipelineError(
            f"{source} has the column {name!r} {times} times; expected it once, rename the others or set {setting}"
        )
    kind = schema.field(name).type
    if not _is_text(_value_type(kind)):
        raise PipelineError(f"{source}: field {name!r} holds {kind}; expected text, set {setting}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _bytes_of(column: pa.Array) -> Sequence[bytes | None]:
    """Values as bytes: the caller checks the encoding, Arrow does not."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or _holds_bytes(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _unknown_field(where: str, field: str, found: Any, setting: str = "corpus.text_field") -> PipelineError:
    return PipelineError(f"{where} has no field {field!r}; found: {names_of(found)}; set {setting} to one of them")


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
