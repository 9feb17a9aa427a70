"""What may run by itself: off by default, right where it is on."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from llm_assets.definitions import ASSETS, defs
from llm_assets.experiments.partitions import enter, experiments
from llm_assets.jobs import automation
from llm_assets.registry import PIPELINE
from llm_assets.resources.hydra import AUTOMATION_TAG, HydraConfig

EAGER = {"quantized_model", "exported_model", "benchmark_report", "packaged_bento"}


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """A server that takes what is posted."""
    posted: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(automation.WEBHOOK, f"http://127.0.0.1:{server.server_port}/hook")
    yield posted
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_runs_by_itself_until_it_is_turned_on() -> None:
    repository = defs().get_repository_def()
    statuses = {sensor.name: sensor.default_status for sensor in repository.sensor_defs}
    assert statuses == {
        "default_automation_condition_sensor": dg.DefaultSensorStatus.STOPPED,
        "failure_webhook": dg.DefaultSensorStatus.STOPPED,
        "settings": dg.DefaultSensorStatus.RUNNING,
    }
    # It has nothing that it could start a run of.
    assert not repository.get_sensor_def("settings").targets
    assert [(schedule.name, schedule.default_status) for schedule in repository.schedule_defs] == [
        ("retraining", dg.DefaultScheduleStatus.STOPPED)
    ]


def test_only_what_is_cheap_follows_its_upstream() -> None:
    following = {spec.key.path[-1] for asset in ASSETS for spec in asset.specs if spec.automation_condition is not None}
    assert following == EAGER


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:Parameter `include_sources`")
def test_what_follows_a_new_checkpoint_does_not_follow_changed_settings() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        enter(instance, "smoke")
        cursor = None

        def following(*made: str) -> set[str]:
            """What automation makes after these assets."""
            nonlocal cursor
            for name in made:
                instance.report_runless_asset_event(dg.AssetMaterialization(name, partition="smoke"))
            found = dg.evaluate_automation_conditions(defs(), instance, cursor=cursor)
            cursor = found.cursor
            return {asset for asset in EAGER if found.get_requested_partitions(dg.AssetKey(asset))}

        following(*(stage.name for stage in PIPELINE))
        assert not following("quantization_settings", "benchmark_settings", "serving_settings")
        assert following("trained_checkpoint") == EAGER


def test_an_automatic_run_has_the_overrides_of_the_run_that_made_the_checkpoint(var: Path) -> None:
    steps: list[int] = []

    @dg.asset(partitions_def=experiments)
    def trained_checkpoint(hydra: HydraConfig) -> None:
        steps.append(hydra.settings("smoke").training.max_steps)

    @dg.asset(partitions_def=experiments, deps=[trained_checkpoint])
    def quantized_model(hydra: HydraConfig) -> None:
        steps.append(hydra.settings("smoke").training.max_steps)

    with dg.DagsterInstance.ephemeral() as instance:

        def run(asset: dg.AssetsDefinition, *overrides: str, **tags: str) -> None:
            assert dg.materialize(
                [trained_checkpoint, quantized_model],
                selection=[asset],
                partition_key="smoke",
                instance=instance,
                tags=tags,
                resources={"hydra": HydraConfig()},
                run_config={"resources": {"hydra": {"config": {"overrides": list(overrides)}}}},
            ).success

        run(trained_checkpoint, "training.max_steps=7")
        run(quantized_model)
        run(quantized_model, **{AUTOMATION_TAG: "true"})
        assert steps == [7, 60, 7]


@pytest.mark.parametrize(("job", "named"), [("llm_pipeline", "llm_pipeline"), ("__ASSET_JOB", "run")])
def test_a_failed_run_is_posted_with_its_experiment_and_reason(webhook: list[dict], job: str, named: str) -> None:
    @dg.op
    def corpus() -> None:
        raise dg.Failure(description="no file matches /nowhere/*.txt", allow_retries=False)

    @dg.job(name=job)
    def llm_pipeline() -> None:
        corpus()

    instance = dg.DagsterInstance.ephemeral()
    result = llm_pipeline.execute_in_process(
        instance=instance, tags={"dagster/partition": "smoke"}, raise_on_error=False
    )
    (event,) = [event for event in result.all_events if event.event_type == dg.DagsterEventType.RUN_FAILURE]
    context = dg.build_run_status_sensor_context(
        sensor_name="failure_webhook", dagster_event=event, dagster_instance=instance, dagster_run=result.dagster_run
    ).for_run_failure()
    automation.failure_webhook(context)
    (posted,) = webhook
    assert (posted["job"], posted["experiment"], posted["run_id"]) == (job, "smoke", result.run_id)
    assert posted["error"] == "no file matches /nowhere/*.txt"
    assert posted["text"] == f"{named} of smoke failed: {posted['error']} (run {result.run_id})"


def test_the_schedule_asks_for_the_default_experiment() -> None:
    request = automation.retraining(dg.build_schedule_context())
    assert isinstance(request, dg.RunRequest) and request.partition_key == "stdlib"
