"""What a later stage measures of a registered model reaches the model's version, and the pages of both assets."""

import contextlib
import json
from typing import Any

import dagster as dg
import pytest
from mlflow.exceptions import MlflowException

from llm_assets.experiments.compose import compose
from llm_assets.stage import once, stage
from llm_assets.stage.evidence import measured_model
from llm_assets.stage.stage import Registration, Stage
from llm_assets.versions.measurements import PARITY
from model.settings import ExperimentSettings

Pipeline = Any  # conftest's
NAME = "rex-stdlib"


def of_corpus(asset: str, settings: ExperimentSettings) -> str | None:
    return "corpus" if asset == "tokenized_dataset" else None


@pytest.fixture
def measuring(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A pipeline whose second asset is the export of the first, and differs from it."""
    for module in (stage, once):
        monkeypatch.setattr(module, "measured_model", of_corpus)
    row = {"engine": "llama.cpp", "file": "a.gguf", "log_probability_difference": 2.0, "differences": ["2 nats"]}

    def export(work: Stage) -> None:
        (work.output / "certificates.json").write_text(json.dumps({"certificates": [row]}))

    pipeline.experiment, pipeline.reuses = "stdlib", True
    pipeline.registration = Registration(bits_per_byte=1.5, evaluation_text="a", candidate=True)
    pipeline.bodies["tokenized_dataset"] = export
    client, _ = pipeline.mlflow.client()  # on the database that all tests share
    with contextlib.suppress(MlflowException):
        client.delete_registered_model(NAME)
    return pipeline


def test_an_export_that_differs_withdraws_the_champion_and_says_so_on_both_pages(measuring: Pipeline) -> None:
    result = measuring.run()
    assert result.success
    client, _ = measuring.mlflow.client()
    assert not client.get_registered_model(NAME).aliases
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    said = "withdrawn: its export differs from the checkpoint in one place: llama.cpp, a.gguf: 2 nats"
    assert version.tags["champion_decision"] == said
    (exported,) = result.asset_materializations_for_node("tokenized_dataset")
    assert exported.metadata["champion_decision"].value == said
    assert "| export | differences: 1 |" in exported.metadata["champion_evidence"].value
    (model,) = result.asset_materializations_for_node("corpus")
    assert "| export | not measured |" in model.metadata["champion_evidence"].value
    observed = measuring.instance.fetch_observations(dg.AssetKey("corpus"), limit=1).records[0].asset_observation
    assert observed.metadata["champion_decision"].value == said
    assert observed.tags["dagster/data_version"] == model.tags["dagster/data_version"]


def test_a_measurement_that_the_registry_lost_is_recorded_from_its_artifact(measuring: Pipeline) -> None:
    assert measuring.run().success
    client, _ = measuring.mlflow.client()
    client.delete_registered_model(NAME)
    assert measuring.run().success
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert json.loads(version.tags[PARITY])["differences"] == 1
    assert not client.get_registered_model(NAME).aliases


@pytest.mark.parametrize(
    ("asset", "overrides", "model"),
    [
        ("exported_model", [], "quantized_model"),
        ("exported_model", ["serving.quantized=false"], "trained_checkpoint"),
        ("evaluation_report", [], "quantized_model"),
        ("evaluation_report", ["evaluation.model=trained_checkpoint"], "trained_checkpoint"),
        ("benchmark_report", [], None),
    ],
)
def test_export_and_evaluation_measure_a_registered_model(asset: str, overrides: list[str], model: str | None) -> None:
    assert measured_model(asset, compose("smoke", overrides)) == model
