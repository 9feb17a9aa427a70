"""Builds a corpus in tasks that run on any host; the files equal those that `corpus.py` writes in one process.

Read: a task reads and checks the documents of some source files, in order; they are a part. Deduplicate: a task
compares the digests with one prefix, of all parts. This process then decides each document's split and shard. Write: a
task writes one shard. Only digests and sizes come together in one place: about 40 bytes of memory per document.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from model.progress import Log, Progress, silent
from model.settings import CorpusSettings
from model.system.tasks import Apply, completed
from model.text.corpus import (
    SAMPLE_CHARACTERS,
    CorpusSummary,
    LowestHashes,
    Parts,
    Written,
    add_counts,
    end_of_train,
    enlarged_split,
    first_of_train,
    new_summary,
    usable_documents,
)
from model.text.files import File
from model.text.shard_writer import ROW_GROUP_BYTES, ROW_GROUP_DOCUMENTS, Counts, ShardWriter, digest
from model.text.sources import NAMES_KEPT, Sources, identity, whole_characters

PART_BYTES = 32 << 20
PREFIX_DOCUMENTS = 1 << 22
"""Documents whose digests one task compares, on average."""
DOCUMENTS, DIGESTS, SIZES, COUNTS = "documents.parquet", "digests.npy", "sizes.npy", "counts.json"
"""The files of a part."""
_SCHEMA = pa.schema([("source", pa.string()), ("text", pa.binary())])
_HIGH, _LOW, _ROW = range(3)
"""Columns of DIGESTS, uint64: both halves of the digest and the document's row, by which they are sorted."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReadTask:
    """Source files to read into the part `folder`, in order; None: a dataset as a whole."""

    settings: CorpusSettings
    files: tuple[File, ...] | None
    folder: Path

    def __str__(self) -> str:
        return f"{self.files[0].source} to {self.files[-1].source}" if self.files else self.settings.dataset


@dataclass(frozen=True)
class PrefixTask:
    """Digests to compare: those whose first half is from `first` to `last`. starts: number of each part's first row."""

    folders: tuple[Path, ...]
    starts: tuple[int, ...]
    first: int
    last: int

    def __str__(self) -> str:
        return f"the digests from {self.first:016x} to {self.last:016x}"


@dataclass(frozen=True)
class WriteTask:
    """One shard to write into `folder`. rows: documents of each part.

    start, end: of the text of the first and the last document, if only a piece of it is in this split.
    """

    folder: Path
    split: str
    rows: tuple[tuple[Path, Numbers], ...]
    start: int | None
    end: int | None

    def __str__(self) -> str:
        return f"a {self.split} shard, documents of {self.rows[0][0].name} to {self.rows[-1][0].name}"


@dataclass
class _Split:
    """Documents of one split, by number, and their bytes. start, end: as in `WriteTask`."""

    numbers: Numbers
    sizes: Numbers
    start: int | None = None
    end: int | None = None

    @property
    def counts(self) -> Counts:
        return Counts(len(self.sizes), int(self.sizes.sum()), int(self.sizes.max(initial=0)))


def in_tasks(apply: Apply, scratch_dir: Path, part_bytes: int = PART_BYTES) -> Callable[..., Written]:
    """The argument `write` of `build_corpus`: the same shards, by tasks that `apply` runs.

    scratch_dir: of the parts, which another attempt finds there; all hosts read and write it. part_bytes: stored bytes
    of the source files that one task reads; a larger file has a task of its own.
    """
    return partial(_write, apply, scratch_dir.absolute(), part_bytes)


