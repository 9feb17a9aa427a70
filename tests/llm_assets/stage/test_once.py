"""A stage is computed again only where something that decides it has changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llm_assets.artifacts.manifest import Manifest
from llm_assets.resources.hydra import HydraConfig
from llm_assets.stage import once
from llm_assets.stage.stage import Registration, Stage

Pipeline = Any  # conftest's


@pytest.fixture
def computed(pipeline: Pipeline) -> list[str]:
    """The assets that were computed, in order."""
    names: list[str] = []

    def note(work: Stage) -> None:
        names.append(work.asset)

    pipeline.reuses, pipeline.bodies = True, {"corpus": note, "tokenized_dataset": note}
    return names


def change_settings(pipeline: Pipeline) -> None:
    pipeline.hydra = HydraConfig(overrides=["corpus.max_bytes=999999"])


def change_source(pipeline: Pipeline) -> None:
    pipeline.source = "another file"


def change_code_version(pipeline: Pipeline) -> None:
    pipeline.code_version = "2"


def lose_what_it_names(pipeline: Pipeline) -> None:
    pipeline.outdated = "another store has no rex-smoke:abc"


def force_by_tag(pipeline: Pipeline) -> None:
    pipeline.tags = {"rex/force": "true"}


def force_by_configuration(pipeline: Pipeline) -> None:
    pipeline.hydra = HydraConfig(force=True)


def alter_a_file(pipeline: Pipeline) -> None:
    (pipeline.artifacts.store().load("corpus", "smoke") / "data.txt").write_text("altered")


def test_an_unchanged_pipeline_is_not_computed_and_not_tracked_again(pipeline: Pipeline, computed: list[str]) -> None:
    first, second = pipeline.run(), pipeline.run()
    assert first.success and second.success
    assert computed == ["corpus", "tokenized_dataset"]
    assert len(pipeline.tracked("corpus")) == len(pipeline.tracked("tokenized_dataset")) == 1


def test_the_page_of_a_reused_asset_shows_what_it_showed(pipeline: Pipeline, computed: list[str]) -> None:
    def measured(work: Stage) -> list[dg.AssetCheckResult]:
        return [dg.AssetCheckResult(check_name="is_good", passed=True, metadata={"loss": 1.5})]

    pipeline.bodies["corpus"] = measured
    (first,) = pipeline.run("corpus").asset_materializations_for_node("corpus")
    result = pipeline.run("corpus")
    (second,) = result.asset_materializations_for_node("corpus")
    assert second.metadata["unchanged"].value is True
    assert {name: second.metadata[name] for name in first.metadata if name != "unchanged"} == {
        name: value for name, value in first.metadata.items() if name != "unchanged"
    }
    assert second.tags["dagster/data_version"] == first.tags["dagster/data_version"]
    (check,) = result.get_asset_check_evaluations()
    assert check.passed and check.metadata["loss"].value == 1.5


@pytest.mark.parametrize(
    "change",
    [
        change_settings,
        change_source,
        change_code_version,
        lose_what_it_names,
        force_by_tag,
        force_by_configuration,
        alter_a_file,
    ],
)
def test_what_decides_a_stage_makes_it_compute(
    pipeline: Pipeline, computed: list[str], change: Callable[[Pipeline], None]
) -> None:
    assert pipeline.run("corpus").success
    change(pipeline)
    assert pipeline.run("corpus").success
    assert computed == ["corpus", "corpus"]


def test_the_option_that_made_it_compute_is_named(pipeline: Pipeline, computed: list[str]) -> None:
    assert pipeline.run("corpus").success
    change_settings(pipeline)
    result = pipeline.run("corpus")
    (said,) = [
        log.user_message for log in pipeline.instance.all_logs(result.run_id) if "is recomputed" in log.user_message
    ]
    assert re.search(r"changed since version \w+: corpus\.max_bytes is 999999, was \d+$", said), said


def test_other_code_makes_it_compute(
    pipeline: Pipeline, computed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert pipeline.run("corpus").success
    monkeypatch.setattr(once, "code_digest", lambda asset: "other")
    assert pipeline.run("corpus").success
    assert computed == ["corpus", "corpus"]


def test_a_new_upstream_is_computed_from_and_the_same_one_is_not(pipeline: Pipeline, computed: list[str]) -> None:
    assert pipeline.run().success
    force_by_tag(pipeline)
    assert pipeline.run("corpus").success  # the same content once more
    pipeline.tags = {}
    assert pipeline.run("tokenized_dataset").success
    assert computed == ["corpus", "tokenized_dataset", "corpus"]

    def other(work: Stage) -> None:
        computed.append(work.asset)
        (work.output / "data.txt").write_text("other")

    pipeline.bodies["corpus"] = other
    change_source(pipeline)
    assert pipeline.run().success
    assert computed[3:] == ["corpus", "tokenized_dataset"]


def test_a_version_that_failed_a_check_is_computed_again(pipeline: Pipeline, computed: list[str]) -> None:
    def bad(work: Stage) -> list[dg.AssetCheckResult]:
        computed.append("bad")
        return [dg.AssetCheckResult(check_name="is_good", passed=False)]

    pipeline.bodies["corpus"] = bad
    assert not pipeline.run("corpus").success
    assert not pipeline.run("corpus").success
    assert computed == ["bad", "bad"]


def test_a_warning_stays_a_warning(pipeline: Pipeline, computed: list[str]) -> None:
    def doubtful(work: Stage) -> list[dg.AssetCheckResult]:
        return [dg.AssetCheckResult(check_name="is_good", passed=False, severity=dg.AssetCheckSeverity.WARN)]

    pipeline.bodies["corpus"] = doubtful
    assert pipeline.run("corpus").success
    (check,) = pipeline.run("corpus").get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)


def test_a_model_that_the_registry_lost_is_registered_from_its_artifact(
    pipeline: Pipeline, computed: list[str], request: pytest.FixtureRequest
) -> None:
    pipeline.experiment = "stdlib"
    pipeline.registration = Registration(bits_per_byte=1.5, evaluation_text="a", candidate=True)
    assert pipeline.run("corpus").success
    client, _ = pipeline.mlflow.client()
    client.delete_registered_model("rex-stdlib")
    assert pipeline.run("corpus").success
    assert pipeline.run("corpus").success
    (version,) = client.search_model_versions("name = 'rex-stdlib'")
    manifest = Manifest.read(pipeline.artifacts.store().load("corpus", "stdlib"))
    assert version.tags["content_hash"] == manifest.content_hash
    assert computed == ["corpus"]
