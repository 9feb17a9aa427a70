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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from model.errors import PipelineError, limits_as_error
from model.logits import IGNORE_INDEX
from model.progress import Log, Progress, silent
from model.settings import TokenizerSettings
from model.system.cpu import limit_threads, usable_cores
from model.text.chat.template import ChatEncoder, EncodedConversation, turns_of
from model.text.corpus import CorpusSummary, read_documents, read_summary
from model.text.mixture import SplitSources, read_sources, write_sources
from model.text.tokenizer import FastEncoder, even_sample, token_bytes, train_tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
MAX_COMMON = 20
# Timings differ between runs, so they are left out of the files: same input, same bytes.
TIMINGS = ("tokenizer_training_seconds", "tokens_per_second")
# Of conversations alone: other datasets keep the bytes that they had.
OF_TURNS = ("train_cut_turns", "train_unanswered", "validation_cut_turns", "validation_unanswered")


@dataclass
class TokenizedDatasetSummary:
    """Statistics of a tokenized dataset; `summary.json` has them, except the two timings.

    Tokens include one end-of-text token per document. bytes_per_token: compression over both splits.
    windows: whole windows of sequence_length tokens. cut_turns, cut_prompts, cut_responses: conversations longer than
    a window that lose earlier turns, the start of a prompt, the end of a response (`ChatEncoder` has the rule).
    unanswered: conversations without a turn of the assistant, left out. Bytes of conversations are those of the turns'
    texts that are kept. most_common: id, token, count and share in the train split.
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
    train_cut_turns: int = 0
    train_cut_prompts: int = 0
    train_cut_responses: int = 0
    train_unanswered: int = 0
    validation_cut_turns: int = 0
    validation_cut_prompts: int = 0
    validation_cut_responses: int = 0
    validation_unanswered: int = 0
    most_common: list[dict[str, Any]] = field(default_factory=list)
    tokenizer_training_seconds: float = 0.0
    tokens_per_second: float = 0.0


@dataclass
class SplitTokens:
    """Results of `encode_split`. counts: how often each id occurs, shape (V,).

    document_offsets: start of each document, and the end. The others count conversations, as the summary does.
    """

    counts: npt.NDArray[np.int64]
    document_offsets: npt.NDArray[np.int64]
    cut_turns: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    unanswered: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.document_offsets[-1])

    @property
    def documents(self) -> int:
        """Documents."""
        return len(self.document_offsets) - 1


def build_tokenized_dataset(
    settings: TokenizerSettings,
    corpus_dir: Path,
    output_dir: Path,
    *,
    log: Log = silent,
    encode: Callable[..., SplitTokens] | None = None,
) -> TokenizedDatasetSummary:
    """Train the tokenizer on the train split of `corpus_dir` and write both splits as token ids to `output_dir`.

    Writes `tokenizer/`, `{split}.bin` (uint16 up to 65,536 tokens, else uint32), `{split}.documents.npy` (int64 start
    of each document, and the end), `token_bytes.npy` (uint8, all tokens' bytes in a row), `byte_counts.npy` (int64,
    shape (V,)) and `summary.json`.
    encode: encodes a split by another way with the same result (`shards.by_shards`).
    Raises PipelineError for a missing or damaged corpus, a vocabulary larger than the text allows, a split shorter than
    one window and a full disk.
    """
    limit_threads()
    corpus = read_summary(corpus_dir)
    started = time.perf_counter()
    texts = read_documents(corpus_dir, "train")
    if settings.chat:
        texts = (turn.content for text in texts for turn in turns_of(text))
    # A character vocabulary needs every character of the train split; merges are as good from a sample.
    wanted = settings.training_bytes if settings.kind == "bpe" else 0
    log(f"tokenizer: training ({settings.kind}) on {min(wanted or corpus.train_bytes, corpus.train_bytes):,} bytes")
    tokenizer = train_tokenizer(settings, even_sample(texts, corpus.train_bytes, wanted), log=log)
    training_seconds = time.perf_counter() - started

    bytes_by_id = token_bytes(tokenizer)
    byte_counts = np.array([len(data) for data in bytes_by_id], np.int64)
    dtype = np.dtype(np.uint16 if len(bytes_by_id) <= 65_536 else np.uint32)
    encoder = FastEncoder(tokenizer)
    chat = ChatEncoder(tokenizer, encoder.encode, settings.sequence_length) if settings.chat else None
    splits: dict[str, SplitTokens] = {}
    with limits_as_error(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(output_dir / "tokenizer")
        save_array(output_dir / "token_bytes.npy", np.frombuffer(b"".join(bytes_by_id), np.uint8))
        save_array(output_dir / "byte_counts.npy", byte_counts)
        started = time.perf_counter()
        for split in ("validation", "train"):  # validation first: it is the one that may be too short
            if encode is not None:
                splits[split] = encode(corpus_dir, split, output_dir, len(bytes_by_id), dtype, settings, log)
            else:
                texts = read_documents(corpus_dir, split)
                total = getattr(corpus, f"{split}_documents")
                stem, end = output_dir / split, tokenizer.eos_token_id
                splits[split] = encode_split(encoder, texts, stem, end, len(bytes_by_id), dtype, total, log, chat=chat)
            _check_split(split, splits[split], byte_counts, settings, corpus, corpus_dir)
            if corpus.mixture:
                documents = _documents_of_sources(corpus, corpus_dir, split, settings.chat)
                path, offsets = output_dir / f"{split}.sources.json", splits[split].document_offsets
                write_sources(path, list(corpus.mixture), documents, offsets)
        encoding_seconds = time.perf_counter() - started
        train, validation = splits["train"], splits["validation"]
        train_bytes, validation_bytes = (int(found.counts @ byte_counts) for found in (train, validation))
        summary = TokenizedDatasetSummary(
            kind=settings.kind,
            vocab_size=len(bytes_by_id),
            sequence_length=settings.sequence_length,
            dtype=dtype.name,
            train_tokens=train.tokens,
            validation_tokens=validation.tokens,
            train_documents=train.documents,
            validation_documents=validation.documents,
            train_bytes=train_bytes,
            validation_bytes=validation_bytes,
            train_windows=count_windows(train.tokens, settings.sequence_length),
            validation_windows=count_windows(validation.tokens, settings.sequence_length),
            bytes_per_token=(train_bytes + validation_bytes) / (train.tokens + validation.tokens),
            train_cut_turns=train.cut_turns,
            train_cut_prompts=train.cut_prompts,
            train_cut_responses=train.cut_responses,
            train_unanswered=train.unanswered,
            validation_cut_turns=validation.cut_turns,
            validation_cut_prompts=validation.cut_prompts,
            validation_cut_responses=validation.cut_responses,
            validation_unanswered=validation.unanswered,
            most_common=_most_common(train.counts, bytes_by_id, tokenizer),
            tokenizer_training_seconds=training_seconds,
            tokens_per_second=(train.tokens + validation.tokens) / encoding_seconds,
        )
        hidden = TIMINGS if settings.chat else (*TIMINGS, *OF_TURNS)
        on_disk = {name: value for name, value in asdict(summary).items() if name not in hidden}
        text = json.dumps(on_disk, indent=2, ensure_ascii=False)
        (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    for split, found in splits.items():
        if found.cut_turns or found.cut_prompts or found.cut_responses:
            log(
                f"tokens: of {found.documents:,} conversations of the {split} split, a window of "
                f"{settings.sequence_length:,} tokens cuts the start of {found.cut_prompts:,} prompts and the end of "
                f"{found.cut_responses:,} responses, and {found.cut_turns:,} lose earlier turns: raise "
                "tokenizer.sequence_length to keep them whole"
            )
        if found.unanswered:
            log(
                f"tokens: left out {found.unanswered:,} conversations of the {split} split in which the assistant has "
                "no turn"
            )
    log(
        f"tokens: {train.tokens:,} train, {validation.tokens:,} validation, "
        f"{summary.bytes_per_token:.2f} bytes each, {summary.tokens_per_second:,.0f} tokens/s"
    )
    return summary


def _documents_of_sources(corpus: CorpusSummary, corpus_dir: Path, split: str, chat: bool) -> list[int]:
    """Encoded documents of each source of a mixture; of conversations, those in which the assistant has a turn."""
    documents = [counts[f"{split}_documents"] for counts in corpus.mixture.values()]
    if not chat or not sum(documents):
        return documents
    texts = read_documents(corpus_dir, split)
    has_answer = (any(turn.role == "assistant" for turn in turns_of(text)) for text in texts)
    return [sum(islice(has_answer, count)) for count in documents]


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
    chat: ChatEncoder | None = None,
    threads: int | None = None,
) -> SplitTokens:
    """Encode documents and write `{stem}.bin` and `{stem}.documents.npy`, in the order of `texts`.

    threads: that encode; None: one for each core. chat: documents are conversations, and `{stem}.responses.npy` (int64,
    shape (answers, 2)) has the tokens at which each answer starts and after which it ends.
    Raises PipelineError for a document that is not a conversation.
    """
    progress = Progress(log, f"encoding {stem.name}", total_documents, "documents")
    offsets, responses = array("q", [0]), array("q")
    counts = np.zeros(vocab_size, np.int64)
    cut_turns = cut_prompts = cut_responses = unanswered = 0

    def encode(batch: list[str]) -> list[EncodedConversation | None]:
        if chat:
            return [chat.encode(turns_of(text)) for text in batch]
        return [EncodedConversation(np.concatenate([encoder.encode(text), end]), []) for text in batch]

    def write(future: Future[list[EncodedConversation | None]], file: BinaryIO) -> None:
        nonlocal cut_turns, cut_prompts, cut_responses, unanswered
        encoded = future.result()
        kept = [one for one in encoded if one]
        ids = np.concatenate([end[:0], *(one.ids for one in kept)]).astype(dtype)
        file.write(ids.data)
        np.add(counts, np.bincount(ids, minlength=vocab_size), out=counts)
        for one in kept:
            responses.extend(offsets[-1] + bound for bounds in one.answers for bound in bounds)
            offsets.append(offsets[-1] + len(one.ids))
        cut_turns += sum(one.cuts_turns for one in kept)
        cut_prompts += sum(one.cuts_prompt for one in kept)
        cut_responses += sum(one.cuts_response for one in kept)
        unanswered += len(encoded) - len(kept)
        progress.advance(len(encoded))

    end = np.array([end_of_text], np.uint32)
    workers = threads or usable_cores()
    pending: deque[Future[list[EncodedConversation | None]]] = deque()
    with stem.with_name(f"{stem.name}.bin").open("wb") as file, ThreadPoolExecutor(workers) as pool:
        for batch in _batches(texts):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:  # bounds the memory
                write(pending.popleft(), file)
        while pending:
            write(pending.popleft(), file)
    save_array(stem.with_name(f"{stem.name}.documents.npy"), np.frombuffer(offsets, np.int64))
    if chat:
        save_array(stem.with_name(f"{stem.name}.responses.npy"), np.frombuffer(responses, np.int64).reshape(-1, 2))
    return SplitTokens(counts, np.array(offsets, np.int64), cut_turns, cut_prompts, cut_responses, unanswered)


def count_windows(tokens: int, sequence_length: int) -> int:
    """Whole windows of `sequence_length` in `tokens`, each starting on the last token of the one before."""
    return max((tokens - 1) // (sequence_length - 1), 0)


class TokenDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One split as windows of T tokens with stride T - 1.

    Item i is {"input_ids": int64 (T,), "labels": the same}; the model shifts labels itself. Neighbors share one token,
    so every token of the windows but the first is predicted exactly once; up to T - 2 tokens at the end are left out.
    Conversations (`responses`, the tokens at which each answer starts and after which it ends, shape (answers, 2); None
    for other text) are packed whole: a window starts with one and takes as many as fit, and labels are IGNORE_INDEX
    wherever no answer is: only what the assistant says is learned, its end-of-text token included. None is longer than
    the window that `ChatEncoder` cut it for.
    tokens: memory-mapped ids, shape (N,). byte_counts: bytes each
    id stands for, 0 for specials, shape (V,). document_offsets: start of each document in `tokens`, and the end.
    """

    def __init__(self, dataset_dir: Path, split: str, sequence_length: int) -> None:
        """Raises PipelineError if the split is missing or shorter than one window."""
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
        if self.responses is not None and self.responses.ndim != 2:
            raise PipelineError(f"{responses} has one answer for each conversation: make the tokenized dataset again")
        self._first_documents = None if self.responses is None else _packed(self.document_offsets, sequence_length)
        self.sources: SplitSources | None = read_sources(dataset_dir / f"{split}.sources.json")
        """The sources of a mixture; None for other text."""

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

    def window_sources(self) -> npt.NDArray[np.int64]:
        """Of a mixture, the index of each window's source, which is that of its first token, shape (windows,)."""
        assert self.sources is not None
        if self._first_documents is not None:
            return self.sources.of_tokens(self.document_offsets[self._first_documents[:-1]])
        return self.sources.of_tokens(np.arange(len(self)) * (self.sequence_length - 1))

    def documents(self, index: int) -> range:
        """The conversations in window `index`."""
        assert self._first_documents is not None
        first, beyond = self._first_documents[index : index + 2]
        return range(int(first), int(beyond))

    def _conversations(self, index: int) -> dict[str, torch.Tensor]:
        assert self.responses is not None
        documents = self.documents(index)
        start, end = int(self.document_offsets[documents[0]]), self.document_offsets[documents[-1] + 1]
        ids_T = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        labels_T = torch.full_like(ids_T, IGNORE_INDEX)
        first, beyond = np.searchsorted(self.responses[:, 0], [start, end])
        for low, high in self.responses[first:beyond] - start:
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
    # A corpus counts the bytes of a conversation as JSON, and a window may cut it.
    if not settings.chat and encoded != expected:
        raise PipelineError(
            f"the {split} split's tokens stand for {encoded:,} bytes, {corpus_dir / 'summary.json'} says {expected:,}: "
            "expected the same; make the corpus again, or take a tokenizer that leaves text as it is (a normalizer "
            "rewrites some, a prefix space adds bytes)"
        )
    if found.tokens < settings.sequence_length:
        raise PipelineError(_too_short(split, found.tokens, settings.sequence_length))


def _too_short(split: str, found: int, needed: int) -> str:
    more = "raise corpus.validation_fraction" if split == "validation" else "lower corpus.validation_fraction"
    return (
        f"the {split} split has {found:,} tokens, one window needs {needed:,} (tokenizer.sequence_length): add text, "
        f"{more} or lower tokenizer.sequence_length"
    )


def _most_common(
    counts: npt.NDArray[np.int64], bytes_by_id: list[bytes], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, Any]]:
    order = np.argsort(-counts, kind="stable")[:MAX_COMMON]
    total = int(counts.sum())
    names = tokenizer.convert_ids_to_tokens(order.tolist())
    return [
        {
            "id": int(number),
            "token": bytes_by_id[number].decode("utf-8", "backslashreplace") or name,
            "count": int(counts[number]),
            "share": float(counts[number] / total),
        }
        for number, name in zip(order, names, strict=True)
        if counts[number]
    ]


def save_array(path: Path, values: npt.NDArray[Any]) -> None:
    """Write a .npy file."""
    # Through memory: np.save straight to a file reports a full disk without its errno.
    buffer = io.BytesIO()
    np.save(buffer, values)
    path.write_bytes(buffer.getbuffer())
