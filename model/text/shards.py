"""Encodes a split of a corpus shard by shard, in tasks that run on any host; the files equal those of `encode_split`.

A task whose result exists does nothing. Memory holds a few batches of documents per task, and 8 bytes per document
while the shards are joined.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import PipelineError
from model.progress import Log, Progress, silent
from model.settings import TokenizerSettings
from model.system.tasks import Apply, completed
from model.text.chat.template import ChatEncoder
from model.text.corpus import corpus_shards, read_shard
from model.text.tokenizer import FastEncoder, load_tokenizer
from model.text.tokens import SplitTokens, encode_split, save_array

TOKENS = "tokens"
"""Stem of the files in a shard's folder."""
SUMS = ("cut_turns", "cut_prompts", "cut_responses", "unanswered")
"""Counts of a `SplitTokens` that add up over shards."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode. folder: the complete result. dtype: name of the type of the ids."""

    shard: Path
    folder: Path
    tokenizer: Path
    vocab_size: int
    dtype: str
    sequence_length: int
    chat: bool

    def __str__(self) -> str:
        return str(self.shard)


def encode_shard(task: ShardTask) -> int:
    """Encode one shard into `task.folder`, and return its number of documents.

    Raises PipelineError for a document that is not a conversation, RuntimeError if the shard cannot be read; both name
    the shard.
    """
    if not task.folder.is_dir():
        try:
            with completed(task.folder) as staged:
                _encode_into(staged, task)
        except PipelineError as error:
            raise PipelineError(f"{task.shard}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"{task.shard} could not be encoded: {error!r}") from error
    return len(np.load(task.folder / f"{TOKENS}.documents.npy")) - 1


def _encode_into(directory: Path, task: ShardTask) -> None:
    written = (task.tokenizer / "tokenizer.json").stat()
    encoder, end_of_text, tokenizer = _encoder(task.tokenizer, (written.st_ino, written.st_mtime_ns, written.st_size))
    chat = ChatEncoder(tokenizer, encoder.encode, task.sequence_length) if task.chat else None
    found = encode_split(
        encoder,
        read_shard(task.shard),
        directory / TOKENS,
        end_of_text,
        task.vocab_size,
        np.dtype(task.dtype),
        chat=chat,
        threads=1,
    )
    save_array(directory / "counts.npy", found.counts)
    (directory / "sums.json").write_text(json.dumps({name: getattr(found, name) for name in SUMS}))


@functools.lru_cache(maxsize=1)
def _encoder(directory: Path, version: tuple[int, ...]) -> tuple[FastEncoder, int, Any]:
    """Encoder, end-of-text token and tokenizer, built once in a process that encodes many shards.

    version: another one for another tokenizer that is written to the same folder later.
    """
    tokenizer = load_tokenizer(directory)
    return FastEncoder(tokenizer), tokenizer.eos_token_id, tokenizer


def by_shards(apply: Apply, scratch_dir: Path) -> Callable[..., SplitTokens]:
    """The argument `encode` of `build_tokenized_dataset`: one task for each shard, run by `apply`.

    scratch_dir: of the encoded shards, which another attempt finds there; all hosts read and write it.
    """
    return functools.partial(encode_by_shards, apply=apply, scratch_dir=scratch_dir)


def encode_by_shards(
    corpus_dir: Path,
    split: str,
    output_dir: Path,
    vocab_size: int,
    dtype: npt.DTypeLike,
    settings: TokenizerSettings,
    log: Log = silent,
    *,
    apply: Apply,
    scratch_dir: Path,
) -> SplitTokens:
    """Encode a split with one task for each of its shards, and write to `output_dir` what `encode_split` writes.

    `output_dir` holds the tokenizer, and all hosts read it. Raises what `encode_shard` raises.
    """
    stem, chat = output_dir / split, settings.chat
    tokenizer = (output_dir / "tokenizer" / "tokenizer.json").read_bytes()
    parts = scratch_dir / f"{split}-{hashlib.sha256(tokenizer).hexdigest()[:16]}"
    parts.mkdir(parents=True, exist_ok=True)
    tasks = [
        ShardTask(
            shard=shard.absolute(),
            folder=parts.absolute() / shard.stem,
            tokenizer=output_dir.absolute() / "tokenizer",
            vocab_size=vocab_size,
            dtype=np.dtype(dtype).name,
            sequence_length=settings.sequence_length,
            chat=chat,
        )
        for shard in corpus_shards(corpus_dir, split)
    ]
    progress = Progress(log, f"encoding {split}", len(tasks), "shards")
    for _ in apply(encode_shard, tasks):
        progress.advance()
    found = _join([task.folder for task in tasks], stem, vocab_size, chat)
    shutil.rmtree(parts)
    return found


def _join(folders: Sequence[Path], stem: Path, vocab_size: int, chat: bool) -> SplitTokens:
    counts = np.zeros(vocab_size, np.int64)
    offsets, responses = [np.zeros(1, np.int64)], [np.zeros((0, 2), np.int64)]
    sums = dict.fromkeys(SUMS, 0)
    start = 0
    with stem.with_name(f"{stem.name}.bin").open("wb") as joined:
        for folder in folders:
            with (folder / f"{TOKENS}.bin").open("rb") as ids:
                shutil.copyfileobj(ids, joined, 1 << 22)
            counts += np.load(folder / "counts.npy")
            documents = np.load(folder / f"{TOKENS}.documents.npy")
            offsets.append(documents[1:] + start)
            if chat:
                responses.append(np.load(folder / f"{TOKENS}.responses.npy") + start)
            for key, value in json.loads((folder / "sums.json").read_text()).items():
                sums[key] += value
            start += int(documents[-1])
    document_offsets = np.concatenate(offsets)
    save_array(stem.with_name(f"{stem.name}.documents.npy"), document_offsets)
    if chat:
        save_array(stem.with_name(f"{stem.name}.responses.npy"), np.concatenate(responses))
    return SplitTokens(counts, document_offsets, **sums)
