"""Builds the corpus: cleans, deduplicates and splits documents and writes them as Parquet shards.

Documents that do not decode (`encodings.py`), contain NUL or are empty are counted and dropped; exact duplicates are
kept once. The split depends on a document's content (`split_by: hash`) or on its position (`position` holds out the
end of the corpus, to the character). By hash, the documents with the smallest hashes validate: a fraction of all
possible hashes, or more of them where the split would be too small to measure with (`LowestHashes`). The same input
gives the same bytes on disk. Memory use is a few row groups for a corpus of any size, as the digests of all documents
are on disk. `model.text.sources` reads the sources, and `model.text.parts` does the same work in tasks.
"""

import heapq
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from model.errors import PipelineError, limits_as_error
from model.progress import Log, Progress, silent
from model.settings import CorpusSettings
from model.text.shard_writer import Counts, ShardWriter, digest
from model.text.sources import Sources, whole_characters

SPLITS = ("train", "validation")
NAMES_REPORTED = 5
SAMPLE_CHARACTERS = 500
MIN_VALIDATION_SHARE = 0.05
"""Fraction of the text that validates at least, where `corpus.validation_bytes` is more."""
MAX_VALIDATION_SHARE = 0.2
"""Fraction of the text above which the split is not enlarged: its next document is too long."""
_HASHES = 2**128


