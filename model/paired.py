"""Two models on the same held-out text: the difference of their bits per byte, with an interval for it.

Both are scored on the same pieces of text, and the interval is over the differences of the pairs: what is hard in a
piece is hard for both, so that a small difference is visible that two separate scores would hide. Models of one
tokenizer are scored on the windows of the dataset, as `evaluate` scores them; a model of another tokenizer gets the
bytes of passages and encodes them itself.
Legend: `N` pieces, `T` tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.errors import PipelineError
from model.evaluation import window_bits
from model.logits import IGNORE_INDEX
from model.modeling_rex import RexForCausalLM
from model.system.cpu import limit_threads
from model.system.devices import resolve_device
from model.text.tokenizer import FastEncoder, load_tokenizer
from model.text.tokens import TokenDataset
from model.weights.loading import load_model

RESAMPLES = 10_000
MIN_PIECES = 8
"""Pieces below which an interval would claim more than so little text can show."""
_BATCH = 4
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedComparison:
    """Scores of two models on the same text, in bits per byte; a negative difference is the candidate's gain."""

    candidate: float
    champion: float
    difference: float
    """candidate - champion."""
    low: float
    """Lower end of the interval of the difference."""
    high: float
    confidence: float
    """Share, 0 to 1, of such intervals that hold the difference on all text of this kind."""
    pieces: int
    bytes: int
    unit: str
    """Description of a piece."""

    @property
    def is_better(self) -> bool:
        """Whether the candidate is better by more than chance."""
        return self.pieces >= MIN_PIECES and self.high < 0

    @property
    def is_worse(self) -> bool:
        """Whether the candidate is worse by more than chance."""
        return self.pieces >= MIN_PIECES and self.low > 0


