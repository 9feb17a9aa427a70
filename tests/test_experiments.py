"""Every experiment, those for a GPU too: its model has the size it claims, and a shrunken copy of it trains on CPU."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_assets.experiments.compose import compose, experiment_names
from llm_assets.experiments.references import PREFIX, resolve
from model.build import build_config, count_config_parameters
from model.settings import ExperimentSettings
from model.system.devices import resolve_precision
from model.text.corpus import build_corpus
from model.text.tokens import build_tokenized_dataset
from model.training.train import train

pytestmark = pytest.mark.medium

MILLIONS = {
    "smoke": (0.1, 0.2),
    "stdlib": (2, 5),
    "stdlib_30m": (28, 32),
    "shakespeare_char": (0.5, 0.7),
    "stdlib_chat": (2, 5),
    "stdlib_distilled": (0.3, 0.5),
    "gpt2_124m": (120, 128),
    "llama_350m": (320, 360),
}
SHRINK = [
    "corpus=stdlib_sample",
    "corpus.max_bytes=300000",
    "tokenizer.vocab_size=400",
    "tokenizer.sequence_length=32",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "training.max_steps=2",
    "training.warmup_steps=1",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.eval_steps=2",
    "training.eval_windows=4",
    "training.save_steps=2",
    "training.sample_tokens=4",
    "training.device=cpu",
]


def vocabulary(settings: ExperimentSettings) -> int:
    kind, path = settings.tokenizer.kind, settings.tokenizer.path
    if kind == "pretrained":
        return vocabulary(compose(path.removeprefix(PREFIX)))
    return settings.tokenizer.vocab_size if kind == "bpe" else 323


def shrunken(name: str, base: Path | None = None) -> ExperimentSettings:
    """The experiment on little text with a tiny model."""
    full = compose(name)
    shrink = list(SHRINK)
    if full.training.torch_compile:
        shrink.append("+training.arguments.torch_compile_backend=aot_eager")  # the graph without a C++ compiler
    if full.corpus.source == "docstrings":  # other text is not a conversation
        shrink += [
            "corpus=docstrings",
            "corpus.max_bytes=30000",
            "corpus.split_by=position",
            "tokenizer.sequence_length=128",
        ]
    return resolve(compose(name, shrink), lambda _: base or pytest.fail(f"{name} wants a checkpoint"))


@pytest.fixture(scope="module")
def dataset_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ExperimentSettings], Path]:
    """Builds the tokenized dataset of an experiment, once for all that share its corpus and tokenizer."""
    made: dict[str, Path] = {}

    def build(settings: ExperimentSettings) -> Path:
        key = repr((settings.corpus, settings.tokenizer))
        if key not in made:
            directory = tmp_path_factory.mktemp("data")
            build_corpus(settings.corpus, directory / "corpus")
            build_tokenized_dataset(settings.tokenizer, directory / "corpus", directory / "dataset")
            made[key] = directory / "dataset"
        return made[key]

    return build


@pytest.fixture(scope="module")
def base(dataset_of: Callable[[ExperimentSettings], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the experiments that go on from another one's."""
    directory = tmp_path_factory.mktemp("base")
    settings = shrunken("stdlib")
    train(settings, dataset_of(settings), directory / "checkpoint", directory / "scratch")
    return directory / "checkpoint"


@pytest.mark.parametrize("name", experiment_names())
def test_the_model_has_the_size_it_claims(name):
    settings = compose(name)
    low, high = MILLIONS[name]
    assert low < count_config_parameters(build_config(settings.model, vocabulary(settings), 0, 0, 1)) / 1e6 < high


LARGE = {"gpt2_124m", "llama_350m"}  # the vocabularies of GPT-2's and Llama's size take most of the time
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in experiment_names()]


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunken_copy_takes_two_steps_on_cpu(name, base, dataset_of, tmp_path):
    settings = shrunken(name, base)
    summary = train(settings, dataset_of(settings), tmp_path / "checkpoint", tmp_path / "scratch")
    assert summary.steps == 2
    assert math.isfinite(summary.validation_loss)
    assert summary.precision == resolve_precision(settings.training.precision, torch.device("cpu"))
