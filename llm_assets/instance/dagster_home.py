"""Checks that Dagster can write to its home: an error is one line instead of Dagster's traceback of 70.

    python -m llm_assets.instance.dagster_home

The make targets and the sweep run it first. It leaves no files behind.
"""

import os
import sys
import tempfile
from pathlib import Path

from model.errors import PipelineError, ends_in_one_line

DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
"""Files that Dagster's SQLite storage opens for writing at every start."""


def check_dagster_home() -> None:
    """Raise PipelineError, one line, if DAGSTER_HOME is set and cannot be written."""
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        return  # Dagster then keeps its records in a temporary folder
    try:
        Path(home).mkdir(parents=True, exist_ok=True)
        for folder in [Path(home), *{(Path(home) / name).parent for name in DATABASES}]:
            if folder.exists():
                with tempfile.TemporaryFile(dir=folder):
                    pass
        for database in (Path(home) / name for name in DATABASES):
            if database.exists():
                database.open("r+b").close()
    except OSError as error:
        raise PipelineError(
            f"DAGSTER_HOME {home} cannot be written ({error.strerror}: {error.filename}): expected a folder for "
            "Dagster's records; make it writable, or set DAGSTER_HOME to another (with a copy of dagster.yaml)"
        ) from error


@ends_in_one_line
def main() -> int:
    """Check DAGSTER_HOME."""
    check_dagster_home()
    return 0


if __name__ == "__main__":
    sys.exit(main())
