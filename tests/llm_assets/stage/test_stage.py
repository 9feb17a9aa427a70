import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import dagster as dg
import pytest

from llm_assets.artifacts.manifest import Manifest
from llm_assets.artifacts.store import ArtifactStore
from llm_assets.experiments.compose import compose
from llm_assets.resources.hydra import HydraConfig
from llm_assets.stage import stage as stage_module
from llm_assets.stage.stage import Stage
from model.errors import PipelineError

Pipeline = Any  # conftest's


def failure(result: dg.ExecuteInProcessResult) -> dg.Failure | Any:
    """The error of the step that failed."""
    return next(event.step_failure_data.error for event in result.all_events if event.is_step_failure)


def latest(pipeline: Pipeline, asset: str = "corpus") -> str:
    return (pipeline.artifacts.store().load(asset, "smoke") / "data.txt").read_text()


def fail(error: BaseException) -> Any:
    def body(_: Stage) -> None:
        raise error

    return body


def test_assets_hand_verified_directories_on_and_record_where_they_come_from(pipeline: Pipeline, var: Path) -> None:
    result = pipeline.run()
    assert result.success
    assert latest(pipeline, "tokenized_dataset") == "tokens of one"
    corpus = Manifest.read(pipeline.artifacts.store().load("corpus", "smoke"))
    dataset = Manifest.read(pipeline.artifacts.store().load("tokenized_dataset", "smoke"))
    assert dataset.upstream == {"corpus": corpus.content_hash}
    assert set(dataset.config) == {"corpus", "tokenizer"}
    assert dataset.dagster_run_id == result.run_id
    assert dataset.mlflow_run_id == pipeline.tracked("tokenized_dataset")[0].info.run_id
    assert not list((var / "scratch").glob("*/*/*/artifact"))


def test_a_materialization_shows_its_version_numbers_config_and_tracking_run(pipeline: Pipeline) -> None:
    result = pipeline.run("corpus")
    (event,) = result.asset_materializations_for_node("corpus")
    manifest = Manifest.read(pipeline.artifacts.store().load("corpus", "smoke"))
    assert event.tags is not None
    assert event.tags["dagster/data_version"] == manifest.content_hash
    assert event.metadata["characters"].value == 3
    assert event.metadata["artifact_bytes"].value == 3
    assert 50 < float(str(event.metadata["step_peak_memory_mb"].value)) < 8000
    assert event.metadata["unchanged"].value is False
    assert "validation_fraction" in str(event.metadata["config"].value)
    assert str(event.metadata["mlflow_run"].value).endswith(
        f"/runs/{manifest.mlflow_run_id}?workflowType=machine_learning)"
    )
    assert Path(str(event.metadata["dagster/uri"].value)).name == manifest.version


