"""Where raw documents come from: the standard library or its docstrings, files behind fsspec, a Hugging Face data set.

`Sources` yields (source, bytes) in a fixed order and holds one document, one line or one small Parquet batch at a time.
It neither cleans nor splits: that is `model.text.corpus`. Broken input raises PipelineError naming the file and, where
there are lines, the line.
"""

import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from model.errors import PipelineError
from model.settings import CorpusSettings
from model.text.chat import opening
from model.text.docstrings import docstrings

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
CODECS = {".gz": "gzip", ".zst": "zstd"}
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
PARQUET_BATCH_ROWS = 64


@dataclass(frozen=True)
class _File:
    source: str
    fs: Any
    path: str
    size: int


class Sources:
    """The documents behind `settings`, in the same order at every iteration.

    stored_bytes: what the files take where they lie, None for a data set; read_bytes: how much of it has been read;
    opened: files or data sets opened so far.
    Raises PipelineError where a pattern matches nothing, here, and where a file is broken, while iterating.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self._settings = settings
        self._files: list[_File] = []
        if settings.source in ("stdlib", "docstrings"):
            self._files = _stdlib_files()
        elif settings.source == "files":
            matched = [file for pattern in settings.paths for file in _match(pattern)]
            self._files = list({file.source: file for file in matched}.values())
        self.stored_bytes = sum(file.size for file in self._files) if self._files else None
        self.read_bytes = self.opened = 0

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        self.read_bytes = self.opened = 0
        if self._settings.source == "huggingface":
            self.opened = 1
            yield from self._read_data_set()
            return
        finished = 0
        for file in self._files:
            self.opened += 1
            with _open(file) as stored:
                for data in self._read_file(file, stored):
                    self.read_bytes = finished + min(stored.tell(), file.size)
                    yield file.source, data
            finished += file.size
            self.read_bytes = finished

    def _read_file(self, file: _File, stored: BinaryIO) -> Iterator[bytes]:
        name = PurePosixPath(file.path.lower())
        codec = CODECS.get(name.suffix)
        kind = PurePosixPath(name.stem).suffix if codec else name.suffix
        if kind == ".parquet":
            if codec:
                raise PipelineError(
                    f"{file.source}: compressed Parquet is not read; store it plain, it compresses itself"
                )
            yield from self._read_parquet(file, stored)
            return
        stream = stored
        if codec:
            # Arrow's stream, as it reports a cut-off file where zstandard's own ends without a word.
            arrow = pa.CompressedInputStream(pa.PythonFile(stored, "r"), codec)
            stream = cast(BinaryIO, io.BufferedReader(arrow, 1 << 20))
        place = [0]  # lines read so far, for the message
        try:
            if self._settings.source == "docstrings":
                yield from _read_docstrings(file, stream)
            else:
                read = self._read_lines(file, stream, place) if kind in JSON_SUFFIXES else self._read_text(file, stream)
                yield from read
        except OSError as error:
            if not codec or error.errno is not None:
                raise
            line = f", line {place[0] + 1}" if kind in JSON_SUFFIXES else ""
            raise PipelineError(
                f"{file.source}{line}: broken {codec} file ({error}); fetch or write it again"
            ) from error

    def _read_text(self, file: _File, stream: BinaryIO) -> Iterator[bytes]:
        """The whole file, or pieces of about document_bytes that end at a line end."""
        limit, wanted = self._settings.shard_bytes, self._settings.document_bytes
        if wanted == 0:
            data = stream.read(limit + 1)
            if len(data) > limit:
                raise PipelineError(
                    f"{file.source} is one document of more than corpus.shard_bytes ({limit:,}): set "
                    "corpus.document_bytes to split it at line ends"
                )
            yield data
            return
        rest = b""
        while piece := rest + stream.read(max(wanted - len(rest), 1)):
            # A line without end is cut, at a character, after twice the size asked for.
            piece += stream.readline(wanted)
            cut = len(piece) if piece.endswith(b"\n") else whole_characters(piece, len(piece)) or len(piece)
            piece, rest = piece[:cut], piece[cut:]
            yield piece

    def _read_lines(self, file: _File, stream: BinaryIO, place: list[int]) -> Iterator[bytes]:
        field = self._settings.text_field
        for number, line in enumerate(stream, 1):
            place[0] = number
            if line.isspace():
                continue
            where = f"{file.source}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield line  # counted as invalid UTF-8 by the caller
                continue
            except ValueError as error:
                raise PipelineError(
                    f"{where} is not JSON ({error}); expected one object a line, correct or remove it"
                ) from error
            if not isinstance(row, dict):
                raise PipelineError(f"{where} is a JSON {type(row).__name__}; expected one object a line")
            if field not in row:
                raise _unknown_field(where, field, row)
            if response := self._settings.response_field:
                if response not in row:
                    raise _unknown_field(where, response, row, "corpus.response_field")
                yield _conversation(row[field], row[response], where)
            else:
                yield _encode(row[field], where, field)

    def _read_parquet(self, file: _File, stored: BinaryIO) -> Iterator[bytes]:
        field = self._settings.text_field
        try:
            with pq.ParquetFile(stored, buffer_size=1 << 20) as table:
                schema = table.schema_arrow
                if field not in schema.names:
                    raise _unknown_field(file.source, field, schema.names)
                kind = schema.field(field).type
                if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
                    raise PipelineError(
                        f"{file.source}: field {field!r} holds {kind}; expected text, set corpus.text_field"
                    )
                for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[field]):
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    # As bytes: Arrow does not check the encoding, the caller does.
                    for data in column.cast(pa.large_binary()).to_pylist():
                        yield data or b""
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise PipelineError(
                f"{file.source}: broken Parquet file ({_line(error)}); fetch or write it again"
            ) from error

    def _read_data_set(self) -> Iterator[tuple[str, bytes]]:
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
            raise PipelineError(
                f"corpus.dataset {name!r} (config {config!r}, split {split!r}) cannot be opened: {_line(error)}; "
                "expected a local data set folder or a data set's name on a reachable hub"
            ) from error
        if rows.column_names is not None:
            if field not in rows.column_names:
                raise _unknown_field(source, field, rows.column_names)
            rows = rows.select_columns([field])
        try:
            for number, row in enumerate(rows):
                if field not in row:
                    raise _unknown_field(source, field, row)
                yield source, _encode(row[field], f"{source}, row {number}", field)
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            raise PipelineError(f"{source}: broken data ({_line(error)}); fetch or write the data set again") from error


def fingerprint(settings: CorpusSettings) -> str:
    """Hash of the names, sizes and times of change of the files behind `settings`, 64 hex digits.

    Of files elsewhere it takes what their file system tells (an ETag, a checksum). A Hugging Face dataset has no files
    here: the settings alone decide it. Raises PipelineError where a pattern matches nothing.
    """
    total = hashlib.sha256()
    for file in Sources(settings)._files:
        if isinstance(file.fs, LocalFileSystem):
            changed: object = Path(file.path).stat().st_mtime_ns
        else:
            changed = file.fs.ukey(file.path)
        total.update(f"{file.source}\0{file.size}\0{changed}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def whole_characters(data: bytes, length: int) -> int:
    """The largest number of bytes, at most `length`, after which UTF-8 `data` splits between characters."""
    while 0 < length < len(data) and data[length] & 0xC0 == 0x80:
        length -= 1
    if length < len(data):
        return length
    for back in range(1, min(4, length) + 1):  # the end of the data: is its last character all there?
        lead = data[length - back]
        if lead & 0xC0 != 0x80:
            size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return length if size <= back else length - back
    return length


def _stdlib_files() -> list[_File]:
    root = Path(sysconfig.get_path("stdlib"))
    fs = LocalFileSystem()
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        # _sysconfigdata is written when Python is built and holds that machine's paths.
        if not STDLIB_SKIPPED.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            files.append(_File(relative.as_posix(), fs, str(path), path.stat().st_size))
    if not files:
        raise PipelineError(f"no .py file in the standard library at {root}; set corpus.source to 'files'")
    return files


def _match(pattern: str) -> list[_File]:
    """The files that a path, glob or fsspec URL names, sorted by path."""
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        found = {path: fs.info(path)} if fs.isfile(path) else fs.glob(path, detail=True)
    except (ImportError, ValueError, FileNotFoundError, PermissionError) as error:
        raise PipelineError(f"corpus.paths {pattern!r} cannot be listed: {_line(error)}") from error
    local = isinstance(fs, LocalFileSystem)
    relative = local and "://" not in pattern and not Path(pattern).expanduser().is_absolute()
    files = []
    for name in sorted(found):
        info = found[name]
        if info["type"] == "file" or (info.get("islink") and fs.isfile(name)):
            source = os.path.relpath(name) if relative else name if local else fs.unstrip_protocol(name)
            files.append(_File(source, fs, name, info["size"] or 0))
    if not files:
        where = f" (working folder {Path.cwd()})" if relative else ""
        raise PipelineError(
            f"corpus.paths {pattern!r} matches no file{where}; for all files of a folder write FOLDER/**/*"
        )
    return files


def _open(file: _File) -> BinaryIO:
    try:
        return cast(BinaryIO, file.fs.open(file.path, "rb"))
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise PipelineError(f"{file.source} cannot be read: {error.strerror or error}") from error


def _encode(value: object, where: str, field: str) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str):
        raise PipelineError(
            f"{where}: field {field!r} holds {type(value).__name__}; expected text, set corpus.text_field or correct it"
        )
    return value.encode("utf-8", "surrogatepass")  # a lone surrogate stays invalid, for the caller to count


def _conversation(prompt: object, response: object, where: str) -> bytes:
    if not isinstance(prompt, str) or not isinstance(response, str) or not response:
        raise PipelineError(f"{where}: expected text as prompt and as response, the response not empty; correct it")
    try:
        return (opening(prompt) + response).encode("utf-8", "surrogatepass")
    except ValueError as error:
        raise PipelineError(f"{where}: {error}; change the prompt") from error


def _read_docstrings(file: _File, stream: BinaryIO) -> Iterator[bytes]:
    for prompt, response in docstrings(stream.read()):
        yield _conversation(prompt, response, file.source)


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        check(kind)
        for check in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
        )
    )


def _unknown_field(where: str, field: str, found: Any, setting: str = "corpus.text_field") -> PipelineError:
    names = ", ".join(sorted(map(str, found))) or "none"
    return PipelineError(f"{where} has no field {field!r}; found: {names}; set {setting} to one of them")


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