@dataclass
class CorpusSummary:
    """Statistics of a corpus and of the documents left out; `summary.json` beside the shards.

    sources: files or datasets read. Bytes are UTF-8 bytes of text. The `*_sources` lists name the first few,
    the `*_places` lists their first invalid byte. converted: number of files or record values in another encoding than
    UTF-8 or with a byte order mark, by encoding. skipped: glob matches that are not files.
    """

    source: str
    license: str
    split_by: str
    sources: int = 0
    train_documents: int = 0
    validation_documents: int = 0
    train_bytes: int = 0
    validation_bytes: int = 0
    mean_document_bytes: float = 0.0
    longest_document_bytes: int = 0
    invalid_utf8: int = 0
    invalid_utf8_sources: list[str] = field(default_factory=list)
    invalid_places: list[str] = field(default_factory=list)
    nul: int = 0
    nul_sources: list[str] = field(default_factory=list)
    nul_places: list[str] = field(default_factory=list)
    empty: int = 0
    empty_sources: list[str] = field(default_factory=list)
    duplicates: int = 0
    converted: dict[str, int] = field(default_factory=dict)
    converted_sources: list[str] = field(default_factory=list)
    skipped: int = 0
    skipped_sources: list[str] = field(default_factory=list)
    sample: str = ""
    mixture: dict[str, dict[str, int]] = field(default_factory=dict)
    """Documents and bytes of each split, by source of a mixture, in the order of the documents."""

    @property
    def documents(self) -> int:
        """Documents in both splits."""
        return self.train_documents + self.validation_documents

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text in both splits."""
        return self.train_bytes + self.validation_bytes


def build_corpus(
    settings: CorpusSettings,
    output_dir: Path,
    *,
    log: Log = silent,
    write: Callable[..., "Written"] | None = None,
) -> CorpusSummary:
    """Write `{split}-00000.parquet`... (columns id, text, source, split) and `summary.json` to `output_dir`.

    A document's id is the 128-bit BLAKE2b of its text, in hex.
    write: writes the shards by another way with the same result (`parts.in_tasks`); a corpus that stops at `max_bytes`
    is written in this process, which reads no further.
    Raises PipelineError for a source that is missing or broken, a corpus or a split that is empty, and
    for limits of the system (`limits_as_error`).
    """
    parts = {name: (part, Sources(part)) for name, part in (settings.parts or {"": settings}).items()}
    with limits_as_error(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        if write is None or any(part.max_bytes for part, _ in parts.values()) or settings.max_bytes:
            write = _write_here
        written = write(settings, parts, output_dir, log)
        summary, train, validation = written.summary, written.train, written.validation
        for _, sources in parts.values():
            for name, count in sources.converted.items():
                summary.converted[name] = summary.converted.get(name, 0) + count
            summary.converted_sources += sources.converted_sources
            summary.skipped += len(sources.skipped)
            summary.skipped_sources += sources.skipped
        summary.converted_sources = summary.converted_sources[:NAMES_REPORTED]
        summary.skipped_sources = summary.skipped_sources[:NAMES_REPORTED]
        summary.train_documents, summary.train_bytes = train.documents, train.bytes
        summary.validation_documents, summary.validation_bytes = validation.documents, validation.bytes
        summary.longest_document_bytes = max(train.longest, validation.longest)
        summary.mean_document_bytes = summary.bytes / max(summary.documents, 1)
        _check_not_empty(settings, summary)
        found = {name: value for name, value in asdict(summary).items() if name != "mixture" or value}
        text = json.dumps(found, indent=2, ensure_ascii=False)
        (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    for line in _remarks(summary, settings.encoding or "UTF-8"):
        log(f"corpus: {line}")
    log(f"corpus: {summary.documents:,} documents, {summary.bytes:,} bytes from {summary.sources:,} sources")
    return summary


@dataclass
class Written:
    """The documents of both splits, the counts of what was left out, and what a larger validation split would take."""

    summary: CorpusSummary
    train: Counts
    validation: Counts
    lowest: "LowestHashes"


Parts = Mapping[str, tuple[CorpusSettings, Sources]]
"""The sources of a mixture by name; of another corpus, one without a name."""


def _write_here(settings: CorpusSettings, parts: Parts, output_dir: Path, log: Log) -> Written:
    """Write the shards of both splits, in this process."""
    train_end = None
    if settings.split_by == "position":
        # The first pass measures the size, since the corpus may not fit into memory.
        documents = _clean(*parts[""], new_summary(settings), _Digests(), log, "measuring")
        train_end = end_of_train(settings, sum(len(data) for _, data in documents))
    written = _write(settings, parts, output_dir, train_end, first_of_train(settings), log)
    if enlarged := enlarged_split(settings, written, log):
        written = _write(settings, parts, output_dir, None, enlarged, log)
    return written


def first_of_train(settings: CorpusSettings) -> int:
    """The smallest hash of a document that trains, of a split by hash."""
    return int(settings.validation_fraction * _HASHES)


def end_of_train(settings: CorpusSettings, size: int) -> int:
    """The bytes of a text of `size` that train, of a split by position."""
    return int(size * (1 - settings.validation_fraction))


def enlarged_split(settings: CorpusSettings, written: Written, log: Log) -> int:
    """The smallest hash that trains in a split that is large enough to measure with; 0 if the present one stays."""
    if settings.split_by != "hash":
        return 0
    held_out, size = written.validation.bytes, written.train.bytes + written.validation.bytes
    enlarged = written.lowest.bound(size)
    if held_out >= min(settings.validation_bytes, MIN_VALIDATION_SHARE * size) or enlarged <= first_of_train(settings):
        return 0
    log(
        f"corpus: corpus.validation_fraction {settings.validation_fraction} holds out {held_out:,} of "
        f"{size:,} bytes: holding out more, up to corpus.validation_bytes or {MIN_VALIDATION_SHARE:.0%}"
    )
    return enlarged


def _write(
    settings: CorpusSettings,
    parts: Parts,
    output_dir: Path,
    train_end: int | None,
    first_of_train: int,
    log: Log,
) -> Written:
    """Write the shards of both splits, in place of those of an earlier call. The last arguments: see `_split`."""
    for stale in output_dir.glob("*-?????.parquet"):
        stale.unlink()
    summary, lowest = new_summary(settings), LowestHashes(settings.validation_bytes)
    seen = _Digests()
    with (
        ShardWriter(output_dir, "train", settings.shard_bytes) as train,
        ShardWriter(output_dir, "validation", settings.shard_bytes) as validation,
    ):
        for name, (part, sources) in parts.items():
            before = [(split.counts.documents, split.counts.bytes) for split in (train, validation)]
            documents = _clean(part, sources, summary, seen, log, f"writing {name}".rstrip())
            for source, data, to_validation in _split(documents, settings, train_end, first_of_train):
                (validation if to_validation else train).add(source, data)
                lowest.add(int.from_bytes(digest(data)), len(data))
                if not to_validation and not summary.sample:
                    summary.sample = data.decode()[:SAMPLE_CHARACTERS]
            if name:
                now = [(split.counts.documents, split.counts.bytes) for split in (train, validation)]
                summary.mixture[name] = {
                    f"{split}_{kind}": after[index] - earlier[index]
                    for split, after, earlier in zip(SPLITS, now, before, strict=True)
                    for index, kind in enumerate(("documents", "bytes"))
                }
    return Written(summary, train.counts, validation.counts, lowest)


class LowestHashes:
    """The documents with the smallest hashes, as many as together hold `least_bytes`: what a larger split would take.

    Memory holds their hashes and sizes, and those of no other document.
    """

    def __init__(self, least_bytes: int) -> None:
        self._least_bytes, self._bytes = least_bytes, 0
        self._largest_first: list[tuple[int, int]] = []

    def add(self, digest: int, size: int) -> None:
        """Count a document of `size` bytes."""
        heapq.heappush(self._largest_first, (-digest, size))
        self._bytes += size
        while self._bytes - self._largest_first[0][1] >= self._least_bytes:
            self._bytes -= heapq.heappop(self._largest_first)[1]
            if not self._largest_first:
                return

    def bound(self, corpus_bytes: int) -> int:
        """The smallest hash that trains, for a split of `least_bytes` or MIN_VALIDATION_SHARE of the text.

        0 if the split would then hold more than MAX_VALIDATION_SHARE of the text.
        """
        held_out = 0
        for negative, size in sorted(self._largest_first, reverse=True):
            held_out += size
            if held_out >= min(self._least_bytes, MIN_VALIDATION_SHARE * corpus_bytes):
                return 1 - negative if held_out <= MAX_VALIDATION_SHARE * corpus_bytes else 0
        return 0


def read_summary(corpus_dir: Path) -> CorpusSummary:
    """Read the summary of a corpus. Raises PipelineError if it is missing."""
    path = corpus_dir / "summary.json"
    if not path.is_file():
        raise PipelineError(f"no summary.json in {corpus_dir}: expected a corpus; make it again")
    return CorpusSummary(**json.loads(path.read_text(encoding="utf-8")))


def corpus_shards(corpus_dir: Path, split: str) -> list[Path]:
    """The Parquet files of one split ("train" or "validation"), in order. Raises PipelineError if it has none."""
    shards = sorted(corpus_dir.glob(f"{split}-*.parquet"))
    if not shards:
        raise PipelineError(f"no {split} shard in {corpus_dir}: expected a corpus; make it again")
    return shards


def read_columns(shard: Path, *columns: str) -> Iterator[tuple[str, ...]]:
    """The named columns of each document of one shard, in the order they were written."""
    with pq.ParquetFile(shard) as table:
        for group in range(table.num_row_groups):  # the writer limits their size
            found = table.read_row_group(group, columns=list(columns))
            yield from zip(*(found[column].to_pylist() for column in columns), strict=True)


def read_shard(shard: Path) -> Iterator[str]:
    """The texts of one shard, in the order they were written."""
    return (text for (text,) in read_columns(shard, "text"))


def read_documents(corpus_dir: Path, split: str) -> Iterator[str]:
    """The texts of one split ("train" or "validation"), in the order they were written.

    Raises PipelineError, at the first document, if the split has no shard.
    """
    for shard in corpus_shards(corpus_dir, split):
        yield from read_shard(shard)


def _remarks(summary: CorpusSummary, encoding: str) -> Iterator[str]:
    """Log lines on dropped and converted documents and on skipped names. encoding: that documents should be in."""
    for count, what, names in (
        (summary.invalid_utf8, f"that are not {encoding}", summary.invalid_places),
        (summary.nul, "that hold a NUL", summary.nul_places),
        (summary.empty, "that are empty", summary.empty_sources),
        (summary.duplicates, "that repeat another", []),
    ):
        if count:
            yield f"left out {count:,} documents {what}" + (f", first in {', '.join(names)}" if names else "")
    for name, count in sorted(summary.converted.items()):
        yield f"converted to plain UTF-8: {count:,} in {name}, first in {', '.join(summary.converted_sources)}"
    if summary.skipped:
        yield f"skipped {summary.skipped:,} names that are not files, first {', '.join(summary.skipped_sources)}"


def new_summary(settings: CorpusSettings) -> CorpusSummary:
    """A summary that has counted nothing."""
    license = settings.license
    if settings.source == "stdlib" and license == "unknown":
        license = "PSF-2.0"
    return CorpusSummary(settings.source, license, settings.split_by)


class _Digests:
    """Set of digests in a temporary SQLite database, which spills to disk beyond a few megabytes.

    A Python set takes about 100 bytes per document: gigabytes for a web corpus.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")  # one transaction that is never committed: durability is not needed

    def add(self, digest: bytes) -> bool:
        """Add a digest; False if it was present."""
        return self._database.execute("INSERT OR IGNORE INTO digests VALUES (?)", (digest,)).rowcount == 1


