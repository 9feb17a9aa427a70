"""Automation: off until enabled on the Automation page or by the variable below, except the sensor `settings`.

- The automation sensor of Dagster materializes quantized_model, exported_model, benchmark_report and packaged_bento of
  an experiment once their upstream is newer, with the overrides of the run that made the checkpoint
  (`resources/hydra.py`). Training is started by hand.
- `failure_webhook` posts each failed run to LLM_ASSETS_FAILURE_WEBHOOK; it is on if the variable is set.
- `retraining` is an example schedule: the pipeline of the default experiment each night. If text, settings and code are
  unchanged, every stage is reused and nothing is trained.
- The sensor `settings` reports options that changed in configs/ (`experiments/observed.py`).
"""

import hashlib
import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from llm_assets.experiments.compose import DEFAULT_EXPERIMENT, experiment_names
from llm_assets.experiments.explain import as_markdown
from llm_assets.experiments.observed import changes, external_specs
from llm_assets.experiments.partitions import experiments, in_use
from llm_assets.registry import PIPELINE
from llm_assets.resources.hydra import HydraConfig
from model.errors import PipelineError

WEBHOOK = "LLM_ASSETS_FAILURE_WEBHOOK"
TIMEOUT_S = 10
_FAILURE = "dagster._core.definitions.events.Failure: "
"""Before the reason of a failure that the pipeline explains itself."""
_OF_PAGES = "__ASSET_JOB"
"""Dagster's name of the job that materializes assets chosen on a page."""


def failure_message(run: dg.DagsterRun, error: str) -> dict[str, str]:
    """The posted message: a line for chats (`text`) and its fields."""
    partition = run.tags.get("dagster/partition", "")
    first = error.strip().splitlines()[0].removeprefix(_FAILURE) if error.strip() else "no reason given"
    what = "run" if run.job_name == _OF_PAGES else run.job_name
    return {
        "text": f"{what} of {partition or 'no experiment'} failed: {first} (run {run.run_id})",
        "job": run.job_name,
        "experiment": partition,
        "run_id": run.run_id,
        "error": first,
    }