def compare_pair(
    candidate_dir: Path,
    champion_dir: Path,
    dataset_dir: Path,
    sequence_length: int,
    *,
    max_pieces: int,
    device: str = "cpu",
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedComparison:
    """Score both models on the validation split of a dataset, which the candidate's tokenizer made.

    Raises PipelineError if a model cannot be loaded, and if conversations were encoded by another tokenizer than
    the champion's: which of their tokens count is known for the dataset's own tokens alone.
    """
    limit_threads()
    dataset = TokenDataset(dataset_dir, "validation", sequence_length)
    target = str(resolve_device(device, setting="device"))
    candidate, champion = (load_model(directory, device=target) for directory in (candidate_dir, champion_dir))
    if _tokenizer(champion_dir) == _tokenizer(dataset_dir / "tokenizer"):
        windows = list(_windows(dataset, max_pieces))
        bytes_N = np.array([int(dataset.byte_counts[labels[1:][labels[1:] >= 0]].sum()) for _, labels in windows])
        candidate_bits, champion_bits = _bits(candidate, windows), _bits(champion, windows)
        unit = f"windows of {sequence_length:,} tokens"
    elif dataset.responses is not None:
        raise PipelineError(
            f"{champion_dir} has another tokenizer than {dataset_dir}, whose conversations are scored by their own "
            "tokens: expected the same tokenizer"
        )
    else:
        passages = list(_passages(dataset, max_pieces))
        bytes_N = np.array([len(passage) for passage in passages])
        read = _PassageEncoder(dataset_dir / "tokenizer"), _PassageEncoder(champion_dir)
        candidate_bits = _bits(candidate, [(read[0](passage),) * 2 for passage in passages])
        champion_bits = _bits(champion, [(read[1](passage),) * 2 for passage in passages])
        unit = f"passages of at most {sequence_length:,} tokens of the candidate's"
    text_N = bytes_N.astype(np.float64)
    return paired_bootstrap(candidate_bits, champion_bits, text_N, unit=unit, confidence=confidence, seed=seed)


def paired_bootstrap(
    candidate_bits_N: Floats,
    champion_bits_N: Floats,
    bytes_N: Floats,
    *,
    unit: str,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedComparison:
    """The difference in bits per byte, and a percentile interval from resampled pieces; each piece keeps its pair.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Pieces are taken as independent. Raises
    PipelineError if there is no text.
    """
    if not bytes_N.sum() > 0:
        raise PipelineError("the compared pieces hold no text: expected at least one byte; use a larger corpus")
    count, gain_N = len(bytes_N), candidate_bits_N - champion_bits_N
    if not np.isfinite(gain_N).all():
        gain_N = np.full(count, np.nan)
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    step = max(1, (1 << 22) // count)
    for start in range(0, resamples, step):
        picked = generator.integers(0, count, (min(step, resamples - start), count))
        text = bytes_N[picked].sum(axis=1)
        differences[start : start + len(picked)] = gain_N[picked].sum(axis=1) / np.where(text > 0, text, np.inf)
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    candidate, champion = (float(bits.sum() / bytes_N.sum()) for bits in (candidate_bits_N, champion_bits_N))
    return PairedComparison(
        candidate=candidate,
        champion=champion,
        difference=candidate - champion,
        low=float(low),
        high=float(high),
        confidence=confidence,
        pieces=count,
        bytes=int(bytes_N.sum()),
        unit=unit,
    )


def _tokenizer(directory: Path) -> bytes:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise PipelineError(f"{path} is missing: expected the tokenizer of a model; make the model again")
    return path.read_bytes()


def _windows(dataset: TokenDataset, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels, each (T,), of at most `most` windows, evenly spread."""
    count = min(most, len(dataset))
    for index in range(count):
        window = dataset[index * len(dataset) // count]
        yield window["input_ids"], window["labels"]


def _passages(dataset: TokenDataset, most: int) -> Iterator[bytes]:
    """The bytes of at most `most` passages, evenly spread, none of which goes beyond its document."""
    length = dataset.sequence_length - 1
    count = min(most, max(len(dataset.tokens) // length, 1))
    for index in range(count):
        start = index * len(dataset.tokens) // count
        document = int(np.searchsorted(dataset.document_offsets, start, side="right"))
        if passage := dataset.text_bytes(start, min(start + length, int(dataset.document_offsets[document]))):
            yield passage


class _PassageEncoder:
    """Text as the model of this tokenizer reads it: after a token that starts a document."""

    def __init__(self, directory: Path) -> None:
        tokenizer = load_tokenizer(directory)
        self._encoder = FastEncoder(tokenizer)
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._start = next((int(token) for token in starts if token is not None), None)

    def __call__(self, passage: bytes) -> Tensor:
        """Ids of the passage after the start, shape (T,). Raises PipelineError if a tokenizer has no start."""
        if self._start is None:
            raise PipelineError(
                "the tokenizer has neither a bos nor an eos token: expected one to start a passage with"
            )
        ids = self._encoder.encode_bytes(passage)
        return torch.cat([torch.tensor([self._start]), torch.from_numpy(ids.astype(np.int64))])


def _bits(model: RexForCausalLM, pieces: list[tuple[Tensor, Tensor]]) -> Floats:
    """Bits of each piece, shape (N,); one that is longer than the model's context is read in parts of that length."""
    context = model.config.max_position_embeddings
    parts = [
        (number, ids_T[start : start + context], labels_T[start : start + context])
        for number, (ids_T, labels_T) in enumerate(pieces)
        for start in range(0, len(ids_T) - 1, context - 1)
    ]
    bits_N = np.zeros(len(pieces))
    for start in range(0, len(parts), _BATCH):
        batch = parts[start : start + _BATCH]
        longest = max(len(ids_T) for _, ids_T, _ in batch)
        # Tokens after a part are not predicted and, in a causal model, do not change those before.
        ids_BT = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for _, ids, _ in batch])
        labels_BT = torch.stack(
            [torch.nn.functional.pad(labels, (0, longest - len(labels)), value=IGNORE_INDEX) for _, _, labels in batch]
        )
        scores = window_bits(model, iter([(ids_BT, labels_BT)]))
        for (number, _, _), bits in zip(batch, scores, strict=True):
            bits_N[number] += bits
    return bits_N
