"""The SQLite tracking database below var/: made whole, repaired, waited for, and moved along with its folder.

MLflow makes its tables in many transactions, so a process that is killed meanwhile leaves a database that every later
run would stumble over: it is made beside its place and renamed. MLflow keeps absolute artifact locations: a folder that
was moved or copied gets those of its new place before anything is read or written.
"""

import logging
import re
import sqlite3
import time
import uuid
from contextlib import closing
from pathlib import Path

from model.errors import PipelineError
from model.progress import Log, silent
from model.system.processes import stopped_holder

WAIT_S, SAY_AFTER_S, SAY_EVERY_S = 600.0, 3.0, 10.0
"""Longest wait for another writer of the database, when it is first logged, and how often after that."""
ARTIFACTS = "mlartifacts"
"""Folder of the logged files, beside the database."""
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def prepare(path: Path, log: Log = silent) -> None:
    """Make the database ready to open: create it, wait for another writer, correct its locations after a move.

    To be called by one process at a time. Raises PipelineError for a file that is no database and for one that stays
    locked.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()  # of a process that was killed while it made one
    if not path.is_file() or path.stat().st_size == 0:
        _create(path)
    _wait_for_writers(path, log)
    if _is_half_made(path):
        broken = path.with_name(path.name + ".broken")
        path.replace(broken)
        log(f"{path} was half made and held no runs: it is {broken.name} now, and a new one is made")
        _create(path)
    _relocate(path, log)


def _is_half_made(path: Path) -> bool:
    """Whether MLflow was stopped while it made this database: tables are missing, and it holds nothing yet."""
    with closing(sqlite3.connect(path, timeout=60.0)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        holds = [table for table in ("runs", "registered_models") if table in tables]
        if any(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in holds):
            return False
        if "alembic_version" not in tables or not database.execute("SELECT * FROM alembic_version").fetchone():
            return True
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.model_registry.dbmodels import models as registry_tables
    from mlflow.store.tracking.dbmodels import models as tracking_tables

    assert registry_tables and tracking_tables  # imported for the tables that they declare
    return not tables.issuperset(Base.metadata.tables)


def _create(path: Path) -> None:
    from mlflow import MlflowClient

    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    logging.disable(logging.INFO)  # a line for each of fifty migrations
    try:
        uri = f"sqlite:///{fresh}"
        default = MlflowClient(uri, uri).get_experiment("0")
        with closing(sqlite3.connect(fresh)) as database, database:
            # MLflow would write the files of its own experiment into the current directory.
            location = f"{(path.parent / ARTIFACTS).as_uri()}/{default.experiment_id}"
            database.execute("UPDATE experiments SET artifact_location = ?", (location,))
        fresh.replace(path)
    finally:
        logging.disable(logging.NOTSET)
        fresh.unlink(missing_ok=True)


def _wait_for_writers(path: Path, log: Log) -> None:
    """Return once the database can be written to."""
    started = time.monotonic()
    next_said = started + SAY_AFTER_S
    while True:
        try:
            with closing(sqlite3.connect(path, timeout=1.0, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
            return
        except sqlite3.DatabaseError as error:
            now = time.monotonic()
            if "locked" not in str(error):
                raise PipelineError(
                    f"{path} cannot be used as tracking database: {error}; move it away or mend it"
                ) from None
            if now - started > WAIT_S:
                raise PipelineError(
                    f"{path} has been locked by another program for {WAIT_S:.0f} s: end that program and run again"
                ) from None
            if now > next_said:
                next_said = now + SAY_EVERY_S
                log(stopped_holder(path) or f"waiting for another program that holds {path}")


def _relocate(path: Path, log: Log) -> None:
    """Replace the locations of the place where this folder was, where its files came along."""
    here = (path.parent / ARTIFACTS).as_uri()
    with closing(sqlite3.connect(path, timeout=60.0)) as database, database:
        columns = [
            (table, column)
            for table, column in _LOCATIONS
            if column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
        ]
        if ("experiments", "artifact_location") not in columns:
            return
        found = [
            re.fullmatch(rf"((?:file://)?(/.*)/{ARTIFACTS})(?:/\d+)?", place or "")
            for (place,) in database.execute("SELECT artifact_location FROM experiments")
        ]
        for place, folder in {(match[1], Path(match[2])) for match in found if match and match[1] != here}:
            if not (path.parent / ARTIFACTS).is_dir() and (folder / ARTIFACTS).is_dir():
                continue  # chosen on purpose: the files are there and not here
            for table, column in columns:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} LIKE ? || "
                    "'/%'",
                    (here, len(place) + 1, place, place),
                )
            log(f"{path}: the tracked files of {folder} are read from {path.parent} now")
