import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from model.errors import PipelineError
from model.settings import CorpusSettings, TokenizerSettings, TrainingSettings
from model.text.corpus import build_corpus, read_documents, read_summary
from model.text.mixture import mixed_order, shares
from model.text.sources import fingerprint
from model.text.tokens import TokenDataset, build_tokenized_dataset

LENGTH = 16


def write(folder: Path, name: str, count: int) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{name} {number} " * 9}) + "\n" for number in range(count)))
    return path


@pytest.fixture
def mixture(tmp_path: Path) -> CorpusSettings:
    """Two sources of JSON Lines and one of plain text, which repeats a document of the first."""
    parts = {name: {"paths": [str(write(tmp_path, name, count))]} for name, count in (("apple", 60), ("pear", 30))}
    (tmp_path / "plum").mkdir()
    for number in range(12):
        (tmp_path / "plum" / f"{number}.txt").write_text(f"plum {number}\n" * 9)
    (tmp_path / "plum" / "again.txt").write_text("apple 3 " * 9)
    parts["plum"] = {"paths": [str(tmp_path / "plum" / "*.txt")], "max_bytes": 900}
    return CorpusSettings(source="mixture", mixture=parts, validation_fraction=0.3)


def test_sources_follow_each_other_with_their_documents_and_bytes_counted(mixture: CorpusSettings, tmp_path: Path):
    made = build_corpus(mixture, tmp_path / "corpus")
    assert read_summary(tmp_path / "corpus") == made
    assert list(made.mixture) == ["apple", "pear", "plum"]
    assert (made.sources, made.duplicates) == (15, 1)
    for split in ("train", "validation"):
        texts = list(read_documents(tmp_path / "corpus", split))
        names = [text.split()[0] for text in texts]
        assert names == sorted(names)
        for name, counts in made.mixture.items():
            own = [text for text in texts if text.startswith(name)]
            assert (counts[f"{split}_documents"], counts[f"{split}_bytes"]) == (len(own), sum(map(len, own)))
    assert sum(made.mixture["plum"][f"{split}_bytes"] for split in ("train", "validation")) <= 900


def test_a_window_belongs_to_the_source_of_its_first_token(mixture: CorpusSettings, tmp_path: Path):
    build_corpus(mixture, tmp_path / "corpus")
    settings = TokenizerSettings(vocab_size=300, sequence_length=LENGTH)
    build_tokenized_dataset(settings, tmp_path / "corpus", tmp_path / "dataset")
    dataset = TokenDataset(tmp_path / "dataset", "train", LENGTH)
    assert dataset.sources
    starts = np.arange(len(dataset)) * (LENGTH - 1)
    documents = list(read_documents(tmp_path / "corpus", "train"))
    at = np.searchsorted(dataset.document_offsets, starts, side="right") - 1
    names = [dataset.sources.names[source] for source in dataset.window_sources()]
    assert names == [documents[index].split()[0] for index in at]
    assert set(names) == {"apple", "pear", "plum"}


def test_conversations_of_a_mixture_that_are_left_out_count_for_no_source(tmp_path: Path):
    def conversation(text: str, role: str) -> str:
        return json.dumps({"messages": [{"role": "user", "content": text}, {"role": role, "content": text * 30}]})

    for name, roles in (("one", ("assistant", "user")), ("two", ("assistant",))):
        lines = [conversation(f"{name} {number}", role) for number in range(20) for role in roles]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = {
        name: {"paths": [str(tmp_path / f"{name}.jsonl")], "messages_field": "messages"} for name in ("one", "two")
    }
    build_corpus(CorpusSettings(source="mixture", mixture=parts, validation_fraction=0.3), tmp_path / "corpus")
    settings = TokenizerSettings(vocab_size=280, sequence_length=32, chat=True)
    build_tokenized_dataset(settings, tmp_path / "corpus", tmp_path / "dataset")
    dataset = TokenDataset(tmp_path / "dataset", "train", 32)
    assert dataset.sources
    names = [dataset.sources.names[source] for source in dataset.window_sources()]
    firsts = [dataset.document_offsets[dataset.documents(index)[0]] for index in range(len(dataset))]
    said = [dataset.text_bytes(int(first), int(first) + 8).decode() for first in firsts]
    assert all(text.startswith(name) for text, name in zip(said, names, strict=True))
    assert set(names) == {"one", "two"}


