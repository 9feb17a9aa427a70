"""Evidence for a model against the champion: both scores on the same text, and the ratio of their times per token.

Later stages measure a model that is registered already: `measured_model` says which.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

from llm_assets.versions.promotion import Evidence
from model.settings import ExperimentSettings

TEXT_PIECES = 128
"""Windows of the validation split that a candidate and the champion are scored on."""
TIMED_TOKENS, TIMED_ROUNDS = 16, 5


def served_model(settings: ExperimentSettings) -> str:
    """The asset of the model that is served, which is the candidate for champion."""
    return "quantized_model" if settings.serving.quantized else "trained_checkpoint"


def measured_model(asset: str, settings: ExperimentSettings) -> str | None:
    """The asset of the registered model that `asset` measures (`versions/measurements.py`), else None."""
    if asset == "exported_model":
        return served_model(settings)
    if asset == "evaluation_report":
        return served_model(settings) if settings.evaluation.model == "served" else settings.evaluation.model
    return None


def champion_comparison(model_dir: Path, dataset_dir: Path, settings: ExperimentSettings) -> Callable[[Path], Evidence]:
    """A function that scores the model of a directory against a champion's on the dataset's validation split."""

    def compare(champion_dir: Path) -> Evidence:
        from model.paired import compare_pair

        device = settings.serving.device
        comparison = compare_pair(
            model_dir,
            champion_dir,
            dataset_dir,
            settings.tokenizer.sequence_length,
            max_pieces=TEXT_PIECES,
            device=device,
            seed=settings.training.seed,
        )
        return Evidence(comparison, lambda: latency_ratio(model_dir, champion_dir, device))

    return compare


def latency_ratio(model_dir: Path, champion_dir: Path, device: str) -> float:
    """The model's time per token of one text as a multiple of the champion's: medians of interleaved rounds."""
    from bench.decode import decode, prompt
    from model.system.devices import resolve_device
    from model.weights.loading import load_model

    target = str(resolve_device(device, setting="serving.device"))
    models = [load_model(directory, device=target) for directory in (model_dir, champion_dir)]
    seconds: list[list[float]] = [[], []]
    for _ in range(TIMED_ROUNDS):
        for model, of_model in zip(models, seconds, strict=True):
            of_model += decode(model, prompt(model), TIMED_TOKENS, use_cache=True)[1][1:]
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