def _write(
    apply: Apply,
    scratch_dir: Path,
    part_bytes: int,
    settings: CorpusSettings,
    parts: Parts,
    output_dir: Path,
    log: Log,
) -> Written:
    summary = new_summary(settings)
    names: list[str] = []
    reading: list[ReadTask] = []
    for name, (part, sources) in parts.items():
        tasks = list(_read_tasks(part, sources, scratch_dir / "parts", part_bytes))
        names += [name] * len(tasks)
        reading += tasks
    (scratch_dir / "parts").mkdir(parents=True, exist_ok=True)
    progress, lengths = Progress(log, "corpus, reading", len(reading), "parts"), []
    for name, found in zip(names, apply(read, reading), strict=True):
        progress.advance()
        lengths.append(found["documents"])
        add_counts(summary, CorpusSummary(**found["summary"]))
        sources = parts[name][1]
        sources.converted.update(found["converted"])
        new = [one for one in found["converted_sources"] if one not in sources.converted_sources]
        sources.converted_sources = [*sources.converted_sources, *new][:NAMES_KEPT]
    documents = _Documents([task.folder for task in reading], lengths)
    summary.duplicates = documents.deduplicate(apply)
    splits, written = _divide(settings, documents, summary, log)
    summary.sample = _first_text(documents, splits["train"])[:SAMPLE_CHARACTERS]
    for name in settings.parts:
        first = names.index(name)
        bounds = [documents.starts[first], documents.starts[first + names.count(name)]]
        summary.mixture[name] = {}
        for split, chosen in splits.items():
            low, high = np.searchsorted(chosen.numbers, bounds)
            summary.mixture[name] |= {
                f"{split}_documents": int(high - low),
                f"{split}_bytes": int(chosen.sizes[low:high].sum()),
            }
    for split, chosen in splits.items():
        writing = list(_write_tasks(split, chosen, documents, settings.shard_bytes, scratch_dir / "parts"))
        progress = Progress(log, f"corpus, writing {split}", len(writing), "shards")
        for number, shard in enumerate(apply(write, writing)):
            progress.advance()
            shard.rename(output_dir / f"{split}-{number:05}.parquet")
    shutil.rmtree(scratch_dir / "parts")
    return written


def _read_tasks(settings: CorpusSettings, sources: Sources, folder: Path, part_bytes: int) -> Iterator[ReadTask]:
    groups: list[tuple[File, ...] | None] = list(_groups(sources.files, part_bytes)) if sources.files else [None]
    for files in groups:
        content = hashlib.sha256(repr(settings).encode() + b"".join(identity(file) for file in files or ()))
        yield ReadTask(settings, files, folder / content.hexdigest()[:24])


def _groups(files: Sequence[File], part_bytes: int) -> Iterator[tuple[File, ...]]:
    group: list[File] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.size or part_bytes  # the size of a remote file may be unknown
        if size >= part_bytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def read(task: ReadTask) -> dict[str, Any]:
    """Read a part, unless it is there; returns what was counted: documents, summary and converted encodings.

    Raises what reading raises, with the name of the file.
    """
    if not task.folder.is_dir():
        with completed(task.folder) as staged:
            _read_into(staged, task)
    counts: dict[str, Any] = json.loads((task.folder / COUNTS).read_text())
    return counts


def _read_into(folder: Path, task: ReadTask) -> None:
    sources, summary = Sources(task.settings, task.files), new_summary(task.settings)
    digests: list[bytes] = []
    sizes: list[int] = []
    rows: list[tuple[str, bytes]] = []
    row_bytes = 0

    def flush(table: pq.ParquetWriter) -> None:
        names, texts = zip(*rows, strict=True)
        table.write_table(
            pa.Table.from_arrays([pa.array(names, pa.string()), pa.array(texts, pa.binary())], _SCHEMA.names)
        )

    with pq.ParquetWriter(folder / DOCUMENTS, _SCHEMA, compression="zstd", use_dictionary=["source"]) as table:
        for source, data in usable_documents(task.settings, sources, summary, Progress(silent, "", None, "")):
            digests.append(digest(data))
            sizes.append(len(data))
            rows.append((source, data))
            row_bytes += len(data)
            if row_bytes >= ROW_GROUP_BYTES or len(rows) >= ROW_GROUP_DOCUMENTS:
                flush(table)
                rows, row_bytes = [], 0
        if rows:
            flush(table)
    halves = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)
    found = np.column_stack([halves, np.arange(len(sizes), dtype=np.uint64)])
    np.save(folder / DIGESTS, found[_order(found)])
    np.save(folder / SIZES, np.array(sizes, np.int64))
    counts = {"documents": len(sizes), "summary": asdict(summary), "converted": sources.converted}
    (folder / COUNTS).write_text(json.dumps(counts | {"converted_sources": sources.converted_sources}))


