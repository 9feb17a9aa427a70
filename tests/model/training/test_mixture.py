"""A training on a mixture: the shares of its sources, their scores, and a resumed run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import PipelineError
from model.evaluation import evaluate, scores_of_sources
from model.settings import CorpusSettings
from model.text.corpus import build_corpus
from model.text.tokens import TokenDataset, build_tokenized_dataset
from model.training.train import train
from model.weights.loading import load_model
from tests.model.training.tiny import TOKENIZER, assert_resumes_bit_exact, experiment


@pytest.fixture(scope="module")
def mixed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python and its numbers: two sources of different entropy."""
    folder = tmp_path_factory.mktemp("mixed")
    numbers = [" ".join(str(number * 7919 % 1000) for number in range(start, start + 200)) for start in range(40)]
    (folder / "numbers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in numbers))
    code = [str(path) for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    mixture = {"code": {"paths": code, "document_bytes": 1024}, "numbers": {"paths": [str(folder / "numbers.jsonl")]}}
    build_corpus(CorpusSettings(source="mixture", mixture=mixture, validation_fraction=0.2), folder / "corpus")
    build_tokenized_dataset(TOKENIZER, folder / "corpus", folder / "dataset")
    return folder / "dataset"


@pytest.mark.medium
def test_a_mixture_is_scored_by_source_and_a_killed_run_resumes_bit_exact(mixed_dir, tmp_path):
    settings = experiment(mixture_weights={"code": 1, "numbers": 3})
    seen: list[dict[str, float]] = []
    whole = train(
        settings, mixed_dir, tmp_path / "whole", tmp_path / "a", on_metrics=lambda _, metrics: seen.append(metrics)
    )
    for name in ("code", "numbers"):
        assert any(f"bits_per_byte/{name}" in metrics and f"eval_loss/{name}" in metrics for metrics in seen)
        assert whole.sources[name]["bits_per_byte"] > 0
    assert_resumes_bit_exact(settings, mixed_dir, tmp_path)

    dataset = TokenDataset(mixed_dir, "validation", TOKENIZER.sequence_length)
    scores = evaluate(load_model(tmp_path / "whole"), dataset, batch_size=3)
    sources = scores_of_sources(scores)
    parts = sources.values()
    assert sum(part.tokens for part in parts) == scores.tokens
    assert sum(part.bytes for part in parts) == scores.bytes
    assert sum(part.loss * part.tokens for part in parts) / scores.tokens == pytest.approx(scores.loss)
    assert sources["numbers"].loss == pytest.approx(whole.sources["numbers"]["loss"], rel=1e-4)


def test_weights_for_a_text_without_sources_are_refused(dataset_dir, tmp_path):
    settings = replace(experiment(), training=replace(experiment().training, mixture_weights={"code": 1}))
    with pytest.raises(PipelineError, match=r"names code: expected the sources of corpus.mixture \(none"):
        train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch")
