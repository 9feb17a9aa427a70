"""Creates and repairs the SQLite tracking database below var/, waits for its other writers, and relocates its files.

MLflow creates its tables in many transactions, so a process killed halfway would leave a database on which every later
run fails: the database is created under another name and renamed. MLflow stores absolute artifact locations: after its
folder was moved or copied, they are rewritten before anything is read or written.
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

WAIT_S, LOG_AFTER_S, LOG_EVERY_S = 600.0, 3.0, 10.0
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

    Only one process at a time may call it. Raises PipelineError if the file is not a database, has another schema
    than the installed MLflow, or stays locked.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()  # from a process that was killed while it created one
    if not path.is_file() or path.stat().st_size == 0:
        _create(path)
    _wait_for_writers(path, log)
    if _is_incomplete(path):
        broken = path.with_name(path.name + ".broken")
        path.replace(broken)
        log(f"{path} was incomplete and held no runs: renamed to {broken.name}, creating a new one")
        _create(path)
    _check_schema(path)
    _relocate(path, log)


def _is_incomplete(path: Path) -> bool:
    """Whether MLflow was stopped while it created this database: tables are missing, and there is no data yet."""
    columns = _columns(path)
    if columns and not columns.keys() & (_expected_columns().keys() | {"alembic_version"}):
        return False  # a database of another program
    with closing(sqlite3.connect(path, timeout=60.0)) as database:
        holds = [table for table in ("runs", "tags", "registered_models") if table in columns]
        if any(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in holds):
            return False
    revision = _revision(path)
    if not revision:
        return True
    known, newest = _revisions()
    return revision in known and revision != newest and not columns.keys() >= _expected_columns().keys()


def _check_schema(path: Path) -> None:
    """Raise PipelineError, one line, if the installed MLflow cannot use the tables of this database.

    MLflow itself would fill in missing tables, as if there had never been runs.
    """
    from mlflow import __version__

    (known, newest), revision, columns = _revisions(), _revision(path), _columns(path)
    missing = [
        f"column {table}.{column}" if table in columns else f"table {table}"
        for table, names in _expected_columns().items()
        for column in sorted(names - columns.get(table, set()))
    ]
    missing = list(dict.fromkeys(missing))  # a table that is missing is named once
    expected = f"MLflow {__version__} expects"
    if revision in known and revision != newest:
        raise PipelineError(
            f"{path} has the schema {revision} of an older MLflow, {expected} {newest}: copy the file to keep it, then "
            f"run: mlflow db upgrade sqlite:///{path}"
        )
    if revision and revision not in known:
        raise PipelineError(
            f"{path} has the schema {revision}, {expected} {newest} or older: a newer MLflow or another program wrote "
            "it; install that MLflow, or move the file away and run again for a new one"
        )
    if missing or not revision:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PipelineError(
            f"{path} has no {missing[0] if missing else 'schema version in table alembic_version'}{others}, which "
            f"{expected}: restore the file from a backup, or move it away and run again for a new one"
        )


def _columns(path: Path) -> dict[str, set[str]]:
    """The columns of each table of a database, generated ones included."""
    with closing(sqlite3.connect(path, timeout=60.0)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            table: {name for (name,) in database.execute("SELECT name FROM pragma_table_xinfo(?)", (table,))}
            for table in tables
        }


def _expected_columns() -> dict[str, set[str]]:
    """The columns of each table that the installed MLflow reads and writes."""
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.model_registry.dbmodels import models as registry_tables
    from mlflow.store.tracking.dbmodels import models as tracking_tables

    assert registry_tables and tracking_tables  # imported for the tables that they declare
    return {name: set(table.columns.keys()) for name, table in Base.metadata.tables.items()}


def _revision(path: Path) -> str:
    """The schema version of a database; empty if it has none."""
    if "version_num" not in _columns(path).get("alembic_version", set()):
        return ""
    with closing(sqlite3.connect(path, timeout=60.0)) as database:
        row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else ""


def _revisions() -> tuple[set[str], str]:
    """All schema versions that the installed MLflow can upgrade from, and the newest, which it expects."""
    import mlflow.store.db_migrations
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(mlflow.store.db_migrations.__path__[0])))
    return {one.revision for one in script.walk_revisions()}, script.get_current_head() or ""


def _create(path: Path) -> None:
    from mlflow import MlflowClient

    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    logging.disable(logging.INFO)  # MLflow logs a line for each of fifty migrations
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
    next_logged = started + LOG_AFTER_S
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
                    f"{path} cannot be used as tracking database: {error}; move it away or repair it"
                ) from None
            if now - started > WAIT_S:
                raise PipelineError(
                    f"{path} has been locked by another program for {WAIT_S:.0f} s: end that program and run again"
                ) from None
            if now > next_logged:
                next_logged = now + LOG_EVERY_S
                log(stopped_holder(path) or f"waiting for another program that holds {path}")


def _relocate(path: Path, log: Log) -> None:
    """Rewrite the artifact locations of this folder's former path, if its files were moved or copied with it."""
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
                continue  # a location chosen on purpose: its files are there, not here
            for table, column in columns:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} LIKE ? || "
                    "'/%'",
                    (here, len(place) + 1, place, place),
                )
            log(f"{path}: the tracked files of {folder} are now read from {path.parent}")
