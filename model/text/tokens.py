"""Tokenized text on disk: one memory-mapped array of ids per split, and the windows that a model trains on.

An end-of-text token follows each document. The bytes of every token are stored beside the ids, so that a loss in nats
per token converts to exact bits per byte: the writer checks that byte counts sum to the bytes of the split. Memory
holds a few batches of documents and 8 bytes per document.
"""

import io
import json
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from model.errors import PipelineError, full_disk_as_error
from model.logits import IGNORE_INDEX
from model.progress import Log, Progress, silent
from model.settings import TokenizerSettings
from model.system.cpu import limit_threads, usable_cores
from model.text.chat import response_start
from model.text.corpus import CorpusSummary, read_documents, read_summary
from model.text.tokenizer import SPECIALS, FastEncoder, even_sample, token_bytes, train_tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
MOST_COMMON = 20
_Positions = npt.NDArray[np.int64]
# Timings differ between runs, so they are left out of the files: same input, same bytes.
TIMINGS = ("tokenizer_training_seconds", "tokens_per_second")


@dataclass
class TokenizedDatasetSummary:
    """Statistics of a tokenized dataset; `summary.json` has them, except the two timings.

    Tokens include one end-of-text token per document. bytes_per_token: compression over both splits.
    windows: whole windows of sequence_length tokens. cut_prompts, cut_responses: conversations longer than a window,
    and those whose response does not fit either (`TokenDataset` has the rule). most_common: id, token, count and share
    in the train split.
    """

    kind: str
    vocab_size: int
    sequence_length: int
    dtype: str
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int
    train_bytes: int
    validation_bytes: int
    train_windows: int
    validation_windows: int
    bytes_per_token: float
    train_cut_prompts: int = 0
    train_cut_responses: int = 0
    validation_cut_prompts: int = 0
    validation_cut_responses: int = 0
    most_common: list[dict[str, Any]] = field(default_factory=list)
    tokenizer_training_seconds: float = 0.0
    tokens_per_second: float = 0.0


@dataclass
class SplitTokens:
    """What `encode_split` wrote. counts: how often each id occurs, shape (V,).

    document_offsets: start of each document, and the end; responses: start of each one's response, its own start where
    the documents are no conversations.
    """

    counts: npt.NDArray[np.int64]
    document_offsets: npt.NDArray[np.int64]
    responses: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.document_offsets[-1])

    @property
    def documents(self) -> int:
        """Documents."""
        return len(self.document_offsets) - 1

    def cut(self, sequence_length: int) -> tuple[int, int]:
        """How many conversations a window cuts in their prompt, and how many in their response (and its end)."""
        starts, ends = self.document_offsets[:-1], self.document_offsets[1:]
        firsts = _first_tokens(starts, self.responses, ends, sequence_length)
        return int((firsts > starts).sum()), int((ends - firsts > sequence_length).sum())


