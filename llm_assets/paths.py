"""The output folder of all runs: `var/` of the repository, or the value of LLM_ASSETS_VAR.

Below it: `artifacts/` (published versions), `scratch/` (work in progress), `cache/` (copies of a remote store's
artifacts), `mlflow.db` and `mlartifacts/` (tracking), `logs/` (records of runs), `sweeps/` (tables of results),
`page-addresses` (`page_links.py`). Read at each call, so that a test can move it.
"""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def var_dir() -> Path:
    """The output folder of all runs, absolute."""
    return Path(os.environ.get("LLM_ASSETS_VAR") or REPOSITORY / "var").absolute()


def shown_path(path: Path) -> str:
    """A path for display: relative to the working directory if it is inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
