"""Opens MLflow's tracking store: makes its database ready, and finds, makes or restores the experiment.

Without Dagster, which the process of MLflow's page has no other use for (`instance/mlflow_server.py`).
"""

import errno
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llm_assets.artifacts.locks import WAIT_S, acquire
from llm_assets.paths import var_dir
from llm_assets.resources import tracking_database
from model.errors import PipelineError, TransientError
from model.progress import Log, silent

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "rex"
"""The MLflow experiment of all runs, unless the resource `mlflow` names another."""
DATABASE_TIMEOUT_S = 600
"""Longest wait of a call for another writer of an SQLite database."""

ANSWER_WAIT_S, ASK_EVERY_S = 120.0, 2.0
"""How long a stage waits for a tracking server that does not answer, and how often it asks."""


def one_line(error: BaseException) -> str:
    """The first line of an error's text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def open_store(uri: str, experiment: str, log: Log = silent) -> tuple["MlflowClient", str]:
    """A client whose store is ready, and the experiment's id. An experiment deleted in MLflow's page is restored.

    A lock keeps processes from opening a new store at the same time: its migrations would race.
    Raises PipelineError, one line, if the store cannot be opened.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # With MLflow's default of 7 retries with backoff, a failing call takes four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from filelock import FileLock, Timeout

    database = sqlite_file(uri)
    lock = database.with_name(database.name + ".lock") if database else var_dir() / "mlflow.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        acquire(held)
        try:
            if database:
                tracking_database.prepare(database, log)
            return _open_once_it_answers(uri, experiment, database, log)
        finally:
            held.release()
    except PipelineError:
        raise
    except Timeout:
        raise TransientError(f"another process has held {lock} for {WAIT_S:.0f} s: end it and run again") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PipelineError(
            f"the tracking store {uri} cannot be used: {one_line(error)}; repair it, or set another in "
            "MLFLOW_TRACKING_URI"
        ) from error


def _open_once_it_answers(uri: str, experiment: str, database: Path | None, log: Log) -> tuple["MlflowClient", str]:
    """`_open`, tried again for ANSWER_WAIT_S while no server answers: it may be starting again."""
    deadline = 0.0
    while True:
        try:
            return _open(uri, experiment, database, log)
        except Exception as error:
            if database or not isinstance(error.__cause__ or error.__context__, OSError):
                raise
            if not deadline:
                deadline = time.monotonic() + ANSWER_WAIT_S
                log(f"the tracking store {uri} does not answer: waiting {ANSWER_WAIT_S:.0f} s for it")
            elif time.monotonic() > deadline:
                raise
            time.sleep(ASK_EVERY_S)


def _open(uri: str, experiment: str, database: Path | None, log: Log) -> tuple["MlflowClient", str]:
    from mlflow import MlflowClient

    if database:
        uri = f"sqlite:///{database}?timeout={DATABASE_TIMEOUT_S}"  # SQLite's own default is 5 s
    client = MlflowClient(uri, uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        place = (database.parent / tracking_database.ARTIFACTS).as_uri() if database else None
        return client, client.create_experiment(experiment, artifact_location=place)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
        log(f"the MLflow experiment {experiment!r} was deleted: it is restored")
    return client, found.experiment_id


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, None for another store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None
