"""Baselines for bits per byte: the cost of a text without a language model, on the tokens that `evaluate` predicts.

Two use the tokenizer: a uniform distribution over the vocabulary, and token frequencies of the train split. One does
not: `xz -9e`, a general compressor. Legend: `T` predicted tokens, `V` vocabulary.
"""

import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.text.tokens import TokenDataset

CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenBaselines:
    """Bits per byte of the held-out text under the two distributions over tokens."""

    uniform: float
    unigram: float
    """Token frequencies of the train split, one added to each count."""
    tokens: int
    text: bytes
    """The predicted text: of conversations, the responses."""


def token_baselines(dataset_dir: Path, sequence_length: int, max_windows: int | None = None) -> TokenBaselines:
    """Measure both baselines on the validation split of a tokenized dataset.

    max_windows: on this many evenly spread windows, those of `evaluate`; None for the whole split.
    """
    dataset = TokenDataset(dataset_dir, "validation", sequence_length)
    ids_T, text = held_out(dataset, len(dataset) + 1 if max_windows is None else max_windows)
    train_T = np.memmap(dataset_dir / "train.bin", dataset.tokens.dtype, "r")
    counts_V = token_counts(train_T, len(dataset.byte_counts))
    size = max(len(text), 1)
    return TokenBaselines(
        uniform=len(ids_T) * math.log2(len(counts_V)) / size,
        unigram=unigram_bits(counts_V, ids_T) / size,
        tokens=len(ids_T),
        text=text,
    )


def held_out(dataset: TokenDataset, max_windows: int) -> tuple[np.ndarray, bytes]:
    """The tokens that `evaluate` predicts, shape (T,), and their bytes: of conversations, the responses."""
    step, count = dataset.sequence_length - 1, min(max_windows, len(dataset))
    labels = [dataset[i * len(dataset) // count]["labels"][1:].numpy() for i in range(count)]
    if dataset.responses is None and max_windows > len(dataset):  # the shorter window at the end
        labels.append(dataset.tokens[len(dataset) * step + 1 :].astype(np.int64))
    ids_T = np.concatenate(labels)
    ids_T = ids_T[ids_T >= 0]
    return ids_T, dataset.bytes_of(ids_T)


def token_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs, shape (V,); reads a memory-mapped split a piece at a time."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts_V += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts_V


def unigram_bits(counts_V: np.ndarray, ids_T: np.ndarray) -> float:
    """Bits that tokens `ids_T` cost under the frequencies `counts_V` of other text, with add-one smoothing."""
    bits_V = -np.log2((counts_V + 1) / (counts_V.sum() + len(counts_V)))
    return float(bits_V[ids_T].sum())


def xz_bits(text: bytes) -> int:
    """Size of `text` after `xz -9e`, in bits, header and checksum included."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
