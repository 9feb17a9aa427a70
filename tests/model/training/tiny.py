"""A training that takes seconds: a few files of the standard library, 300 tokens, a model of some 20,000 parameters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.settings import (
    BenchmarkSettings,
    CorpusSettings,
    ExperimentSettings,
    ModelSettings,
    TokenizerSettings,
    TrainingSettings,
)
from model.text.corpus import build_corpus
from model.text.tokens import build_tokenized_dataset
from model.training.train import train

TOKENIZER = TokenizerSettings(vocab_size=300, sequence_length=64)


def make_dataset(directory: Path) -> Path:
    sources = [str(path) for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    corpus = CorpusSettings(
        source="files", paths=sources, document_bytes=2048, split_by="position", validation_fraction=0.15
    )
    build_corpus(corpus, directory / "corpus")
    build_tokenized_dataset(TOKENIZER, directory / "corpus", directory / "dataset")
    return directory / "dataset"


def experiment(**training: Any) -> ExperimentSettings:
    """12 steps with dropout, so that a result depends on the state of the random generator too."""
    settings = TrainingSettings(
        max_steps=12,
        per_device_train_batch_size=2,
        warmup_steps=2,
        precision="float32",
        device="cpu",
        eval_steps=5,
        eval_windows=4,
        save_steps=4,
        logging_steps=3,
        sample_prompts=["def "],
        sample_tokens=4,
    )
    return ExperimentSettings(
        name="tiny",
        tokenizer=TOKENIZER,
        model=ModelSettings(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=0.1,
        ),
        training=replace(settings, **training),
        benchmark=BenchmarkSettings(generated_tokens=[8], prefill_tokens=[8]),
    )


def assert_resumes_bit_exact(settings: ExperimentSettings, dataset_dir: Path, tmp_path: Path) -> None:
    """A training that is interrupted after its sixth step ends with the weights of `tmp_path/whole`."""

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step > 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(settings, dataset_dir, tmp_path / "resumed", tmp_path / "b", on_metrics=interrupt)
    assert train(settings, dataset_dir, tmp_path / "resumed", tmp_path / "b").resumed_from_step
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
