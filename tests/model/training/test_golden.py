"""A short training whose losses are recorded: an unintended change of the arithmetic fails.

After a change that alters the losses on purpose, record them again and say so in the commit:
`python -m tests.model.training.test_golden`. The text is made here and the vocabulary is its characters, so that the
result depends on neither the Python version nor the tokenizer library. Rounding differs between CPUs: with AVX2, with
AVX-512, with the vector units switched off (ATEN_CPU_CAPABILITY=default) and with two threads, a loss moved by at most
1.3e-6 of itself, a norm by 6e-5, both with Muon; 3e-7 and 2e-6 without.
"""

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from model.settings import CorpusSettings, ExperimentSettings, TokenizerSettings
from model.text.corpus import build_corpus
from model.text.tokens import build_tokenized_dataset
from model.training.train import train
from tests.model.training.tiny import experiment

pytestmark = pytest.mark.medium

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-5
KINDS = ("muon", "adamw", "distilled")


def settings(**training: object) -> ExperimentSettings:
    """Everything that a step goes through: accumulation, clipping, z-loss, warm-up and decay; no dropout."""
    made = experiment(
        max_steps=20,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_steps=10,
        save_steps=20,
        z_loss=1e-4,
        sample_tokens=0,
        **training,
    )
    made.model.attention_dropout = 0.0
    return replace(made, tokenizer=TokenizerSettings(kind="char", sequence_length=64))


def make_dataset(directory: Path) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(40)]
    lines = [" ".join(draw.choices(words, k=9)) + ".\n" for _ in range(400)]
    (directory / "text.txt").write_text("".join(lines))
    corpus = CorpusSettings(
        source="files", paths=[str(directory / "text.txt")], document_bytes=2048, split_by="position"
    )
    build_corpus(corpus, directory / "corpus")
    build_tokenized_dataset(settings().tokenizer, directory / "corpus", directory / "dataset")
    return directory / "dataset"


def losses(kind: str, directory: Path) -> dict[str, list[float]]:
    """The curves of a training: with one optimizer or the other, or with the first as the teacher of the second."""
    dataset = make_dataset(directory)
    made = settings(optim="adamw" if kind == "distilled" else kind)
    if kind == "distilled":
        # With AdamW too: Muon multiplies a rounding by a hundred, and a student would that of its teacher once more.
        teacher = settings(optim="adamw", seed=1)
        train(teacher, dataset, directory / "teacher", directory / "scratch of the teacher")
        taught = {"distill_from": str(directory / "teacher"), "distill_temperature": 2.0, "distill_top_k": 8}
        made = replace(made, training=replace(made.training, **taught))
    train(made, dataset, directory / "output", directory / "scratch")
    curve = json.loads((directory / "output" / "curves.json").read_text())
    return {key: [entry[key] for entry in curve if key in entry] for key in ("loss", "eval_loss", "grad_norm")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_the_recorded_ones(kind, tmp_path):
    recorded = json.loads(GOLDEN.read_text())[kind]
    found = losses(kind, tmp_path)
    for key, values in recorded.items():
        tolerance = TOLERANCE if "loss" in key else 10 * TOLERANCE
        assert found[key] == pytest.approx(values, rel=tolerance), f"{key}: see this file's docstring"


def record() -> None:
    """Write the losses of this machine to the file that the tests compare with."""
    found = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as directory:
            found[kind] = losses(kind, Path(directory))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