def test_each_source_gets_its_share_evenly_and_each_window_once_an_epoch():
    sources = np.array([0] * 10 + [1] * 4 + [2] * 3)
    order = list(mixed_order(sources, [0.5, 0.4, 0.1], 400, seed=3))
    assert Counter(sources[order].tolist()) == {0: 200, 1: 160, 2: 40}
    for start in range(0, 400, 40):  # evenly: any stretch has the shares, too
        counts = Counter(sources[order[start : start + 40]].tolist())
        assert [counts[source] for source in range(3)] == pytest.approx([20, 16, 4], abs=1)
    for source, windows in ((0, 10), (1, 4), (2, 3)):
        own = [index for index in order if sources[index] == source]
        epochs = [own[at : at + windows] for at in range(0, len(own) - windows, windows)]
        assert all(sorted(epoch) == np.flatnonzero(sources == source).tolist() for epoch in epochs)
        assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    assert order == list(mixed_order(sources, [0.5, 0.4, 0.1], 400, seed=3))
    assert order != list(mixed_order(sources, [0.5, 0.4, 0.1], 400, seed=4))


def test_a_source_of_weight_0_is_left_out_and_any_number_of_samples_is_shared_out():
    sources = np.array([0, 0, 1, 1, 2])
    order = list(mixed_order(sources, [2 / 3, 0, 1 / 3], 7, seed=0))
    assert Counter(sources[order].tolist()) == {0: 5, 2: 2}


def test_weights_become_shares_of_the_named_sources():
    assert shares(["a", "b"], [5, 5], {"b": 3, "a": 1}) == [0.25, 0.75]
    assert shares(["a", "b"], [5, 5], {}) is None


@pytest.mark.parametrize(
    ("windows", "weights", "message"),
    [
        ([5, 5], {"a": 1}, r"names a: expected the sources of corpus.mixture \(a, b\)"),
        ([5, 5], {"a": 1, "b": 1, "c": 1}, "names a, b, c: expected"),
        ([5, 0], {"a": 1, "b": 1}, "the source 'b' of the mixture has no training window"),
    ],
)
def test_weights_that_do_not_fit_are_refused(windows, weights, message):
    with pytest.raises(PipelineError, match=message):
        shares(["a", "b"], windows, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": {}}, r"corpus.mixture is \{\}: expected sources by name for source 'mixture'"),
        ({"source": "stdlib", "mixture": {"a": {"source": "stdlib"}}}, "and none for another"),
        ({"mixture": {"a": {"path": ["x"]}}}, "corpus.mixture.a is 'path': expected only options of one source"),
        ({"mixture": {"a": {"validation_fraction": 0.5}}}, "a is 'validation_fraction': expected only options of one"),
        ({"mixture": {"a": ["x.txt"]}}, r"corpus.mixture.a is \['x.txt'\]: expected options of the group corpus"),
        ({"mixture": {"a": {"source": "files"}}}, "corpus.mixture.a: corpus.paths is .*at least one path"),
        ({"mixture": {"a/b": {"source": "stdlib"}}}, "corpus.mixture is 'a/b': expected names"),
        ({"mixture": {"a": {"source": "stdlib"}}, "split_by": "position"}, "expected 'hash' for a mixture"),
        ({"mixture": {"a": {"source": "stdlib"}, "b": {"source": "docstrings"}}}, "all hold conversations, or none"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_one_line(options, message):
    with pytest.raises(PipelineError, match=message) as caught:
        CorpusSettings(**{"source": "mixture", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [{"a": -1}, {"a": "much"}, {"a": 0}])
def test_weights_are_numbers_of_0_or_more(weights):
    with pytest.raises(PipelineError, match=r"training.mixture_weights is .*expected numbers of 0 or more, not all 0"):
        TrainingSettings(mixture_weights=weights)


def test_a_changed_file_of_any_source_changes_the_fingerprint(mixture: CorpusSettings, tmp_path: Path):
    before = fingerprint(mixture)
    assert before == fingerprint(mixture)
    write(tmp_path, "pear", 31)
    assert fingerprint(mixture) != before
