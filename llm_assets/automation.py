"""What may run by itself: all of it is off until a person turns it on, on the page Automation or by the variable below.

- The automation sensor of Dagster materializes quantized_model, exported_model, benchmark_report and packaged_bento of
  an experiment once what they are made from is newer (`dg.AutomationCondition.eager()`). Training stays a person's
  decision.
- `failure_webhook` posts each failed run to LLM_ASSETS_FAILURE_WEBHOOK; it is on where the variable is set.
- `retraining` is an example of a schedule: the pipeline of the default experiment each night. Where its text, settings
  and code are unchanged, every stage is reused and nothing is trained.
"""

import json
import os
import urllib.request

import dagster as dg

from llm_assets.experiments.compose import DEFAULT_EXPERIMENT

WEBHOOK = "LLM_ASSETS_FAILURE_WEBHOOK"
TIMEOUT_S = 10


def failure_message(run: dg.DagsterRun, error: str) -> dict[str, str]:
    """What is posted: a line for chats (`text`) and the same in parts."""
    partition = run.tags.get("dagster/partition", "")
    first = error.strip().splitlines()[0] if error.strip() else "no reason given"
    return {
        "text": f"{run.job_name} of {partition or 'no experiment'} failed: {first} (run {run.run_id})",
        "job": run.job_name,
        "experiment": partition,
        "run_id": run.run_id,
        "error": first,
    }


def post(url: str, message: dict[str, str]) -> None:
    """Send a message as JSON. Raises OSError where it is not taken; Dagster shows that at the sensor's tick."""
    request = urllib.request.Request(
        url, json.dumps(message).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    urllib.request.urlopen(request, timeout=TIMEOUT_S).close()


@dg.run_failure_sensor(
    description=f"Posts each failed run as JSON to the address in {WEBHOOK}; off where there is none.",
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
    description=f"Each night at 3: {DEFAULT_EXPERIMENT} anew where text, settings or code have changed. An example.",
    default_status=dg.DefaultScheduleStatus.STOPPED,
)
def retraining() -> dg.RunRequest:
    """See the module."""
    return dg.RunRequest(partition_key=DEFAULT_EXPERIMENT)
