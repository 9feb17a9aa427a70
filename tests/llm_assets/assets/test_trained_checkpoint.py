"""The asset itself, in this process: a training that was warned of fails its check and moves no champion alias."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llm_assets.artifacts.io_manager import DirectoryIOManager
from llm_assets.assets.corpus import corpus
from llm_assets.assets.tokenized_dataset import tokenized_dataset
from llm_assets.assets.trained_checkpoint import trained_checkpoint
from llm_assets.resources.hydra import HydraConfig
from llm_assets.resources.mlflow import MlflowTracking
from model.training import trainer
from model.training.optim.optimizer import MuonAdamW, parameter_groups

OVERRIDES = ["training.max_steps=40", "training.sample_tokens=0", "serving.quantized=false"]


class WithoutNorms(MuonAdamW):
    """An optimizer that forgets the norms: the loss falls nevertheless, and the other check is content."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 1:
                    parameter.grad = None
        super().step()


@pytest.mark.slow
def test_a_training_that_forgets_parameters_fails_its_check_and_is_not_promoted(
    mlflow: MlflowTracking, var: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trainer, "build_optimizer", lambda model, settings, precision: WithoutNorms(parameter_groups(model, settings))
    )
    result = dg.materialize(
        [corpus, tokenized_dataset, trained_checkpoint],
        partition_key="smoke",
        resources={"artifacts": DirectoryIOManager(), "hydra": HydraConfig(overrides=OVERRIDES), "mlflow": mlflow},
    )
    assert result.success
    check = {found.check_name: found for found in result.get_asset_check_evaluations()}["trains_soundly"]
    assert not check.passed
    assert "parameters unchanged at step 40" in str(check.metadata["found"].value)
    client, _ = mlflow.client()
    versions = client.search_model_versions("name = 'rex-smoke'")
    assert versions and not client.get_registered_model("rex-smoke").aliases