def post(url: str, message: dict[str, str]) -> None:
    """Send a message as JSON. Raises OSError if it fails; Dagster shows that at the sensor's tick."""
    request = urllib.request.Request(
        url, json.dumps(message).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    urllib.request.urlopen(request, timeout=TIMEOUT_S).close()


@dg.run_failure_sensor(
    description=f"Posts each failed run as JSON to the address in {WEBHOOK}; off if it is not set.",
    default_status=dg.DefaultSensorStatus.RUNNING if os.environ.get(WEBHOOK) else dg.DefaultSensorStatus.STOPPED,
)
def failure_webhook(context: dg.RunFailureSensorContext) -> None:
    """See the module."""
    url = os.environ.get(WEBHOOK)
    if not url:
        context.log.warning(f"{WEBHOOK} is not set: nothing is posted")
        return
    reasons = [
        event.event_specific_data.error_display_string  # type: ignore[union-attr]
        for event in context.get_step_failure_events()
    ]
    post(url, failure_message(context.dagster_run, reasons[0] if reasons else context.failure_event.message or ""))


@dg.schedule(
    cron_schedule="0 3 * * *",
    job_name="llm_pipeline",
    description=f"Each night at 3: {DEFAULT_EXPERIMENT} again if text, settings or code have changed. An example.",
    default_status=dg.DefaultScheduleStatus.STOPPED,
)
def retraining() -> dg.RunRequest:
    """See the module."""
    return dg.RunRequest(partition_key=DEFAULT_EXPERIMENT)


@dg.sensor(
    name="settings",
    description="Reports changed options in configs/, so that assets that depend on them are shown as out of date; "
    "keeps the partitions to the experiments that are in use and those with a new file.",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def observed_settings(context: dg.SensorEvaluationContext, hydra: HydraConfig) -> dg.SensorResult | dg.SkipReason:
    """See the module. Composing takes seconds, so it waits for new files, observations or checkpoints."""
    known = experiment_names(experiments.config_dir)
    seen = {"state": _state(context.instance, Path(hydra.config_dir)), "experiments": known}
    before = _last_look(context.cursor)
    if seen == {name: before.get(name) for name in seen}:
        return dg.SkipReason("no new settings file, partition, observation or checkpoint")
    added = [name for name in known if name not in before["experiments"]] if before.get("experiments") else []
    was_offered = before.get("is_offered", True) is True  # by an earlier release, which did not say so
    can_leave = was_offered and not _is_backfilling(context.instance)
    shown, entering, leaving = _partitions(context.instance, known, added, default_can_leave=can_leave)
    is_offered = DEFAULT_EXPERIMENT in entering or (was_offered and DEFAULT_EXPERIMENT in shown)
    found: list[Any] = []
    for experiment in shown:
        try:
            found += changes(context.instance, experiment, hydra.settings(experiment))
        except PipelineError as error:
            context.log.warning(f"settings of {experiment!r} are not observed: {error}")
    partitions: list[Any] = [experiments.build_add_request(entering), experiments.build_delete_request(leaving)]
    return dg.SensorResult(
        asset_events=found,
        dynamic_partitions_requests=[change for change in partitions if change.partition_keys],
        cursor=json.dumps({**seen, "is_offered": is_offered}),
    )


def _last_look(cursor: str | None) -> dict[str, Any]:
    """What the last look found; empty before the first look, and for a cursor of another format.

    is_offered: whether the default experiment is a partition by this sensor, and not by a person or a run.
    """
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_backfilling(instance: dg.DagsterInstance) -> bool:
    """Whether a backfill is under way: it fails if a partition leaves that it has not started a run of."""
    return any(found.status.value == "REQUESTED" for found in instance.get_backfills(limit=20))


def _partitions(
    instance: dg.DagsterInstance, known: Sequence[str], added: Sequence[str], *, default_can_leave: bool
) -> tuple[list[str], list[str], list[str]]:
    """The experiments that shall be partitions, and of these and the present ones those to add and to remove.

    known: all experiments. added: those of them whose files are new since the last look: they enter, so that their
    names need not be typed for the first run. A name that was mistyped in the UI and one whose file is gone leave; an
    experiment that was materialized while partitions were static enters. Before the first run the default experiment is
    shown alone, so that the UI has something to offer, and a graph of which nothing is made does not look finished; it
    leaves when others have run, but not if a person has added it since.
    """
    present = in_use(instance)
    used = [name for name in known if _was_run(instance, name)]
    waiting = [name for name in [*present, *added] if not (used and name == DEFAULT_EXPERIMENT and default_can_leave)]
    first = [name for name in known if name == DEFAULT_EXPERIMENT]
    shown = [name for name in known if name in used or name in waiting] or first
    return shown, [name for name in shown if name not in present], [name for name in present if name not in shown]


def _was_run(instance: dg.DagsterInstance, experiment: str) -> bool:
    first = dg.AssetRecordsFilter(asset_key=dg.AssetKey(PIPELINE[0].name), asset_partitions=[experiment])
    runs = dg.RunsFilter(tags={"dagster/partition": experiment})
    return bool(instance.get_runs(runs, limit=1) or instance.fetch_materializations(first, limit=1).records)


def _state(instance: dg.DagsterInstance, config_dir: Path) -> str:
    """A digest that changes with options, files, partitions, observations and checkpoints that settings may name."""
    digest = hashlib.sha256(f"{as_markdown()} {in_use(instance)}".encode())
    for file in sorted(config_dir.rglob("*.yaml")):
        digest.update(f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    for spec in external_specs():
        digest.update(
            str([record.storage_id for record in instance.fetch_observations(spec.key, limit=1).records]).encode()
        )
    checkpoints = instance.fetch_materializations(dg.AssetKey("trained_checkpoint"), limit=1).records
    digest.update(str([record.storage_id for record in checkpoints]).encode())
    return digest.hexdigest()
