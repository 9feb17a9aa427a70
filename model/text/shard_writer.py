"""Writes the documents of a split as Parquet shards: columns id, text, source, split; the id is the text's digest."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "split")])
ROW_GROUP_BYTES = 8 << 20
ROW_GROUP_DOCUMENTS = 8192


def digest(data: bytes) -> bytes:
    """The 128-bit BLAKE2b of a text, by which documents are compared and split."""
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclass
class Counts:
    """Documents of one split, their bytes, and those of the longest."""

    documents: int = 0
    bytes: int = 0
    longest: int = 0

    def add(self, size: int) -> None:
        """Count a document of `size` bytes."""
        self.documents += 1
        self.bytes += size
        self.longest = max(self.longest, size)


class ShardWriter:
    """Writes the documents of one split to numbered Parquet files, in row groups of limited size."""

    def __init__(self, directory: Path, split: str, shard_bytes: int) -> None:
        self._directory, self._split, self._shard_bytes = directory, split, shard_bytes
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[tuple[str, bytes, str]] = []
        self._row_bytes = self._in_shard = self._shards = 0
        self.counts = Counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close_shard()
        elif self._writer:
            self._writer.close()

    def add(self, source: str, data: bytes) -> None:
        """Append one document of UTF-8 text."""
        if self._in_shard and self._in_shard + len(data) > self._shard_bytes:
            self._close_shard()
        self._rows.append((digest(data).hex(), data, source))
        self._row_bytes += len(data)
        self._in_shard += len(data)
        self.counts.add(len(data))
        if self._row_bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._directory / f"{self._split}-{self._shards:05}.parquet",
                SCHEMA,
                compression="zstd",
                use_dictionary=["source", "split"],
                write_statistics=False,
            )
        ids, texts, sources = zip(*self._rows, strict=True)
        columns = [ids, pa.array(texts, pa.binary()).cast(pa.string()), sources, [self._split] * len(ids)]
        arrays = [pa.array(column, pa.string()) for column in columns]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
        self._rows, self._row_bytes = [], 0

    def _close_shard(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._shards += 1
        self._in_shard = 0
