"""Finds text of the validation split inside the training split, and documents that nearly repeat another.

A run is RUN_BYTES consecutive bytes of a text in lower case with single spaces, about 13 words; equal runs are equal
text. Hashes of a fixed eighth of all runs are compared, chosen by the hash itself, so a run is compared in both splits
or in neither ("Winnowing", Schleimer et al. 2003). Near-duplicates are found by MinHash if the package `rensa` is
installed. Memory holds the hashes of at most VALIDATION_BYTES of text, and signatures of NEAR_DOCUMENTS documents. A
task hashes one shard; hashes and signatures are compared in this process.
"""

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.progress import Log, Progress, silent
from model.system.tasks import Apply
from model.text.corpus import read_columns

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


@dataclass(frozen=True)
class HashTask:
    """One shard to hash. hashes: .npy of runs, sorted, that its documents are compared with; None: none."""

    shard: Path
    hashes: Path | None
    has_signatures: bool

    def __str__(self) -> str:
        return str(self.shard)


@dataclass(frozen=True)
class Document:
    """What a task found in one document. runs: hashes of its runs, or their indices in `HashTask.hashes`.

    signature: by MinHash; None without the package rensa.
    """

    source: str
    preview: str
    size: int
    runs: npt.NDArray[Any]
    signature: Any


def find_overlap(
    corpus_dir: Path, *, log: Log = silent, apply: Apply = map, scratch_dir: Path | None = None
) -> Overlap:
    """Compare the splits of a corpus, and the documents of both with each other.

    apply: runs one task for each shard, with the same result. scratch_dir: where all hosts read and write.
    """
    found = Overlap()
    near = _NearDuplicates() if find_spec("rensa") else None
    names, previews, parts = [], [], []
    total_mb = sum(path.stat().st_size for path in corpus_dir.glob("*.parquet")) / 1e6
    progress = Progress(log, "corpus, comparing", total_mb, "MB of shards")

    def documents(split: str, most_bytes: int, hashes: Path | None) -> Iterator[Document]:
        """The documents of a split, up to `most_bytes` of text."""
        read, shards = 0, sorted(corpus_dir.absolute().glob(f"{split}-*.parquet"))
        items = [HashTask(shard, hashes, near is not None) for shard in shards]
        for shard, batch in zip(shards, apply(hash_shard, items), strict=True):
            for document in batch:
                read += document.size
                if read > most_bytes:
                    found.is_whole = False
                    return
                if near:
                    near.add(document)
                yield document
            progress.advance(shard.stat().st_size / 1e6)

    for document in documents("validation", VALIDATION_BYTES, None):
        names.append(document.source)
        previews.append(document.preview)
        parts.append(document.runs)
    hashes, places = np.unique(np.concatenate([*parts, np.zeros(0, np.uint64)]), return_inverse=True)
    is_shared = np.zeros(len(hashes), bool)
    with tempfile.TemporaryDirectory(dir=scratch_dir) as folder:
        np.save(Path(folder, "hashes.npy"), hashes)
        for document in documents("train", TRAIN_BYTES, Path(folder, "hashes.npy")):
            found.train_documents += 1
            is_shared[document.runs] = True
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


def hash_shard(task: HashTask) -> list[Document]:
    """The documents of one shard, in order."""
    return [_compared(source, text, task) for source, text in read_columns(task.shard, "source", "text")]


def _compared(source: str, text: str, task: HashTask) -> Document:
    runs: npt.NDArray[Any] = run_hashes(text, RUN_BYTES, _SAMPLED)
    if task.hashes:
        hashes = _loaded(task.hashes)
        at = np.minimum(np.searchsorted(hashes, runs), max(len(hashes) - 1, 0))
        runs = np.unique(at[hashes[at] == runs]) if len(hashes) else np.zeros(0, np.int64)
    signature = _signature(text) if task.has_signatures else None
    return Document(source, text[:_PREVIEW], len(text.encode()), runs, signature)


@functools.lru_cache(maxsize=1)
def _loaded(hashes: Path) -> Hashes:
    return np.asarray(np.load(hashes, mmap_mode="r"))


def _signature(text: str) -> Any:
    import rensa

    data = run_hashes(text, _NEAR_RUN_BYTES, _NEAR_SAMPLED).tobytes()
    signature = rensa.RMinHash(num_perm=_PERMUTATIONS, seed=0)
    signature.update([data[start : start + 8] for start in range(0, len(data), 8)])
    return signature


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
    """Counts the documents that nearly repeat one before them, by bands of their signatures."""

    def __init__(self) -> None:
        import rensa

        self._index = rensa.RMinHashLSH(threshold=SIMILAR, num_perm=_PERMUTATIONS, num_bands=16)
        self._signatures: list[Any] = []
        self._names: list[str] = []
        self.count = 0
        self.examples: list[dict[str, Any]] = []

    def add(self, document: Document) -> None:
        """Compare a document with those before it, and keep it if it repeats none."""
        if len(self._names) >= NEAR_DOCUMENTS:
            return
        signature = document.signature
        nearest = max(
            ((signature.jaccard(self._signatures[key]), key) for key in self._index.query(signature)), default=(0.0, 0)
        )
        if nearest[0] >= SIMILAR:
            self.count += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(
                    {
                        "document": document.source,
                        "repeats": self._names[nearest[1]],
                        "similarity": round(nearest[0], 3),
                        "begins": document.preview,
                    }
                )
            return
        self._index.insert(len(self._names), signature)
        self._signatures.append(signature)
        self._names.append(document.source)
