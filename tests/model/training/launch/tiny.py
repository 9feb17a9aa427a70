"""The training of the tests, long enough to be ended in between."""

from dataclasses import replace
from typing import Any

from model.settings import ComputeSettings, ExperimentSettings
from tests.model.training.tiny import experiment


def one_process() -> ExperimentSettings:
    settings = experiment(per_device_train_batch_size=4, max_steps=60, save_steps=10, eval_steps=20, save_total_limit=9)
    settings.model.attention_dropout = 0.0
    return settings


def two_processes() -> ExperimentSettings:
    return replace(one_process(), compute=ComputeSettings(engine="torchrun", processes=2))


def sharded_experiment(**training: Any) -> ExperimentSettings:
    """12 steps without dropout; matrices whose rows two processes divide evenly, and three do not."""
    settings = experiment(**{"per_device_train_batch_size": 4, "initial_embeddings": "cooccurrence", **training})
    settings.model.attention_dropout = 0.0
    return settings