def _clean(
    settings: CorpusSettings, sources: Sources, summary: CorpusSummary, seen: "_Digests", log: Log, label: str
) -> Iterator[tuple[str, bytes]]:
    """Yield the documents to keep, up to max_bytes; `summary` counts the dropped ones.

    seen: digests of the documents kept so far.
    """
    kept = 0
    total_mb = sources.stored_bytes / 1e6 if sources.stored_bytes and not settings.max_bytes else None
    progress = Progress(log, f"corpus, {label}", total_mb, "MB")
    for source, data in usable_documents(settings, sources, summary, progress):
        if not seen.add(digest(data)):
            summary.duplicates += 1
            continue
        if settings.max_bytes and kept + len(data) >= settings.max_bytes:
            # Cut the last document, so that the limit also works for a corpus of one document.
            data = data[: whole_characters(data, settings.max_bytes - kept)]
            if data and not settings.holds_conversations:
                yield source, data
            return
        kept += len(data)
        yield source, data


def usable_documents(
    settings: CorpusSettings, sources: Sources, summary: CorpusSummary, progress: Progress
) -> Iterator[tuple[str, bytes]]:
    """Yield the documents that are text; `summary` counts the others, and the sources.

    Raises PipelineError for a document longer than a shard, and what reading raises.
    """
    read_bytes, opened_before = 0, summary.sources
    for source, data in sources:
        progress.advance(((sources.read_bytes - read_bytes) if sources.stored_bytes else len(data)) / 1e6)
        read_bytes = sources.read_bytes
        summary.sources = opened_before + sources.opened
        if len(data) > settings.shard_bytes:
            raise PipelineError(
                f"{source} has a document of {len(data):,} bytes, more than corpus.shard_bytes "
                f"({settings.shard_bytes:,}): split it, or raise corpus.shard_bytes"
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            summary.invalid_utf8 += 1
            _name(summary.invalid_utf8_sources, source)
            _name(summary.invalid_places, f"{source} ({sources.place_of(error.start)})")
            continue
        if (nul := data.find(b"\0")) >= 0:
            summary.nul += 1
            _name(summary.nul_sources, source)
            _name(summary.nul_places, f"{source} ({sources.place_of(nul)})")
            continue
        if not text or text.isspace():
            summary.empty += 1
            _name(summary.empty_sources, source)
            continue
        yield source, data
    summary.sources = opened_before + sources.opened


def add_counts(total: CorpusSummary, found: CorpusSummary) -> None:
    """Add what `usable_documents` counted of the sources after those of `total`."""
    for name in ("sources", "invalid_utf8", "nul", "empty"):
        setattr(total, name, getattr(total, name) + getattr(found, name))
    for name in ("invalid_utf8_sources", "invalid_places", "nul_sources", "nul_places", "empty_sources"):
        for one in getattr(found, name):
            _name(getattr(total, name), one)


def _name(names: list[str], source: str) -> None:
    if len(names) < NAMES_REPORTED and source not in names:
        names.append(source)


def _split(
    documents: Iterator[tuple[str, bytes]], settings: CorpusSettings, train_end: int | None, first_of_train: int
) -> Iterator[tuple[str, bytes, bool]]:
    """(source, document, is held out); a document across `train_end` (bytes) is split into two.

    first_of_train: the smallest hash of a document that trains, where train_end is None.
    """
    position = 0
    for source, data in documents:
        if train_end is None:
            yield source, data, int.from_bytes(digest(data)) < first_of_train
            continue
        if settings.holds_conversations:
            yield source, data, position >= train_end
            position += len(data)
            continue
        cut = whole_characters(data, min(max(train_end - position, 0), len(data)))
        if cut:
            yield source, data[:cut], False
        if cut < len(data):
            yield source, data[cut:], True
        position += len(data)


def _check_not_empty(settings: CorpusSettings, summary: CorpusSummary) -> None:
    if summary.documents == 0:
        invalid = f" (first in {summary.invalid_places[0]})" if summary.invalid_places else ""
        nul = f", {summary.nul:,} with a NUL (first in {summary.nul_places[0]})" if summary.nul else ""
        advice = ", set corpus.encoding if it is in another" if invalid or nul else ""
        raise PipelineError(
            f"the corpus is empty after cleaning: {summary.sources:,} sources, {summary.invalid_utf8:,} documents not "
            f"{settings.encoding or 'UTF-8'}{invalid}, {summary.empty:,} empty{nul}; expected text: check "
            f"corpus.source '{settings.source}' and its paths{advice}"
        )
    for split in SPLITS:
        if getattr(summary, f"{split}_documents") == 0:
            raise PipelineError(
                f"the {split} split is empty: {summary.documents:,} documents of {summary.bytes:,} bytes, split by "
                f"{settings.split_by} with corpus.validation_fraction {settings.validation_fraction}; add text, or set "
                "corpus.split_by to 'position'"
            )