def build_tokenized_dataset(
    settings: TokenizerSettings, corpus_dir: Path, output_dir: Path, *, log: Log = silent
) -> TokenizedDatasetSummary:
    """Train the tokenizer on the train split of `corpus_dir` and write both splits as token ids to `output_dir`.

    Writes `tokenizer/`, `{split}.bin` (uint16 up to 65,536 tokens, else uint32), `{split}.documents.npy` (int64 start
    of each document, and the end), `token_bytes.npy` (uint8, all tokens' bytes in a row), `byte_counts.npy` (int64,
    shape (V,)) and `summary.json`.
    Raises PipelineError for a missing or damaged corpus, a vocabulary larger than the text allows, a split shorter than
    one window and a full disk.
    """
    limit_threads()
    corpus = read_summary(corpus_dir)
    started = time.perf_counter()
    texts = read_documents(corpus_dir, "train")
    # A character vocabulary needs every character of the train split; merges are as good from a sample.
    wanted = settings.training_bytes if settings.kind == "bpe" else 0
    log(f"tokenizer: training ({settings.kind}) on {min(wanted or corpus.train_bytes, corpus.train_bytes):,} bytes")
    tokenizer = train_tokenizer(settings, even_sample(texts, corpus.train_bytes, wanted), log=log)
    training_seconds = time.perf_counter() - started

    bytes_by_id = token_bytes(tokenizer)
    byte_counts = np.array([len(data) for data in bytes_by_id], np.int64)
    dtype = np.dtype(np.uint16 if len(bytes_by_id) <= 65_536 else np.uint32)
    encoder = FastEncoder(tokenizer)
    splits: dict[str, SplitTokens] = {}
    with full_disk_as_error(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(output_dir / "tokenizer")
        _save(output_dir / "token_bytes.npy", np.frombuffer(b"".join(bytes_by_id), np.uint8))
        _save(output_dir / "byte_counts.npy", byte_counts)
        started = time.perf_counter()
        for split in ("validation", "train"):  # validation first: it is the one that may be too short
            texts = read_documents(corpus_dir, split)
            total = getattr(corpus, f"{split}_documents")
            stem, end = output_dir / split, tokenizer.eos_token_id
            splits[split] = encode_split(
                encoder, texts, stem, end, len(bytes_by_id), dtype, total, log, conversations=settings.chat
            )
            _check_split(split, splits[split], byte_counts, settings, corpus, corpus_dir)
        encoding_seconds = time.perf_counter() - started
        train, validation = splits["train"], splits["validation"]
        cut = {split: splits[split].cut(settings.sequence_length) if settings.chat else (0, 0) for split in splits}
        summary = TokenizedDatasetSummary(
            kind=settings.kind,
            vocab_size=len(bytes_by_id),
            sequence_length=settings.sequence_length,
            dtype=dtype.name,
            train_tokens=train.tokens,
            validation_tokens=validation.tokens,
            train_documents=train.documents,
            validation_documents=validation.documents,
            train_bytes=corpus.train_bytes,
            validation_bytes=corpus.validation_bytes,
            train_windows=count_windows(train.tokens, settings.sequence_length),
            validation_windows=count_windows(validation.tokens, settings.sequence_length),
            bytes_per_token=corpus.bytes / (train.tokens + validation.tokens),
            train_cut_prompts=cut["train"][0],
            train_cut_responses=cut["train"][1],
            validation_cut_prompts=cut["validation"][0],
            validation_cut_responses=cut["validation"][1],
            most_common=_most_common(train.counts, bytes_by_id),
            tokenizer_training_seconds=training_seconds,
            tokens_per_second=(train.tokens + validation.tokens) / encoding_seconds,
        )
        on_disk = {name: value for name, value in asdict(summary).items() if name not in TIMINGS}
        text = json.dumps(on_disk, indent=2, ensure_ascii=False)
        (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    for split, (prompts, responses) in cut.items():
        if prompts or responses:
            log(
                f"tokens: of {splits[split].documents:,} conversations of the {split} split, a window of "
                f"{settings.sequence_length:,} tokens cuts the start of {prompts:,} prompts and the end of "
                f"{responses:,} responses: raise tokenizer.sequence_length to keep them whole"
            )
    log(
        f"tokens: {train.tokens:,} train, {validation.tokens:,} validation, "
        f"{summary.bytes_per_token:.2f} bytes each, {summary.tokens_per_second:,.0f} tokens/s"
    )
    return summary


def encode_split(
    encoder: FastEncoder,
    texts: Iterable[str],
    stem: Path,
    end_of_text: int,
    vocab_size: int,
    dtype: npt.DTypeLike,
    total_documents: int | None = None,
    log: Log = silent,
    *,
    conversations: bool = False,
) -> SplitTokens:
    """Encode documents on all cores and write `{stem}.bin` and `{stem}.documents.npy`, in the order of `texts`.

    conversations: documents have the form of `model/text/chat.py`; prompt and response are encoded separately, as at
    inference, and `{stem}.responses.npy` (int64) has the token at which each response starts.
    Raises PipelineError for a document that is not a conversation.
    """
    progress = Progress(log, f"encoding {stem.name}", total_documents, "documents")
    offsets, responses = array("q", [0]), array("q")
    counts = np.zeros(vocab_size, np.int64)

    def encode(batch: list[str]) -> tuple[npt.NDArray[Any], list[int], list[int]]:
        parts, lengths, prompts = [], [], []
        for text in batch:
            start = _response_start(text) if conversations else 0
            prompt, ids = encoder.encode(text[:start]), encoder.encode(text[start:])
            parts += [prompt, ids, end]
            lengths.append(len(prompt) + len(ids) + 1)
            prompts.append(len(prompt))
        return np.concatenate(parts).astype(dtype), lengths, prompts

    def write(future: Future[tuple[npt.NDArray[Any], list[int], list[int]]], file: BinaryIO) -> None:
        ids, lengths, prompts = future.result()
        file.write(ids.data)
        np.add(counts, np.bincount(ids, minlength=vocab_size), out=counts)
        for length, prompt in zip(lengths, prompts, strict=True):
            responses.append(offsets[-1] + prompt)
            offsets.append(offsets[-1] + length)
        progress.advance(len(lengths))

    end = np.array([end_of_text], np.uint32)
    workers = usable_cores()
    pending: deque[Future[tuple[npt.NDArray[Any], list[int], list[int]]]] = deque()
    with stem.with_name(f"{stem.name}.bin").open("wb") as file, ThreadPoolExecutor(workers) as pool:
        for batch in _batches(texts):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:  # bounds the memory
                write(pending.popleft(), file)
        while pending:
            write(pending.popleft(), file)
    _save(stem.with_name(f"{stem.name}.documents.npy"), np.frombuffer(offsets, np.int64))
    if conversations:
        _save(stem.with_name(f"{stem.name}.responses.npy"), np.frombuffer(responses, np.int64))
    return SplitTokens(counts, np.array(offsets, np.int64), np.array(responses, np.int64))


def _response_start(text: str) -> int:
    try:
        return response_start(text)
    except ValueError as error:
        raise PipelineError(
            f"tokenizer.chat is true, but a document of the corpus is {error} ({text[:40]!r}...): expected prompts and "
            "responses, set corpus.response_field"
        ) from error


def count_windows(tokens: int, sequence_length: int) -> int:
    """Whole windows of `sequence_length` in `tokens`, each starting on the last token of the one before."""
    return max((tokens - 1) // (sequence_length - 1), 0)


class TokenDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One split as windows of T tokens with stride T - 1.

    Item i is {"input_ids": int64 (T,), "labels": the same}; the model shifts labels itself. Neighbors share one token,
    so every token of the windows but the first is predicted exactly once; up to T - 2 tokens at the end are left out.
    Conversations (`responses`, the token at which each document's response starts; None for other text) are packed
    whole: a window starts with one and takes as many as fit, and labels are IGNORE_INDEX wherever no response of those
    is: only what the assistant says is learned, its end-of-text token included. One longer than T loses the start of
    its prompt, so that its response is whole; a response longer than three quarters of T, after a prompt of more than
    a quarter, keeps that quarter and loses its own end. tokens: memory-mapped ids, shape (N,). byte_counts: bytes each
    id stands for, 0 for specials, shape (V,). document_offsets: start of each document in `tokens`, and the end.
    """

    def __init__(self, dataset_dir: Path, split: str, sequence_length: int) -> None:
        """Raises PipelineError where the split is missing or shorter than one window."""
        path = dataset_dir / f"{split}.bin"
        if not path.is_file():
            raise PipelineError(f"no {path.name} in {dataset_dir}: expected a tokenized dataset; make it again")
        self._arguments = (dataset_dir, split, sequence_length)
        self.sequence_length = sequence_length
        self.byte_counts = np.load(dataset_dir / "byte_counts.npy")
        self.document_offsets = np.load(dataset_dir / f"{split}.documents.npy")
        all_bytes = np.load(dataset_dir / "token_bytes.npy").tobytes()
        ends = np.cumsum(self.byte_counts)
        self._token_bytes = [all_bytes[end - size : end] for end, size in zip(ends, self.byte_counts, strict=True)]
        dtype = np.uint16 if len(self.byte_counts) <= 65_536 else np.uint32
        self.tokens = np.memmap(path, dtype, "r")
        if len(self.tokens) < sequence_length:
            raise PipelineError(_too_short(split, len(self.tokens), sequence_length))
        responses = dataset_dir / f"{split}.responses.npy"
        self.responses = np.load(responses) if responses.is_file() else None
        self._first_documents = None if self.responses is None else _packed(self.document_offsets, sequence_length)

    def __len__(self) -> int:
        if self._first_documents is not None:
            return len(self._first_documents) - 1
        return count_windows(len(self.tokens), self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        if self._first_documents is not None:
            return self._conversations(index % len(self))
        start = index % len(self) * (self.sequence_length - 1)
        ids_T = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": ids_T, "labels": ids_T.clone()}

    def documents(self, index: int) -> range:
        """The conversations in window `index`."""
        assert self._first_documents is not None
        first, beyond = self._first_documents[index : index + 2]
        return range(int(first), int(beyond))

    def _conversations(self, index: int) -> dict[str, torch.Tensor]:
        assert self.responses is not None
        documents = self.documents(index)
        first = documents[0]
        start, end = self.document_offsets[first], self.document_offsets[first + 1]
        start = int(_first_tokens(start, self.responses[first], end, self.sequence_length))
        ids_T = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        labels_T = torch.full_like(ids_T, IGNORE_INDEX)
        for document in documents:
            low, high = self.responses[document] - start, self.document_offsets[document + 1] - start
            labels_T[low:high] = ids_T[low:high]
        # The last window may pass the end of the split: padding that no label covers.
        missing = self.sequence_length - len(ids_T)
        pad = torch.nn.functional.pad
        return {"input_ids": pad(ids_T, (0, missing)), "labels": pad(labels_T, (0, missing), value=IGNORE_INDEX)}

    def __reduce__(self) -> tuple[type["TokenDataset"], tuple[Path, str, int]]:
        # A worker process opens the files again; pickling the map would send it the whole split.
        return TokenDataset, self._arguments

    def text_bytes(self, start: int, stop: int) -> bytes:
        """The exact text bytes of tokens `start` to `stop`."""
        return self.bytes_of(self.tokens[start:stop])

    def bytes_of(self, ids_T: npt.NDArray[np.integer]) -> bytes:
        """The exact text bytes of these ids."""
        return b"".join(self._token_bytes[number] for number in ids_T)


def _first_tokens(start: _Positions, response: _Positions, end: _Positions, sequence_length: int) -> _Positions:
    """The first token of a conversation that its own window shows: its start where it fits, else see TokenDataset."""
    return np.maximum(start, np.minimum(end - sequence_length, response - sequence_length // 4))


def _packed(offsets: npt.NDArray[np.int64], sequence_length: int) -> npt.NDArray[np.int64]:
    """First document of each window, and the number of documents: as many whole ones as fit, at least one."""
    firsts, first = [0], 0
    while first < len(offsets) - 1:
        beyond = int(np.searchsorted(offsets, offsets[first] + sequence_length, side="right")) - 1
        first = max(beyond, first + 1)
        firsts.append(first)
    return np.array(firsts, np.int64)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_split(
    split: str,
    found: SplitTokens,
    byte_counts: npt.NDArray[np.int64],
    settings: TokenizerSettings,
    corpus: CorpusSummary,
    corpus_dir: Path,
) -> None:
    encoded, expected = int(found.counts @ byte_counts), getattr(corpus, f"{split}_bytes")
    if encoded != expected:
        raise PipelineError(
            f"the {split} split's tokens stand for {encoded:,} bytes, {corpus_dir / 'summary.json'} says {expected:,}: "
            "expected the same; make the corpus again"
        )
    if found.tokens < settings.sequence_length:
        raise PipelineError(_too_short(split, found.tokens, settings.sequence_length))


def _too_short(split: str, found: int, needed: int) -> str:
    more = "raise corpus.validation_fraction" if split == "validation" else "lower corpus.validation_fraction"
    return (
        f"the {split} split has {found:,} tokens, one window needs {needed:,} (tokenizer.sequence_length): add text, "
        f"{more} or lower tokenizer.sequence_length"
    )


def _most_common(counts: npt.NDArray[np.int64], bytes_by_id: list[bytes]) -> list[dict[str, Any]]:
    order = np.argsort(-counts, kind="stable")[:MOST_COMMON]
    total = int(counts.sum())
    return [
        {
            "id": int(number),
            "token": bytes_by_id[number].decode("utf-8", "backslashreplace") or SPECIALS[number],
            "count": int(counts[number]),
            "share": float(counts[number] / total),
        }
        for number in order
        if counts[number]
    ]


def _save(path: Path, values: npt.NDArray[Any]) -> None:
    # Through memory: np.save straight to a file reports a full disk without its errno.
    buffer = io.BytesIO()
    np.save(buffer, values)
    path.write_bytes(buffer.getbuffer())
