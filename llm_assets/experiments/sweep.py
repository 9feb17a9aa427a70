"""Runs the pipeline with Hydra overrides: once, or once for each point of a Hydra multirun sweep.

    python -m llm_assets.experiments.sweep experiment=stdlib training.max_steps=200
    python -m llm_assets.experiments.sweep --multirun experiment=smoke training.seed=0,1 training.optim=muon,adamw
    python -m llm_assets.experiments.sweep --module llm_assets.images --job container_image_cpu_job experiment=smoke

Each point is one Dagster run of `llm_pipeline`, or of another job of a code location: the experiment is its partition,
the other overrides go to the `hydra` resource. A sweep over experiments alone is a Dagster backfill as well: select the
partitions in the UI.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig

from llm_assets.dagster_home import check_dagster_home
from llm_assets.experiments.compose import COMPOSING_ERRORS, CONFIG_DIR, one_line
from model.errors import PipelineError, ends_in_one_line


def execute_job(experiment: str, overrides: list[str], module: str, job: str) -> int:
    """Run `job` of `module` for one experiment through `dagster job execute` and return its exit status."""
    run_config = {"resources": {"hydra": {"config": {"overrides": overrides}}}}
    with tempfile.TemporaryDirectory() as directory:
        config_file = Path(directory) / "run_config.yaml"
        config_file.write_text(json.dumps(run_config))  # JSON is YAML
        command = [sys.executable, "-m", "dagster", "job", "execute", "-m", module, "-j", job]
        command += ["-c", str(config_file), "--tags", json.dumps({"dagster/partition": experiment})]
        return subprocess.run(command, check=False).returncode


def run_point(module: str, job: str) -> None:
    """Run the point of the sweep that Hydra is at; stops the sweep at the first failure."""
    configuration = HydraConfig.get()
    experiment = configuration.runtime.choices["experiment"]
    overrides = [item for item in configuration.overrides.task if not item.startswith("experiment=")]
    # In a process of its own: Hydra is busy with the sweep in this one.
    check = [sys.executable, "-m", "llm_assets.experiments", experiment, *overrides]
    status = subprocess.run(check, stdout=subprocess.DEVNULL, check=False).returncode
    status = status or execute_job(experiment, overrides, module, job)
    if status:
        sys.exit(status)


@ends_in_one_line
def main() -> int:
    """Let Hydra read the command line and call `run_point` for each point; the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--module", default="llm_assets.definitions")
    parser.add_argument("--job", default="llm_pipeline")
    ours, hydras = parser.parse_known_args()
    check_dagster_home()
    # Hydra would make a folder and a log for each point; the record of a run is Dagster's and MLflow's.
    sys.argv[1:] = [*hydras, "hydra.output_subdir=null", "hydra.run.dir=.", "hydra.sweep.dir=var/sweep"]
    sys.argv += ["hydra.sweep.subdir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]

    def point(_: Any) -> None:
        run_point(ours.module, ours.job)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would print in many lines
    try:
        hydra.main(config_path=str(CONFIG_DIR), config_name="config")(point)()
    except COMPOSING_ERRORS as error:
        raise PipelineError(f"{' '.join(hydras)}: {one_line(error)}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
