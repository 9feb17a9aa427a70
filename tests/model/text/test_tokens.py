import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import PipelineError
from model.settings import CorpusSettings, TokenizerSettings
from model.text.chat.template import MARKS
from model.text.corpus import SPLITS, build_corpus, read_documents
from model.text.tokenizer import FastEncoder, load_tokenizer
from model.text.tokens import TokenDataset, TokenizedDatasetSummary, build_tokenized_dataset, count_windows

KINDS = ("bpe", "char")
LENGTH = 64


def settings_of(kind: str, **options: object) -> TokenizerSettings:
    return TokenizerSettings(**({"kind": kind, "vocab_size": 400, "sequence_length": LENGTH} | options))


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [
        f"Zeile {n}: naïve café <|endoftext|> 東京 😀{chr(0x3400 + n)} " + f"{n * n} words\n" * 9 for n in range(300)
    ]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus(CorpusSettings(source="files", paths=[str(path)], shard_bytes=20_000), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def built(
    corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, TokenizedDatasetSummary]]:
    folder = tmp_path_factory.mktemp("tokens")
    return {
        kind: (folder / kind, build_tokenized_dataset(settings_of(kind), corpus_dir, folder / kind)) for kind in KINDS
    }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_byte_counts_sum_to_the_corpus_and_the_bytes_come_back(kind, split, built, corpus_dir) -> None:
    dataset = TokenDataset(built[kind][0], split, LENGTH)
    text = "".join(read_documents(corpus_dir, split)).encode()
    assert dataset.byte_counts[dataset.tokens].sum() == len(text) == getattr(built[kind][1], f"{split}_bytes")
    assert dataset.text_bytes(0, len(dataset.tokens)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_each_document_lies_between_its_offsets_and_ends_with_end_of_text(kind, built, corpus_dir) -> None:
    dataset = TokenDataset(built[kind][0], "train", LENGTH)
    documents = list(read_documents(corpus_dir, "train"))
    offsets = dataset.document_offsets
    assert offsets[0] == 0 and offsets[-1] == len(dataset.tokens) and len(offsets) == len(documents) + 1
    for number, text in enumerate(documents):
        start, stop = offsets[number], offsets[number + 1]
        assert dataset.text_bytes(start, stop) == text.encode()
        assert np.flatnonzero(dataset.tokens[start:stop] == 0).tolist() == [stop - start - 1]


def test_windows_predict_every_token_but_the_first_exactly_once(built) -> None:
    dataset = TokenDataset(built["bpe"][0], "validation", LENGTH)
    predicted = torch.cat([dataset[index]["input_ids"][1:] for index in range(len(dataset))])
    expected = torch.from_numpy(dataset.tokens[1 : len(predicted) + 1].astype(np.int64))
    assert torch.equal(predicted, expected)
    assert 0 <= len(dataset.tokens) - 1 - len(predicted) < LENGTH - 1
    for index in (0, len(dataset) - 1, -1):
        item = dataset[index]
        assert item["input_ids"].shape == (LENGTH,) and item["input_ids"].dtype == torch.int64
        assert torch.equal(item["input_ids"], item["labels"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_the_number_of_windows_is_exact_at_its_edges() -> None:
    assert [count_windows(tokens, 8) for tokens in (0, 1, 7, 8, 14, 15, 21, 22)] == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_data_set_sent_to_a_worker_reopens_its_files(built) -> None:
    dataset = TokenDataset(built["bpe"][0], "train", LENGTH)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)[3]["input_ids"], dataset[3]["input_ids"])


def test_the_summary_counts_what_is_on_disk(built) -> None:
    for kind, (folder, summary) in built.items():
        on_disk = TokenizedDatasetSummary(**json.loads((folder / "summary.json").read_text()))
        timings = {"tokenizer_training_seconds": 0.0, "tokens_per_second": 0.0}
        assert asdict(on_disk) == asdict(summary) | timings
        assert summary.tokenizer_training_seconds > 0 and summary.tokens_per_second > 0
        assert summary.dtype == "uint16" and summary.vocab_size == len(load_tokenizer(folder / "tokenizer"))
        for split in SPLITS:
            dataset = TokenDataset(folder, split, LENGTH)
            assert getattr(summary, f"{split}_tokens") == len(dataset.tokens)
            assert getattr(summary, f"{split}_windows") == len(dataset)
            assert getattr(summary, f"{split}_documents") == len(dataset.document_offsets) - 1
        train = np.fromfile(folder / "train.bin", np.uint16)
        top = summary.most_common[0]
        assert top["count"] == np.bincount(train).max() == (train == top["id"]).sum(), kind
        assert len(summary.most_common) == 20
        tokens = summary.train_tokens + summary.validation_tokens
        assert summary.bytes_per_token == (summary.train_bytes + summary.validation_bytes) / tokens


def test_the_ids_are_those_of_the_shipped_tokenizer(built, corpus_dir) -> None:
    for folder, _ in built.values():
        tokenizer = load_tokenizer(folder / "tokenizer")
        ids: list[int] = []
        for text in read_documents(corpus_dir, "validation"):
            ids += [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
        assert TokenDataset(folder, "validation", LENGTH).tokens.tolist() == ids


def test_characters_seen_only_in_validation_become_bytes(built, corpus_dir) -> None:
    train = set("".join(read_documents(corpus_dir, "train")))
    unseen = set("".join(read_documents(corpus_dir, "validation"))) - train
    assert unseen
    encoder = FastEncoder(load_tokenizer(built["char"][0] / "tokenizer"))
    assert all(len(encoder.encode(character)) == 3 for character in unseen)


def test_the_same_corpus_gives_the_same_bytes_on_disk(built, corpus_dir, tmp_path: Path) -> None:
    for kind, (folder, _) in built.items():
        build_tokenized_dataset(settings_of(kind), corpus_dir, tmp_path / kind)
        first, second = (
            {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
            for root in (folder, tmp_path / kind)
        )
        assert first == second
        assert {"train.bin", "validation.bin", "tokenizer/tokenizer.json", "token_bytes.npy"} <= set(first)


def test_more_than_65536_tokens_are_written_as_uint32(tmp_path: Path) -> None:
    characters = [chr(code) for code in range(0x3400, 0x3400 + 66_000)]
    characters = [c for c in characters if not 0xD800 <= ord(c) < 0xE000] + [chr(0x20000 + n) for n in range(3000)]
    path = tmp_path / "in.txt"
    path.write_text("".join(characters) + "\n" + "".join(characters[-3000:]))
    corpus = CorpusSettings(source="files", paths=[str(path)], split_by="position", validation_fraction=0.02)
    build_corpus(corpus, tmp_path / "corpus")
    summary = build_tokenized_dataset(settings_of("char"), tmp_path / "corpus", tmp_path / "out")
    assert summary.dtype == "uint32" and summary.vocab_size > 65_536
    dataset = TokenDataset(tmp_path / "out", "train", LENGTH)
    assert dataset.tokens.max() == summary.vocab_size - 1
    assert dataset.text_bytes(0, len(dataset.tokens)) == "".join(read_documents(tmp_path / "corpus", "train")).encode()


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_shorter_than_a_window_says_how_short_and_what_to_do(split, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{n} line of text\n" for n in range(200)))
    fraction = 0.004 if split == "validation" else 0.996
    corpus = CorpusSettings(source="files", paths=[str(path)], split_by="position", validation_fraction=fraction)
    found = build_corpus(corpus, tmp_path / "corpus")
    tokens = getattr(found, f"{split}_bytes") + 1
    message = rf"the {split} split has {tokens} tokens, one window needs 64 \(tokenizer\.sequence_length\): add text, "
    with pytest.raises(PipelineError, match=message):
        build_tokenized_dataset(settings_of("char"), tmp_path / "corpus", tmp_path / "out")


def test_a_window_longer_than_the_split_is_refused_when_read(built) -> None:
    with pytest.raises(PipelineError, match=r"one window needs 10,000,000"):
        TokenDataset(built["bpe"][0], "train", 10_000_000)


def test_missing_and_damaged_input_is_named(built, corpus_dir, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no train\.bin in "):
        TokenDataset(tmp_path, "train", LENGTH)
    with pytest.raises(PipelineError, match=r"no summary\.json in .*expected a corpus"):
        build_tokenized_dataset(settings_of("bpe"), tmp_path, tmp_path / "out")
    damaged = shutil.copytree(corpus_dir, tmp_path / "damaged")
    max(damaged.glob("train-*.parquet")).unlink()
    with pytest.raises(PipelineError, match=r"train split's tokens stand for [\d,]+ bytes, .*make the corpus again"):
        build_tokenized_dataset(settings_of("bpe"), damaged, tmp_path / "out")


@pytest.mark.parametrize("name", ["validation.bin", "train.documents.npy", "tokenizer/tokenizer.json", "summary.json"])
def test_a_full_disk_while_writing_tokens_is_one_line(name, corpus_dir, tmp_path: Path) -> None:
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    (tmp_path / "out" / name).symlink_to("/dev/full")
    with pytest.raises(PipelineError, match=r"no disk space left while writing to .*out \("):
        build_tokenized_dataset(settings_of("bpe"), corpus_dir, tmp_path / "out")


def test_merges_are_trained_on_the_bytes_asked_for(corpus_dir, tmp_path: Path) -> None:
    logged: list[str] = []
    settings = settings_of("bpe", vocab_size=270, training_bytes=3000)
    build_tokenized_dataset(settings, corpus_dir, tmp_path / "out", log=logged.append)
    assert any("on 3,000 bytes" in line for line in logged)
    with pytest.raises(PipelineError, match="only gives"):
        build_tokenized_dataset(settings_of("bpe", training_bytes=3000), corpus_dir, tmp_path / "out")


def chat_data_set(tmp_path: Path, pairs: list[tuple[str, str]], log: list[str] | None = None) -> Path:
    """Conversations of one token a character, the same in both splits but for a number."""
    rows = [{"text": prompt, "response": response} for prompt, response in pairs]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = CorpusSettings(
        source="files",
        paths=[str(tmp_path / "in.jsonl")],
        response_field="response",
        split_by="position",
        validation_fraction=0.55,
    )
    build_corpus(corpus, tmp_path / "corpus")
    settings = settings_of("char", chat=True)
    build_tokenized_dataset(
        settings, tmp_path / "corpus", tmp_path / "out", log=(log if log is not None else []).append
    )
    return tmp_path / "out"


def windows(folder: Path) -> list[tuple[str, str]]:
    """What each window of the train split shows and what of it is learned."""
    dataset = TokenDataset(folder, "train", LENGTH)
    tokenizer = load_tokenizer(folder / "tokenizer")
    items = [dataset[index] for index in range(len(dataset))]
    return [
        (tokenizer.decode(item["input_ids"]), tokenizer.decode(item["labels"][item["labels"] >= 0])) for item in items
    ]


def test_a_conversation_longer_than_a_window_keeps_its_answer(tmp_path: Path) -> None:
    end, digits = "<|endoftext|>", "0123456789" * 30
    pairs = [("q?", "yes"), ("p" * 300 + "?", "no"), ("r?", digits), ("b" * 300 + "?", digits[::-1])]
    held_out = [(f"{n} {prompt}", response) for n, (prompt, response) in enumerate(pairs)]
    logged: list[str] = []
    folder = chat_data_set(tmp_path, [*pairs, *held_out], logged)
    shown, learned = zip(*windows(folder), strict=True)
    room = LENGTH - LENGTH // 4
    user, assistant = MARKS["user"], MARKS["assistant"]
    assert learned == ("yes" + end, "no" + end, digits[: LENGTH - 4], digits[::-1][:room])
    assert shown[1].startswith(f"{user}ppp") and shown[1].endswith(f"ppp?{assistant}no{end}")
    assert shown[2].startswith(f"{user}r?{assistant}0") and shown[3].startswith(f"{user}bbb")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["train_cut_prompts"], summary["train_cut_responses"]) == (2, 2)
    assert (summary["validation_cut_prompts"], summary["validation_cut_responses"]) == (2, 2)
    assert any("cuts the start of 2 prompts and the end of 2 responses" in line for line in logged)


def test_conversations_that_fit_are_not_counted_as_cut(tmp_path: Path) -> None:
    logged: list[str] = []
    room = LENGTH - 3  # a mark for each turn, and the end
    folder = chat_data_set(tmp_path, [("p" * (room - n), "r" * n) for n in range(1, 9)], logged)
    summary = json.loads((folder / "summary.json").read_text())
    assert not any(summary[f"{split}_cut_{part}"] for split in SPLITS for part in ("prompts", "responses"))
    assert not any("cuts" in line for line in logged)
    assert all(len(learned) > len("<|endoftext|>") for _, learned in windows(folder))
