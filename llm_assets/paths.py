"""The output folder of all runs: `var/` of the repository, or the value of LLM_ASSETS_VAR.

Below it: `artifacts/` (published versions), `scratch/` (work in progress), `cache/` (copies of a remote store's
artifacts), `mlflow.db` and `mlartifacts/` (tracking), `logs/` (records of runs), `sweeps/` (tables of results),
`page-addresses` (`page_links.py`). Read at each call, so that a test can move it.
"""

import os
import tempfile
from pathlib import Path

from model.errors import PipelineError

REPOSITORY = Path(__file__).resolve().parent.parent


def var_dir() -> Path:
    """The output folder of all runs, absolute."""
    return Path(os.environ.get("LLM_ASSETS_VAR") or REPOSITORY / "var").absolute()


def output_folder(name: str) -> Path:
    """The folder `name` of the output folder, made if it is missing. Raises PipelineError if it cannot be made."""
    folder = var_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PipelineError(
            f"{folder} cannot be written ({error.strerror}): expected a folder for what runs write; make it "
            "writable, or set LLM_ASSETS_VAR to another"
        ) from error
    return folder


def shown_path(path: Path | str) -> str:
    """A path for display: relative to the working directory if it is inside it. A URL stays as it is."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else str(path)
