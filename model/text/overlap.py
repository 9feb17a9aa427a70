"""Finds text of the validation split inside the training split, and documents that nearly repeat another.

A run is RUN_BYTES consecutive bytes of a text in lower case with single spaces, about 13 words; equal runs are equal
text. Hashes of a fixed eighth of all runs are compared, chosen by the hash itself, so a run is compared in both splits
or in neither ("Winnowing", Schleimer et al. 2003). Near-duplicates are found by MinHash if the package `rensa` is
installed. Memory holds the hashes of at most VALIDATION_BYTES of text, and signatures of NEAR_DOCUMENTS documents.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from model.progress import Log, Progress, silent

RUN_BYTES = 64
VALIDATION_BYTES, TRAIN_BYTES = 1 << 26, 1 << 30
"""Text of each split that is read at most."""
NEAR_DOCUMENTS = 200_000
SIMILAR = 0.8
"""Jaccard similarity, estimated by MinHash, of two documents that count as near-duplicates."""
MOSTLY = 0.5
"""Share of a document's runs in the training split above which it counts as contained there."""
EXAMPLES = 5
_SAMPLED = 8
_NEAR_RUN_BYTES, _NEAR_SAMPLED, _PERMUTATIONS = 24, 4, 128
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_PIECE = 1 << 20
"""Bytes hashed at once, which bounds the memory for a long document."""
_PREVIEW = 80

Hashes = npt.NDArray[np.uint64]


@dataclass
class Overlap:
    """What a corpus repeats. near_duplicates: None without the package rensa.

    shared: share of the validation split's compared runs that occur in the training split, 0 to 1. contained: documents
    of the validation split with more than MOSTLY of their runs there; examples have the highest shares.
    """

    shared: float = 0.0
    validation_documents: int = 0
    contained: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    train_documents: int = 0
    is_whole: bool = True
    """Whether all text was read, and not only the first part."""
    near_duplicates: int | None = None
    near_examples: list[dict[str, Any]] = field(default_factory=list)


def find_overlap(corpus_dir: Path, *, log: Log = silent) -> Overlap:
    """Compare the splits of a corpus, and the documents of both with each other."""
    found = Overlap()
    near = _NearDuplicates() if find_spec("rensa") else None
    names, previews, parts = [], [], []
    total_mb = sum(path.stat().st_size for path in corpus_dir.glob("*.parquet")) / 1e6
    progress = Progress(log, "corpus, comparing", total_mb, "MB of shards")
    for source, text in _documents(corpus_dir, "validation", VALIDATION_BYTES, found, progress):
        names.append(source)
        previews.append(text[:_PREVIEW])
        parts.append(run_hashes(text, RUN_BYTES, _SAMPLED))
        if near:
            near.add(source, text)
    hashes, places = np.unique(np.concatenate([*parts, np.zeros(0, np.uint64)]), return_inverse=True)
    is_shared = np.zeros(len(hashes), bool)
    for source, text in _documents(corpus_dir, "train", TRAIN_BYTES, found, progress):
        found.train_documents += 1
        runs = run_hashes(text, RUN_BYTES, _SAMPLED)
        if len(hashes):
            at = np.minimum(np.searchsorted(hashes, runs), len(hashes) - 1)
            is_shared[at[hashes[at] == runs]] = True
        if near:
            near.add(source, text)
    found.validation_documents = len(names)
    ends = np.cumsum([len(part) for part in parts])
    shares = [float(flags.mean()) if len(flags) else 0.0 for flags in np.split(is_shared[places], ends)[:-1]]
    found.shared = float(is_shared[places].mean()) if len(places) else 0.0
    found.contained = sum(share > MOSTLY for share in shares)
    order = sorted(range(len(shares)), key=lambda index: -shares[index])[:EXAMPLES]
    found.examples = [
        {"document": names[index], "share in training": round(shares[index], 3), "begins": previews[index]}
        for index in order
        if shares[index]
    ]
    if near:
        found.near_duplicates, found.near_examples = near.count, near.examples
    return found


def run_hashes(text: str, length: int, sampled: int) -> Hashes:
    """Hashes of the runs of `length` bytes in a text, every one in `sampled` of all possible hashes.

    A shorter text is one run. The polynomial hash of each run comes from two sums over prefixes (Rabin and Karp).
    """
    normal = np.frombuffer(" ".join(text.lower().split()).encode().ljust(length), np.uint8)
    runs = [_hash(normal[start : start + _PIECE + length - 1], length) for start in range(0, len(normal), _PIECE)]
    hashes = np.concatenate(runs)
    return hashes[hashes % np.uint64(sampled) == 0] if len(hashes) > sampled else hashes


def _hash(data: npt.NDArray[np.uint8], length: int) -> Hashes:
    """Hash of each run of `length` bytes."""
    if len(data) < length:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers()
    values = (data.astype(np.uint64) + np.uint64(1)) * powers[: len(data)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    runs = (sums[length:] - sums[:-length]) * inverses[: len(data) - length + 1]
    runs ^= runs >> np.uint64(29)  # the low bits of a product depend only on low bits
    runs *= np.uint64(0xBF58476D1CE4E5B9)
    runs ^= runs >> np.uint64(32)
    return runs


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """The powers of the multiplier, and of its inverse, modulo 2**64, for a piece of text."""

    def powers(base: int) -> Hashes:
        factors = np.full(_PIECE + RUN_BYTES, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return powers(_MULTIPLIER), powers(pow(_MULTIPLIER, -1, 2**64))


class _NearDuplicates:
    """Counts the documents that nearly repeat one before them."""

    def __init__(self) -> None:
        import rensa

        self._rensa = rensa
        self._index = rensa.RMinHashLSH(threshold=SIMILAR, num_perm=_PERMUTATIONS, num_bands=16)
        self._signatures: list[Any] = []
        self._names: list[str] = []
        self.count = 0
        self.examples: list[dict[str, Any]] = []

    def add(self, source: str, text: str) -> None:
        """Compare a document with those before it, and keep it if it repeats none."""
        if len(self._names) >= NEAR_DOCUMENTS:
            return
        data = run_hashes(text, _NEAR_RUN_BYTES, _NEAR_SAMPLED).tobytes()
        signature = self._rensa.RMinHash(num_perm=_PERMUTATIONS, seed=0)
        signature.update([data[start : start + 8] for start in range(0, len(data), 8)])
        nearest = max(
            ((signature.jaccard(self._signatures[key]), key) for key in self._index.query(signature)), default=(0.0, 0)
        )
        if nearest[0] >= SIMILAR:
            self.count += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(
                    {
                        "document": source,
                        "repeats": self._names[nearest[1]],
                        "similarity": round(nearest[0], 3),
                        "begins": text[:_PREVIEW],
                    }
                )
            return
        self._index.insert(len(self._names), signature)
        self._signatures.append(signature)
        self._names.append(source)


def _documents(
    corpus_dir: Path, split: str, most_bytes: int, found: Overlap, progress: Progress
) -> Iterator[tuple[str, str]]:
    """Source and text of the documents of a split, up to `most_bytes` of text."""
    read = 0
    for path in sorted(corpus_dir.glob(f"{split}-*.parquet")):
        with pq.ParquetFile(path) as table:
            for group in range(table.num_row_groups):
                columns = table.read_row_group(group, columns=["source", "text"]).to_pydict()
                for source, text in zip(columns["source"], columns["text"], strict=True):
                    read += len(text.encode())
                    if read > most_bytes:
                        found.is_whole = False
                        return
                    yield source, text
                progress.advance(path.stat().st_size / 1e6 / table.num_row_groups)
