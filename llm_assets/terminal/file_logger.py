"""Dagster's logger of a run's records as lines of a file (`records.py`)."""

import logging
from typing import Any

import dagster as dg

from llm_assets.terminal.records import NONE

KILLED = (
    "its process was killed from outside, perhaps because memory ran out (`dmesg` shows it): raise the limit, end "
    "other programs or make the work smaller, then run again; the last good artifact is untouched"
)
"""The reason shown for a step that ended without one."""


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        meta: dict[str, Any] = getattr(record, "dagster_meta", {})
        event = meta.get("dagster_event")
        text = meta.get("orig_message") or record.getMessage()
        if event is not None and event.is_step_failure:
            text = _reason(event) or text
        name = event.event_type_value if event is not None else NONE
        time = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        line = f"{time} {record.levelname:8} {meta.get('step_key') or NONE:19} {name:24} "
        return line + " ".join(str(text).split())


def _reason(event: dg.DagsterEvent) -> str:
    """Why a step failed, in one line: the stage's own description, else the first error's type and text."""
    failure = event.step_failure_data
    if failure.user_failure_data and failure.user_failure_data.description:
        return failure.user_failure_data.description
    error = failure.error
    while error and error.cause:
        error = error.cause
    said = error.message.strip() if error else ""
    if said.endswith("ChildProcessCrashException"):
        return KILLED
    return "terminated" if said.endswith("DagsterExecutionInterruptedError") else said


@dg.logger(config_schema={"path": dg.Field(str, description="The file to append to.")}, description="Lines of a file.")
def file_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """Appends every record of a run to a file, one line each."""
    logger = logging.Logger("dagster", logging.DEBUG)  # noqa: LOG001 - one logger per run
    handler = logging.FileHandler(context.logger_config["path"], encoding="utf-8")
    handler.setFormatter(_OneLine())
    logger.addHandler(handler)
    return logger
