"""Serves MLflow's page on the tracking database below var/: `llm_assets/ui.py` runs this.

    python -m llm_assets.instance.mlflow_server 127.0.0.1 5000

First the database is created or repaired, and its locations are corrected after a move. MLflow's own command then sets
up its server, which runs in this process, too: MLflow would start another process for it and wait, and each takes 200
MB and seconds to import the package. Dagster, which takes 100 MB more, is not imported.

Its address opens the runs of the experiment. MLflow's own home is about traces of agents, of which there are none here.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from llm_assets.paths import var_dir
from llm_assets.resources.tracking_database import ARTIFACTS
from llm_assets.resources.tracking_store import EXPERIMENT, open_store
from model.errors import ends_in_one_line

START = """<script>
// Defaults for settings that the page keeps in the browser: the view for training, no assistant beside it, and columns
// of the table of runs.
for (const [name, value] of [
  ["mlflow.workflowType_v1", '"machine_learning"'], ["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true"],
  ['MLflowLocalStorage-1.1-ExperimentPage-["EXPERIMENT_ID"]-ReactComponentState',
    JSON.stringify({selectedColumns: ["metrics.`bits_per_byte`", "attributes.`Source`", "attributes.`Dataset`"]})],
]) localStorage.getItem(name) ?? localStorage.setItem(name, value);
if (!location.hash) location.replace("#/experiments/EXPERIMENT_ID/runs");
</script>"""


def start_page(index: Path, experiment_id: str) -> str:
    """MLflow's page, which opens on the runs of an experiment unless its address names a place."""
    return index.read_text(encoding="utf-8").replace("<head>", "<head>" + START.replace("EXPERIMENT_ID", experiment_id))


def serve_here(cmd: list[str], *, extra_env: Mapping[str, str] | None = None, **_: Any) -> None:
    """Run the command `python -m uvicorn ...` in this process, until a signal arrives."""
    os.environ.update(extra_env or {})
    uvicorn.main(cmd[3:], standalone_mode=False)
    sys.exit(0)


@ends_in_one_line
def main() -> int:
    """Serve until a signal arrives."""
    host, port = sys.argv[1:]
    database = f"sqlite:///{var_dir() / 'mlflow.db'}"
    _, experiment_id = open_store(database, EXPERIMENT)
    from mlflow import server
    from mlflow.cli import cli

    server._exec_cmd = serve_here
    index = Path(str(server.app.static_folder), "index.html")
    server.app.view_functions["serve"] = lambda: start_page(index, experiment_id)
    place = ["--host", host, "--port", port, "--workers", "1"]
    store = ["--backend-store-uri", database, "--default-artifact-root", str(var_dir() / ARTIFACTS)]
    cli.main(["server", *place, *store], prog_name="mlflow", standalone_mode=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
