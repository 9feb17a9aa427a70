"""Runs the pipeline with Hydra overrides: once, or once for each point of a Hydra multirun sweep.

    python -m llm_assets.sweep experiment=stdlib training.max_steps=200
    python -m llm_assets.sweep --multirun experiment=smoke training.seed=0,1 training.optim=muon,adamw
    python -m llm_assets.sweep --multirun experiment=smoke,stdlib
    python -m llm_assets.sweep --multirun experiment=smoke hydra/sweeper=optuna 'training.seed=interval(0,99)'
    python -m llm_assets.sweep --multirun --job training_pipeline experiment=smoke training.seed=range(0,5)
    python -m llm_assets.sweep --module llm_assets.images --job container_image_cpu_job experiment=smoke
    python -m llm_assets.sweep --dry-run --multirun experiment=smoke training.seed=0,1

Each point is one Dagster run of `llm_pipeline`, of `training_pipeline`, which ends with the trained checkpoint, or of
another job of a code location: the experiment is its partition, the other overrides go to the `hydra` resource and are
its tag `rex/overrides`. After several points a table names the best one; var/sweeps/ keeps it, and MLflow has it as an
artifact of a separate run. `hydra/sweeper=optuna` searches for the best point instead of trying all
(`experiments/optuna_sweeper.py`).
`--overrides TEXT` are more of them in one text, divided and quoted as in a shell: what `make` takes as OVERRIDES.
With `--dry-run` each point's settings are checked and its run is named, not started; a search then gets equal scores.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from llm_assets.experiments import optuna_sweeper  # noqa: F401 - registers `hydra/sweeper=optuna`
from llm_assets.experiments.compose import COMPOSING_ERRORS, CONFIG_DIR, one_line
from llm_assets.instance.dagster_home import check_dagster_home
from llm_assets.resources.provenance import POINT_TAG
from llm_assets.terminal.execute import DEFINITIONS, PIPELINE, TRAINING, check_settings, execute_job, print_planned
from llm_assets.terminal.points import Sweep
from model.errors import PipelineError, ends_in_one_line


@dataclass(frozen=True)
class Job:
    """The job that is run at each point."""

    module: str
    name: str
    tags: dict[str, str]
    dry_run: bool = False
    """Check the settings of each point and print it instead."""


def run_point(job: Job, sweep: Sweep | None) -> float | None:
    """Run the current point of the sweep; returns its bits per byte, which Optuna minimizes, or None for other jobs.

    A failure stops the sweep, except that Optuna's search goes on with the next point.
    """
    configuration = HydraConfig.get()
    experiment = configuration.runtime.choices["experiment"]
    overrides = [item for item in configuration.overrides.task if not item.startswith("experiment=")]
    status = check_point(experiment, overrides, job)
    tags = dict(job.tags)
    if job.dry_run and not status:
        print_planned(job.name, experiment, overrides)
        return 0.0  # a search wants a score
    if sweep:
        number = sweep.begin(experiment, overrides)
        print(f"\npoint {number}: {sweep.points[-1].name}", flush=True)
        tags |= {"rex/sweep": sweep.name, POINT_TAG: str(number)}
    status = status or execute_job(experiment, overrides, job.module, job.name, tags=tags)
    if status:
        if sweep:
            sweep.fail()
        sys.exit(status)
    if not sweep or job.name not in (PIPELINE, TRAINING):
        return None
    return sweep.finish(experiment, is_whole=job.name == PIPELINE)


@ends_in_one_line
def check_point(experiment: str, overrides: Sequence[str], job: Job) -> int:
    """Check the settings of a point; returns the exit status, after one line about a mistake.

    Hydra composes one configuration at a time: that of the sweep, which calls this, is put away meanwhile.
    """
    hydras = GlobalHydra.instance()
    sweeping, hydras.hydra = hydras.hydra, None
    try:
        check_settings(experiment, overrides, job.name, dry_run=job.dry_run)
    finally:
        GlobalHydra.instance().hydra = sweeping
    return 0


@ends_in_one_line
def main() -> int:
    """Let Hydra read the command line and call `run_point` for each point; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--module", default=DEFINITIONS)
    parser.add_argument("--job", default=PIPELINE)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--overrides", default="")
    ours, hydras = parser.parse_known_args()
    try:
        hydras += shlex.split(ours.overrides)
    except ValueError as error:
        raise PipelineError(f"overrides: {ours.overrides}: {str(error).lower()}; give quotes in pairs") from error
    if {"--help", "-h"} & set(hydras):  # Hydra's own help lists the options; llm_assets.experiments does that better
        print(__doc__)
        return 0
    check_dagster_home()
    # Hydra would make a folder and a log for each point, but Dagster and MLflow record the runs.
    sys.argv[1:] = [*hydras, "hydra.output_subdir=null", "hydra.run.dir=.", "hydra.sweep.dir=var/sweep"]
    sys.argv += ["hydra.sweep.subdir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    job = Job(ours.module, ours.job, {"rex/force": "true"} if ours.force else {}, ours.dry_run)
    sweep = Sweep(hydras) if {"--multirun", "-m"} & set(hydras) else None

    def point(_: Any) -> float | None:
        return run_point(job, sweep)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them in many lines
    try:
        hydra.main(config_path=str(CONFIG_DIR), config_name="config")(point)()
    except COMPOSING_ERRORS as error:
        raise PipelineError(f"{' '.join(hydras)}: {one_line(error)}") from error
    finally:
        if sweep:
            sweep.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