def _order(digests: npt.NDArray[np.uint64]) -> Numbers:
    """The order of rows of DIGESTS: by digest, and of equal ones by row."""
    return np.lexsort((digests[:, _ROW], digests[:, _LOW], digests[:, _HIGH]))


def find_repeated(task: PrefixTask) -> Numbers:
    """The numbers of the documents that repeat an earlier one."""
    found = []
    for folder, start in zip(task.folders, task.starts, strict=True):
        digests = np.load(folder / DIGESTS, mmap_mode="r")
        low = np.searchsorted(digests[:, _HIGH], np.uint64(task.first), side="left")
        high = np.searchsorted(digests[:, _HIGH], np.uint64(task.last), side="right")
        chosen = np.array(digests[low:high])
        chosen[:, _ROW] += np.uint64(start)
        found.append(chosen)
    digests = np.concatenate(found)
    digests = digests[_order(digests)]
    is_equal = (digests[1:, :_ROW] == digests[:-1, :_ROW]).all(axis=1)
    return digests[1:, _ROW][is_equal].astype(np.int64)


class _Documents:
    """The documents of all parts, numbered in order. starts: number of each part's first, and the end."""

    def __init__(self, folders: Sequence[Path], lengths: Sequence[int]) -> None:
        self.folders = folders
        self.starts: list[int] = np.cumsum([0, *lengths]).tolist()
        self.sizes: Numbers = np.concatenate([np.load(folder / SIZES) for folder in folders])
        self.is_kept = np.ones(len(self.sizes), bool)

    def deduplicate(self, apply: Apply) -> int:
        """Keep the first of equal documents; returns how many are dropped."""
        prefixes = 1 + len(self.sizes) // PREFIX_DOCUMENTS
        bounds = [number * 2**64 // prefixes for number in range(prefixes + 1)]
        folders, starts = tuple(self.folders), tuple(self.starts[:-1])
        for repeated in apply(find_repeated, [PrefixTask(folders, starts, a, b - 1) for a, b in pairwise(bounds)]):
            self.is_kept[repeated] = False
        return int((~self.is_kept).sum())

    def below(self, bound: int) -> npt.NDArray[np.bool_]:
        """Which documents have a digest below this one."""
        high, low = (np.uint64(half) for half in divmod(bound, 2**64))
        found = np.zeros(len(self.sizes), bool)
        for folder, start in zip(self.folders, self.starts, strict=False):
            digests = np.load(folder / DIGESTS, mmap_mode="r")
            is_below = (digests[:, _HIGH] < high) | ((digests[:, _HIGH] == high) & (digests[:, _LOW] < low))
            found[digests[:, _ROW][is_below].astype(np.int64) + start] = True
        return found

    def lowest(self, least_bytes: int) -> LowestHashes:
        """The kept documents with the smallest digests."""
        lowest = LowestHashes(least_bytes)
        for folder, start in zip(self.folders, self.starts, strict=False):
            digests = np.load(folder / DIGESTS, mmap_mode="r")
            numbers = digests[:, _ROW].astype(np.int64) + start
            digests, sizes = digests[self.is_kept[numbers]], self.sizes[numbers[self.is_kept[numbers]]]
            enough = int(np.searchsorted(np.cumsum(sizes), least_bytes)) + 1
            for (high, low, _), size in zip(digests[:enough].tolist(), sizes.tolist(), strict=False):
                lowest.add((high << 64) | low, size)
        return lowest

    def rows(self, numbers: Numbers) -> tuple[tuple[Path, Numbers], ...]:
        """The parts and rows of documents, in order."""
        bounds = np.searchsorted(numbers, self.starts)
        return tuple(
            (folder, numbers[low:high] - start)
            for folder, start, (low, high) in zip(self.folders, self.starts, pairwise(bounds), strict=False)
            if low < high
        )

    def of(self, is_chosen: npt.NDArray[np.bool_]) -> _Split:
        """The kept documents that are chosen."""
        numbers = np.flatnonzero(is_chosen & self.is_kept)
        return _Split(numbers, self.sizes[numbers])


def _divide(
    settings: CorpusSettings, documents: _Documents, summary: CorpusSummary, log: Log
) -> tuple[dict[str, _Split], Written]:
    """The splits, as `corpus.py` divides the same documents."""

    def divided(held_out: npt.NDArray[np.bool_]) -> tuple[dict[str, _Split], Written]:
        train, validation = documents.of(~held_out), documents.of(held_out)
        lowest = documents.lowest(settings.validation_bytes if settings.split_by == "hash" else 0)
        return {"train": train, "validation": validation}, Written(summary, train.counts, validation.counts, lowest)

    if settings.split_by == "position":
        return _divide_by_position(settings, documents, summary)
    splits, written = divided(documents.below(first_of_train(settings)))
    if enlarged := enlarged_split(settings, written, log):
        splits, written = divided(documents.below(enlarged))
    return splits, written


def _divide_by_position(
    settings: CorpusSettings, documents: _Documents, summary: CorpusSummary
) -> tuple[dict[str, _Split], Written]:
    ends = np.cumsum(np.where(documents.is_kept, documents.sizes, 0))
    starts = ends - np.where(documents.is_kept, documents.sizes, 0)
    train_end = end_of_train(settings, int(ends[-1]) if len(ends) else 0)
    train, validation = documents.of(starts < train_end), documents.of(starts >= train_end)
    if len(train.numbers) and not settings.holds_conversations:
        last = train.numbers[-1]
        _, text = next(_texts(*documents.rows(train.numbers[-1:])[0]))
        cut = whole_characters(text, min(train_end - int(starts[last]), len(text)))
        if cut < len(text):
            validation = _Split(
                np.concatenate([[last], validation.numbers]),
                np.concatenate([[len(text) - cut], validation.sizes]),
                start=cut,
            )
            train = _Split(train.numbers, np.concatenate([train.sizes[:-1], [cut]]), end=cut)
            if not cut:
                train, validation.start = _Split(train.numbers[:-1], train.sizes[:-1]), None
    splits = {"train": train, "validation": validation}
    return splits, Written(summary, train.counts, validation.counts, LowestHashes(0))


def _first_text(documents: _Documents, split: _Split) -> str:
    """The text of the first document; empty if there is none."""
    if not len(split.numbers):
        return ""
    _, text = next(_texts(*documents.rows(split.numbers[:1])[0]))
    return (text[: split.end] if len(split.numbers) == 1 else text).decode()


def _write_tasks(
    split: str, chosen: _Split, documents: _Documents, shard_bytes: int, folder: Path
) -> Iterator[WriteTask]:
    ends, first = np.cumsum(chosen.sizes), 0
    while first < len(ends):
        most = (int(ends[first - 1]) if first else 0) + shard_bytes
        beyond = max(first + 1, int(np.searchsorted(ends, most, side="right")))
        rows = documents.rows(chosen.numbers[first:beyond])
        start, end = chosen.start if not first else None, chosen.end if beyond == len(ends) else None
        content = hashlib.sha256(repr((split, start, end)).encode())
        for part, numbers in rows:
            content.update(part.name.encode() + numbers.tobytes())
        yield WriteTask(folder / f"{split}-{content.hexdigest()[:16]}", split, rows, start, end)
        first = beyond


def write(task: WriteTask) -> Path:
    """Write a shard, unless it is there; returns its path."""
    if not task.folder.is_dir():
        with completed(task.folder) as staged, ShardWriter(staged, task.split, 2**62) as shard:
            count = sum(len(rows) for _, rows in task.rows)
            found = (document for folder, rows in task.rows for document in _texts(folder, rows))
            for number, (source, text) in enumerate(found, 1):
                start = task.start if number == 1 else None
                shard.add(source, text[start : task.end if number == count else None])
    return task.folder / f"{task.split}-00000.parquet"


def _texts(folder: Path, rows: Numbers) -> Iterator[tuple[str, bytes]]:
    """Source and text of these rows of a part, which are in order."""
    with pq.ParquetFile(folder / DOCUMENTS) as table:
        first = 0
        for group in range(table.num_row_groups):
            beyond = first + table.metadata.row_group(group).num_rows
            low, high = np.searchsorted(rows, [first, beyond])
            if low < high:
                found = table.read_row_group(group).take(rows[low:high] - first).to_pydict()
                yield from zip(found["source"], found["text"], strict=True)
            first = beyond