def test_making_the_same_again_is_shown_as_unchanged(pipeline: Pipeline) -> None:
    first = pipeline.run("corpus").asset_materializations_for_node("corpus")[0]
    second = pipeline.run("corpus").asset_materializations_for_node("corpus")[0]
    assert second.metadata["unchanged"].value is True
    assert first.tags == second.tags


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PipelineError("found 3, expected 4"), "FAILED"),
        (ValueError("a bug"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_a_stage_that_fails_leaves_the_last_artifact_and_the_right_status(
    pipeline: Pipeline, var: Path, error: BaseException, status: str
) -> None:
    assert pipeline.run("corpus").success
    pipeline.bodies["corpus"] = fail(error)
    assert not pipeline.run("corpus").success
    assert [run.info.status for run in pipeline.tracked("corpus")] == [status, "FINISHED"]
    assert latest(pipeline) == "one"
    assert not list((var / "scratch" / "corpus" / "smoke").iterdir())


def test_a_terminated_step_is_tracked_as_killed(pipeline: Pipeline) -> None:
    def terminated(_: Stage) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    pipeline.bodies["corpus"] = terminated
    assert not pipeline.run("corpus").success
    assert pipeline.tracked("corpus")[0].info.status == "KILLED"


def test_a_termination_is_not_tried_again(pipeline: Pipeline) -> None:
    tries = []

    def terminated(_: Stage) -> None:
        tries.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    pipeline.bodies["corpus"], pipeline.retries = terminated, 2
    result = pipeline.run("corpus")
    assert not result.success
    assert len(tries) == 1
    assert not [event for event in result.all_events if event.is_step_up_for_retry]
    assert pipeline.tracked("corpus")[0].info.status == "KILLED"


@pytest.mark.parametrize("during", ["latest_manifest", "publish"])
def test_a_termination_before_or_after_the_work_is_not_tried_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    tries = []

    def terminated(*_: object) -> None:
        tries.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    monkeypatch.setattr(ArtifactStore, during, terminated)
    pipeline.reuses, pipeline.retries = True, 2
    result = pipeline.run("corpus")
    assert not result.success
    assert len(tries) == 1
    assert not [event for event in result.all_events if event.is_step_up_for_retry]
    assert [run.info.status for run in pipeline.tracked("corpus")] == ["KILLED"] * (during == "publish")


def test_results_stand_at_the_end_of_the_curves(pipeline: Pipeline) -> None:
    pipeline.bodies["corpus"] = lambda work: work.live(90, {"characters": 1.0})
    assert pipeline.run("corpus").success
    client, _ = pipeline.mlflow.client()
    (run,) = pipeline.tracked("corpus")
    assert run.data.metrics["characters"] == 3
    history = client.get_metric_history(run.info.run_id, "characters")
    assert [(metric.step, metric.value) for metric in history] == [(90, 1.0), (90, 3.0)]


def test_a_run_is_named_with_its_point_of_a_sweep_and_its_overrides(pipeline: Pipeline) -> None:
    pipeline.tags = {"rex/point": "12"}
    pipeline.hydra = HydraConfig(overrides=["corpus.max_bytes=999999"])
    assert pipeline.run("corpus").success
    (run,) = pipeline.tracked("corpus")
    assert run.info.run_name == "12: max_bytes=999999 smoke corpus"
    assert run.data.tags["hydra.overrides"] == "corpus.max_bytes=999999"


def test_bad_input_is_one_line_and_not_tried_again(pipeline: Pipeline) -> None:
    tries = []

    def body(_: Stage) -> None:
        tries.append(1)
        raise PipelineError("corpus.paths matches nothing: give another glob")

    pipeline.bodies["corpus"], pipeline.retries = body, 2
    error = failure(pipeline.run("corpus"))
    assert error.cls_name == "Failure"
    assert "corpus.paths matches nothing: give another glob" in error.message
    assert len(tries) == 1


def test_another_error_is_tried_again(pipeline: Pipeline) -> None:
    tries = []

    def body(_: Stage) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("down")

    pipeline.bodies["corpus"], pipeline.retries = body, 2
    assert pipeline.run("corpus").success
    assert [run.info.status for run in pipeline.tracked("corpus")] == ["FINISHED", "FAILED"]


def test_a_failed_blocking_check_stops_the_run_and_the_last_good_version_stays_the_latest(pipeline: Pipeline) -> None:
    assert pipeline.run().success

    def bad(work: Stage) -> list[dg.AssetCheckResult]:
        (work.output / "data.txt").write_text("bad")
        return [dg.AssetCheckResult(check_name="is_good", passed=False)]

    pipeline.bodies["corpus"] = bad
    result = pipeline.run()
    assert not result.success
    assert result.get_failed_step_keys() == {"corpus"}
    assert len(pipeline.tracked("tokenized_dataset")) == 1
    assert pipeline.tracked("corpus")[0].info.status == "FAILED"
    assert latest(pipeline) == "one"


def test_a_warning_does_not_keep_a_version_from_becoming_the_latest(pipeline: Pipeline) -> None:
    def doubtful(work: Stage) -> list[dg.AssetCheckResult]:
        (work.output / "data.txt").write_text("doubtful")
        return [
            dg.AssetCheckResult(check_name="is_good", passed=False, severity=dg.AssetCheckSeverity.WARN),
        ]

    pipeline.bodies["corpus"] = doubtful
    assert pipeline.run("corpus").success
    assert latest(pipeline) == "doubtful"


def test_a_failed_publication_is_tracked_as_failed(pipeline: Pipeline, var: Path) -> None:
    def body(_: Stage) -> None:
        (var / "artifacts").parent.mkdir(exist_ok=True)
        (var / "artifacts").write_text("a file where a folder belongs")

    pipeline.bodies["corpus"] = body
    assert not pipeline.run("corpus").success
    assert pipeline.tracked("corpus")[0].info.status == "FAILED"


def test_an_upstream_made_with_other_overrides_is_refused(pipeline: Pipeline) -> None:
    assert pipeline.run("corpus").success
    pipeline.hydra = HydraConfig(overrides=["corpus.max_bytes=999999"])
    error = failure(pipeline.run("tokenized_dataset"))
    assert f"corpus.max_bytes={compose('smoke').corpus.max_bytes} (this run: 999999)" in error.message
    assert pipeline.run().success


def test_an_altered_upstream_file_is_refused_by_its_path(pipeline: Pipeline) -> None:
    assert pipeline.run("corpus").success
    path = pipeline.artifacts.store().load("corpus", "smoke") / "data.txt"
    path.write_text("altered")
    error = failure(pipeline.run("tokenized_dataset"))
    assert f"{path} was altered" in str(error)


@pytest.mark.parametrize("override", ["training.max_stepz=1", "training.max_steps=many", "training.max_steps=-1"])
def test_a_wrong_override_is_one_line_before_anything_starts(pipeline: Pipeline, override: str) -> None:
    pipeline.hydra = HydraConfig(overrides=[override])
    error = failure(pipeline.run("corpus"))
    assert error.cls_name == "Failure"
    assert override.split("=")[0].split(".")[1] in error.message
    assert not pipeline.tracked("corpus")


def test_a_resumable_stage_finds_its_scratch_and_tracking_run_again(pipeline: Pipeline, var: Path) -> None:
    pipeline.resumable = True

    def killed(work: Stage) -> None:
        (work.scratch / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    pipeline.bodies["corpus"] = killed
    assert not pipeline.run("corpus").success

    def continued(work: Stage) -> None:
        (work.output / "data.txt").write_text((work.scratch / "checkpoint").read_text() + " and the rest")

    pipeline.bodies["corpus"] = continued
    assert pipeline.run("corpus").success
    assert latest(pipeline) == "half and the rest"
    assert [run.info.status for run in pipeline.tracked("corpus")] == ["FINISHED"]
    assert not [path for path in (var / "scratch" / "corpus" / "smoke").iterdir() if path.is_dir()]


def test_a_resumable_stage_with_other_settings_starts_afresh(pipeline: Pipeline) -> None:
    pipeline.resumable = True

    def body(work: Stage) -> None:
        assert not list(work.scratch.iterdir())
        (work.scratch / "checkpoint").write_text("half")
        raise PipelineError("the loss is not a number")

    pipeline.bodies["corpus"] = body
    for overrides in ([], ["corpus.max_bytes=999999"]):
        pipeline.hydra = HydraConfig(overrides=overrides)
        assert "the loss is not a number" in failure(pipeline.run("corpus")).message


def test_two_runs_do_not_share_a_resumable_workspace(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "WORKSPACE_WAIT_S", 0.1)
    pipeline.resumable = True
    messages = []

    def body(_: Stage) -> None:
        pipeline.bodies.clear()
        messages.append(failure(pipeline.run("corpus")).message)

    pipeline.bodies["corpus"] = body
    assert pipeline.run("corpus").success
    assert "another run is making corpus of 'smoke'" in messages[0]


def test_an_exclusive_stage_waits_for_another_and_a_dead_one_holds_nothing(pipeline: Pipeline, var: Path) -> None:
    lock = var / "scratch" / ".device.lock"
    holder = (
        f"import sys; from filelock import FileLock; lock = FileLock({str(lock)!r}); "
        "lock.acquire(); print('held', flush=True); "
        "sys.stdin.read()"
    )
    lock.parent.mkdir(parents=True)
    pipeline.exclusive = True
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        alive_when_done: list[bool] = []
        pipeline.bodies["corpus"] = lambda _: alive_when_done.append(other.poll() is None)
        Timer(1.0, other.kill).start()
        assert pipeline.run("corpus").success
        assert alive_when_done == [False]


def test_progress_goes_to_tracking_at_once_and_to_the_event_log_now_and_then(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(work: Stage) -> None:
        for step in range(5):
            work.live(step, {"loss": 5.0 - step, "broken": float("nan")})
        monkeypatch.setattr(stage_module, "OBSERVATION_EVERY_S", 0.0)
        work.live(5, {"loss": 0.0, "broken": float("nan")})

    pipeline.bodies["corpus"] = body
    result = pipeline.run("corpus")
    client, _ = pipeline.mlflow.client()
    history = client.get_metric_history(pipeline.tracked("corpus")[0].info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 5.0 - step) for step in range(6)]
    (observation,) = [event for event in result.all_events if event.event_type_value == "ASSET_OBSERVATION"]
    seen = observation.asset_observation_data.asset_observation.metadata
    assert {name: entry.value for name, entry in seen.items()} == {"step": 5, "loss": 0.0}
