"""A corpus that is encoded shard by shard gives the files of one that is encoded in one process."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import PipelineError
from model.settings import CorpusSettings, TokenizerSettings
from model.text import shards
from model.text.corpus import build_corpus
from model.text.shards import ShardTask, by_shards, encode_shard
from model.text.tokens import build_tokenized_dataset
from tests.model.text.applied import in_any_order, twice_each

pytestmark = pytest.mark.medium

SETTINGS = TokenizerSettings(vocab_size=300, sequence_length=64)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["text", "conversations"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizerSettings]:
    directory = tmp_path_factory.mktemp("corpus")
    chat = request.param == "conversations"
    options: dict[str, Any] = {"source": "docstrings"} if chat else {"source": "stdlib", "document_bytes": 2048}
    built = CorpusSettings(max_bytes=150_000, shard_bytes=20_000, **options)
    build_corpus(built, directory)
    assert len(list(directory.glob("train-*.parquet"))) > 3
    return directory, TokenizerSettings(vocab_size=300, sequence_length=64, chat=chat)


@pytest.mark.parametrize("apply", [map, in_any_order, twice_each], ids=lambda apply: apply.__name__)
def test_the_files_are_those_of_one_process(corpus, apply, tmp_path):
    corpus_dir, settings = corpus
    whole = build_tokenized_dataset(settings, corpus_dir, tmp_path / "whole")
    parts = build_tokenized_dataset(settings, corpus_dir, tmp_path / "parts", encode=by_shards(apply, tmp_path))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert (parts.train_tokens, parts.train_cut_prompts) == (whole.train_tokens, whole.train_cut_prompts)


@pytest.fixture
def task(corpus, tmp_path) -> ShardTask:
    corpus_dir, settings = corpus
    build_tokenized_dataset(settings, corpus_dir, tmp_path / "dataset")
    shard = Path(shutil.copy(sorted(corpus_dir.glob("train-*.parquet"))[1], tmp_path / "train-00007.parquet"))
    return ShardTask(
        shard, tmp_path / "train-00007", tmp_path / "dataset" / "tokenizer", 300, "uint16", 64, settings.chat
    )


def test_a_shard_that_is_done_is_not_done_again(task, monkeypatch):
    documents = encode_shard(task)
    monkeypatch.setattr(shards, "encode_split", lambda *args, **kwargs: pytest.fail("encoded again"))
    assert encode_shard(task) == documents


def test_another_tokenizer_in_the_same_folder_is_read(corpus, task, tmp_path):
    """A process of a cluster encodes one dataset after the other; the second may have the first one's folder."""
    encode_shard(task)
    shutil.rmtree(task.tokenizer.parent)
    build_tokenized_dataset(TokenizerSettings(vocab_size=280, sequence_length=64), corpus[0], tmp_path / "dataset")
    other = ShardTask(task.shard, tmp_path / "other", task.tokenizer, 280, "uint16", 64, False)
    encode_shard(other)
    assert np.fromfile(other.folder / "tokens.bin", np.uint16).max() < 280


def test_a_task_that_ends_in_between_leaves_nothing_that_counts(task, monkeypatch):
    encode = shards.encode_split

    def killed(*args: Any, **kwargs: Any) -> None:
        encode(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "encode_split", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_shard(task)
    assert not task.folder.exists()


def test_a_damaged_shard_is_named(task):
    task.shard.write_bytes(task.shard.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"train-00007.parquet could not be encoded: Arrow"):
        encode_shard(task)


def test_a_document_that_is_no_conversation_is_named_with_its_shard(corpus, task, tmp_path):
    if not task.chat:
        task = ShardTask(task.shard, task.folder, task.tokenizer, 300, "uint16", 64, False)
        assert encode_shard(task)
        return
    pq.write_table(pa.table({"text": ["no conversation"]}), task.shard)
    with pytest.raises(PipelineError, match=r"train-00007.parquet: "):
        encode_shard(task)
