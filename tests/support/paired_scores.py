"""Scores of the pieces of a text in place of those of real models: tests of promotions compare them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llm_assets.versions.promotion import Evidence
from model.paired import paired_bootstrap

PIECES, BYTES = 32, 100.0
WORST = 99.0


def write_scores(model_dir: Path, bits_per_byte: float, text: str = "a") -> None:
    """Let the model score `bits_per_byte` on `text`, and badly on every other text."""
    (model_dir / "scores.json").write_text(json.dumps({text: bits_per_byte}))


def compare_scores(
    model_dir: Path, text: str = "a", *, noise: float = 0.0, latency_ratio: float = 1.0
) -> Callable[[Path], Evidence]:
    """What compares a model with a champion on `text`; noise: how much the pieces differ, in bits per byte."""

    def score(folder: Path) -> float:
        return float(json.loads((folder / "scores.json").read_text()).get(text, WORST))

    def compare(champion_dir: Path) -> Evidence:
        return compare_numbers(score(model_dir), score(champion_dir), noise=noise, latency_ratio=latency_ratio)

    return compare


def compare_numbers(candidate: float, champion: float, *, noise: float = 0.0, latency_ratio: float = 1.0) -> Evidence:
    """The evidence of two models that score these bits per byte on each piece, give or take the noise."""
    wave = noise * BYTES * np.resize([1.0, -1.0], PIECES)
    bits = [np.full(PIECES, score * BYTES) for score in (candidate, champion)]
    scores = paired_bootstrap(bits[0] + wave, bits[1], np.full(PIECES, BYTES), unit="pieces")
    return Evidence(scores, lambda: latency_ratio)
