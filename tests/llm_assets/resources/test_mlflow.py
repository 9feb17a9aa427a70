import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_assets.artifacts.manifest import Manifest
from llm_assets.experiments.compose import compose
from llm_assets.paths import REPOSITORY
from llm_assets.resources.mlflow import MlflowTracking
from llm_assets.resources.tracked_run import TrackedRun
from llm_assets.stage.stage import Stage
from llm_assets.versions.promotion import Contest
from model.system.revision import git
from tests.support.paired_scores import WORST, compare_numbers

Pipeline = Any  # conftest's


def test_a_run_carries_the_settings_and_the_names_that_dagster_gives(pipeline: Pipeline) -> None:
    result = pipeline.run("corpus")
    (run,) = pipeline.tracked("corpus")
    assert run.info.status == "FINISHED"
    assert run.data.params["corpus.max_bytes"] == str(compose("smoke").corpus.max_bytes)
    assert run.data.tags["dagster_run_id"] == result.run_id
    assert run.data.tags["dagster.partition"] == "smoke"
    assert run.data.metrics["characters"] == 3


def test_a_run_says_what_it_is_and_where_it_comes_from(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ASSETS_DAGSTER_URL", "http://dagster:1234/")
    result = pipeline.run()
    (run,) = pipeline.tracked("tokenized_dataset")
    note = run.data.tags["mlflow.note.content"]
    assert compose("smoke").description in note and f"(http://dagster:1234/runs/{result.run_id})" in note
    assert (REPOSITORY / run.data.tags["mlflow.source.name"]).read_text().count("def tokenized_dataset(") == 1
    assert run.data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    (read,) = run.inputs.dataset_inputs
    corpus = Manifest.read(pipeline.artifacts.store().load("corpus", "smoke"))
    assert (read.dataset.name, read.dataset.digest) == ("corpus of smoke", corpus.content_hash[:36])
    assert json.loads(read.dataset.source)["version"] == corpus.version
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] <= 100
    assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100


def test_the_default_is_a_database_and_a_folder_below_var(var: Path, tracking_uri: str) -> None:
    var.mkdir()
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), var / "mlflow.db")  # with its tables, which take seconds
    client, experiment_id = MlflowTracking(experiment="default").client()
    assert client.get_experiment(experiment_id).artifact_location == (var / "mlartifacts").as_uri()


def test_the_environment_names_another_tracking_store(
    var: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    MlflowTracking().client()
    assert not (var / "mlflow.db").exists()


def test_two_processes_can_open_a_fresh_database_at_once(opened_at_once: tuple[str, list[int]]) -> None:
    assert opened_at_once[1] == [0, 0]


def test_what_a_dead_process_left_running_is_closed_by_the_next_run(pipeline: Pipeline) -> None:
    ended = pipeline.run("corpus")
    client, experiment_id = pipeline.mlflow.client()
    tags = {"dagster.asset": "corpus", "dagster.partition": "smoke", "dagster_run_id": ended.run_id}
    dead = client.create_run(experiment_id, tags=tags).info.run_id
    elsewhere = client.create_run(experiment_id, tags=tags | {"dagster_run_id": "of another instance"}).info.run_id
    pipeline.run("corpus")
    assert client.get_run(dead).info.status == "KILLED"
    assert client.get_run(elsewhere).info.status == "RUNNING"


def test_a_run_is_nested_under_its_parent(pipeline: Pipeline) -> None:
    parents: list[str] = []

    def body(work: Stage) -> None:
        with pipeline.mlflow.run(work.context, parent_run_id=work.tracked.run_id) as child:
            parents.append(child._client.get_run(child.run_id).data.tags["mlflow.parentRunId"])
        assert parents == [work.tracked.run_id]

    pipeline.bodies["corpus"] = body
    assert pipeline.run("corpus").success


def test_a_tracking_store_that_fails_is_a_warning_and_not_an_error(pipeline: Pipeline) -> None:
    warnings: list[str] = []

    def body(work: Stage) -> None:
        lost = TrackedRun(pipeline.mlflow.client()[0], "no such run", "", warnings.append)
        lost.log_metrics({"loss": 1.0})
        lost.log_params({"a": 1})
        lost.log_artifact(work.output)
        lost.close()

    pipeline.bodies["corpus"] = body
    assert pipeline.run("corpus").success
    assert len(warnings) >= 2
    assert all(warning.startswith("MLflow did not accept the") and "\n" not in warning for warning in warnings)


def test_long_parameters_and_many_of_them_are_logged(pipeline: Pipeline) -> None:
    def body(work: Stage) -> None:
        work.tracked.log_params({f"p{number}": "x" * 7000 for number in range(101)})

    pipeline.bodies["corpus"] = body
    assert pipeline.run("corpus").success
    assert {len(value) for name, value in pipeline.tracked("corpus")[0].data.params.items() if name[0] == "p"} == {6000}


def compare_with(client: Any, score: float, text: str) -> Any:
    """Compares with the champion's recorded score, on another text with the worst one."""

    def compare(folder: Path) -> Any:
        tags = client.get_model_version_by_alias("rex-champions", "champion").tags
        return compare_numbers(score, float(tags["bits_per_byte"]) if tags["evaluation_text"] == text else WORST)

    return compare


def test_the_best_candidate_on_the_same_text_is_champion(pipeline: Pipeline) -> None:
    champions: list[str] = []

    def body(work: Stage) -> None:
        (work.output / "data.txt").write_text("weights")
        client, _ = pipeline.mlflow.client()
        for asset, score, evaluation_text, candidate in [
            ("trained_checkpoint", 1.0, "a", False),
            ("quantized_model", 2.0, "a", True),
            ("quantized_model", 1.5, "a", True),
            ("quantized_model", 1.8, "a", True),
            ("quantized_model", 9.0, "b", True),
        ]:
            work.tracked.register(
                "rex-champions",
                work.output,
                asset=asset,
                bits_per_byte=score,
                evaluation_text=evaluation_text,
                candidate=candidate,
                contest=Contest(compare_with(client, score, evaluation_text)),
            )
            aliases = client.get_registered_model("rex-champions").aliases
            champions.append(str(aliases.get("champion", "none")))

    pipeline.bodies["corpus"] = body
    assert pipeline.run("corpus").success
    assert champions == ["none", "2", "3", "3", "5"]


def test_a_registered_version_holds_its_own_copy_of_the_files(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    def body(work: Stage) -> None:
        (work.output / "data.txt").write_text("weights")
        work.tracked.register(
            "rex-copy", work.output, asset="quantized_model", bits_per_byte=1.0, evaluation_text="a", candidate=True
        )

    pipeline.bodies["corpus"] = body
    assert pipeline.run("corpus").success
    monkeypatch.setenv("MLFLOW_TRACKING_URI", pipeline.mlflow.tracking_uri)
    downloaded = mlflow.artifacts.download_artifacts("models:/rex-copy@champion", dst_path=str(tmp_path / "copy"))
    assert (Path(downloaded) / "data.txt").read_text() == "weights"
