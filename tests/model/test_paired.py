import json
from pathlib import Path

import numpy as np
import pytest

from model.build import build_config, build_model
from model.errors import PipelineError
from model.evaluation import evaluate
from model.paired import MIN_PIECES, compare_pair, paired_bootstrap
from model.settings import TokenizerSettings
from model.text.corpus import read_documents
from model.text.tokenizer import load_tokenizer, train_tokenizer
from model.text.tokens import TokenDataset
from model.weights.loading import load_model
from tests.model.training.tiny import TOKENIZER, experiment, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("paired"))


def make_model(directory: Path, tokenizer, seed: int) -> Path:
    config = build_config(experiment().model, len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1)
    build_model(config, seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two with the tokenizer of the dataset, one with another."""
    folder, same = tmp_path_factory.mktemp("models"), load_tokenizer(dataset / "tokenizer")
    texts = list(read_documents(dataset.parent / "corpus", "train"))
    other = train_tokenizer(TokenizerSettings(vocab_size=400, sequence_length=64), texts)
    return [make_model(folder / str(number), tokenizer, number) for number, tokenizer in enumerate([same, same, other])]


def test_windows_give_the_bits_per_byte_of_an_evaluation(dataset: Path, models: list[Path]) -> None:
    found = compare_pair(models[0], models[1], dataset, TOKENIZER.sequence_length, max_pieces=9)
    split = TokenDataset(dataset, "validation", TOKENIZER.sequence_length)
    expected = [evaluate(load_model(model), split, max_windows=9) for model in models[:2]]
    assert [found.candidate, found.champion] == pytest.approx([score.bits_per_byte for score in expected], rel=1e-6)
    assert (found.pieces, found.bytes) == (9, expected[0].bytes)
    assert found.low < found.difference < found.high


def test_a_model_does_not_differ_from_itself(dataset: Path, models: list[Path]) -> None:
    found = compare_pair(models[0], models[0], dataset, TOKENIZER.sequence_length, max_pieces=9)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert not found.is_better and not found.is_worse


def test_models_of_two_tokenizers_are_scored_on_the_same_bytes(dataset: Path, models: list[Path]) -> None:
    one = compare_pair(models[0], models[2], dataset, TOKENIZER.sequence_length, max_pieces=9)
    other = compare_pair(models[2], models[0], _with_tokenizer_of(models[2], dataset), 64, max_pieces=9)
    assert one.unit == "passages of at most 64 tokens of the candidate's"
    # Random weights give every token about the same probability: the larger vocabulary costs more per token.
    assert one.pieces == 9 and 0 < one.candidate < 20 and 0 < one.champion < 20
    assert other.unit.startswith("passages")


def _with_tokenizer_of(model_dir: Path, dataset: Path) -> Path:
    from model.text.tokens import build_tokenized_dataset

    directory = model_dir.parent / "dataset"
    settings = TokenizerSettings(vocab_size=400, sequence_length=64)
    build_tokenized_dataset(settings, dataset.parent / "corpus", directory)
    assert (directory / "tokenizer" / "tokenizer.json").read_text() == (model_dir / "tokenizer.json").read_text()
    return directory


def test_a_shorter_context_reads_a_window_in_parts(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "short"
    load_model(models[0]).save_pretrained(short)
    load_tokenizer(models[0]).save_pretrained(short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    found = compare_pair(models[0], short, dataset, TOKENIZER.sequence_length, max_pieces=9)
    split = TokenDataset(dataset, "validation", 16)
    # The same tokens are predicted, from less text each.
    assert found.candidate != found.champion
    assert found.champion == pytest.approx(evaluate(load_model(short), split).bits_per_byte, rel=0.1)


def test_conversations_of_another_tokenizer_are_not_compared(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    for path in dataset.iterdir():
        (tmp_path / path.name).symlink_to(path)
    offsets = np.load(dataset / "validation.documents.npy")
    np.save(tmp_path / "validation.responses.npy", np.stack([offsets[:-1], offsets[1:]], axis=1))
    with pytest.raises(PipelineError, match=r"another tokenizer than .*expected the same tokenizer"):
        compare_pair(models[0], models[2], tmp_path, 64, max_pieces=9)
    assert compare_pair(models[0], models[1], tmp_path, 64, max_pieces=9).pieces > 0


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held, trials, text = 0, 200, np.full(60, 100.0)
    for _ in range(trials):
        difficulty = generator.normal(200, 50, 60)  # the same for both, and larger than the difference
        gain = generator.normal(-2, 6, 60)
        found = paired_bootstrap(difficulty + gain, difficulty, text, unit="pieces", resamples=400)
        held += found.low <= -0.02 <= found.high
    assert 0.88 <= held / trials <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(0).normal(100, 10, (2, 30))
    one, two = (paired_bootstrap(*scores, np.full(30, 50.0), unit="pieces", seed=5) for _ in range(2))
    assert one == two != paired_bootstrap(*scores, np.full(30, 50.0), unit="pieces", seed=6)


def test_so_few_pieces_show_nothing() -> None:
    scores, text = np.full(MIN_PIECES - 1, 1.0), np.ones(MIN_PIECES - 1)
    assert not paired_bootstrap(scores - 0.5, scores, text, unit="pieces").is_better
    scores, text = np.full(MIN_PIECES, 1.0), np.ones(MIN_PIECES)
    assert paired_bootstrap(scores - 0.5, scores, text, unit="pieces").is_better


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_not_better(bad: float) -> None:
    scores, text = np.full(30, 1.0), np.ones(30)
    found = paired_bootstrap(np.full(30, bad), scores, text, unit="pieces")
    assert not found.is_better and np.isnan(found.high)


def test_pieces_without_text_are_refused() -> None:
    with pytest.raises(PipelineError, match="hold no text"):
        paired_bootstrap(np.ones(9), np.ones(9), np.zeros(9), unit="pieces")
