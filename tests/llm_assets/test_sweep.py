"""The sweep: a mistake at any point is named before a run starts, and its points run on a Ray cluster."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from llm_assets.paths import REPOSITORY
from tests.e2e.workplace import new_workplace
from tests.model.system.test_cluster import cluster_of_one_host, with_ray


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["experiment=smoke", "training.max_steps=0"], "training.max_steps is 0: expected a number greater than 0"),
        (["--multirun", "experiment=smoke", "training.max_steps=-1,5"], "training.max_steps is -1"),
        (["--multirun", "experiment=smoke", "training.max_stps=1,5"], "Key 'max_stps' not in 'TrainingSettings'"),
        (["experiment=smoke", "training.max_steps=many"], "'many' of type 'str' could not be converted to Integer"),
        (["experiment=smok"], "Could not find 'experiment/smok'"),
        (["experiment=smoke", "training.max_steps"], "training.max_steps"),
        (["--multirun", "experiment=smoke", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=0"], "n_trials is 0"),
        (["experiment=smoke", "--overrides", "training.seed='0"], "training.seed='0: no closing quotation"),
    ],
    ids=[
        "one run",
        "a sweep",
        "an unknown option",
        "a wrong type",
        "an unknown experiment",
        "no value",
        "no trials",
        "a quote",
    ],
)
def test_a_mistake_ends_the_sweep_before_a_run_starts(arguments, says):
    done = subprocess.run(
        [sys.executable, "-m", "llm_assets.sweep", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert "RUN_START" not in done.stderr + done.stdout


@pytest.mark.processes
def test_make_passes_overrides_on_as_they_are(tmp_path):
    seeds, paths = "training.seed=range(0,2)", "corpus=files 'corpus.paths=[my notes/**/*.md]'"
    command = [
        "make",
        "--no-print-directory",
        "--old-file=.venv/.installed",
        "sweep",
        "DRY_RUN=true",
        "EXPERIMENT=smoke",
    ]
    done = subprocess.run(
        [*command, f"OVERRIDES={seeds} {paths}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    planned = [shlex.split(line)[4:] for line in done.stdout.splitlines()]
    assert planned == [
        [f"training.seed={seed}", "corpus=files", "corpus.paths=[my\\ notes/**/*.md]"] for seed in (0, 1)
    ]


SEARCH = """
import sys
import hydra
from hydra.core.hydra_config import HydraConfig
from llm_assets.experiments import compose, optuna_sweeper

def task(settings):
    overrides = HydraConfig.get().overrides.task
    print(*overrides)
    if "training.seed=1" in overrides:
        sys.exit(1)  # as a failed run
    return abs(settings.training.muon_learning_rate - 0.02) + (settings.training.optim == "adamw")

sys.argv[1:] += ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra.sweep.dir=.", "hydra.sweep.subdir=.",
                 "hydra/job_logging=none", "hydra/hydra_logging=none"]
hydra.main(config_path=str(compose.CONFIG_DIR), config_name="config")(task)()
"""


def search(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SEARCH, "--multirun", "experiment=smoke", "hydra/sweeper=optuna", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HYDRA_FULL_ERROR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.processes
def test_optuna_searches_intervals_ranges_and_choices_and_goes_on_after_a_failure(tmp_path):
    space = ["training.muon_learning_rate=tag(log,interval(0.005,0.1))", "training.optim=muon,adamw"]
    done = search(tmp_path, "hydra.sweeper.n_trials=9", *space, "training.seed=range(0,2)")
    assert done.returncode == 0, done.stderr
    points = [dict(item.split("=") for item in line.split()) for line in done.stdout.splitlines()]
    assert len(points) == 9
    assert all(0.005 <= float(point["training.muon_learning_rate"]) <= 0.1 for point in points)
    assert {point["training.optim"] for point in points} == {"muon", "adamw"}
    assert {point["training.seed"] for point in points} == {"0", "1"}


@pytest.mark.processes
def test_a_search_whose_trials_all_fail_is_one_error(tmp_path):
    done = search(tmp_path, "hydra.sweeper.n_trials=2", "training.seed=1")
    assert done.returncode == 1
    assert "none of 2 trials has a score" in done.stderr.splitlines()[-1]


@with_ray
def test_the_points_of_a_sweep_run_on_a_ray_cluster_under_their_names(tmp_path: Path) -> None:
    points = ["training.seed=0", "training.seed=1"]
    with cluster_of_one_host(tmp_path / "log") as ((address, _), variables, logs):
        workplace = replace(new_workplace(tmp_path / "user"), variables=variables)
        overrides = [
            "--job",
            "training_pipeline",
            "compute=ray",
            f"compute.address={address}",
            "compute.processes=2",
            "training.seed=0,1",
        ]
        done = workplace.run("python", "-m", "llm_assets.sweep", "--multirun", "experiment=smoke", *overrides)
        assert done.returncode == 0, done.stdout[-3000:]
        # Ray numbers the steps that connect, and names the log of a worker after the one that it works for.
        steps = {log.name.split("-")[2] for log in logs.glob("worker-*.out")} - {"ffffffff"}
    (table,) = (workplace.var / "sweeps").glob("*.json")
    found = json.loads(table.read_text())
    scores = [point["bits_per_byte"] for point in found["points"]]
    assert len(set(scores)) == 2 and found["best"].endswith(points[scores.index(min(scores))])
    with dg.DagsterInstance.from_config(str(workplace.root / "dagster")) as instance:
        runs = {run.tags["rex/point"]: run for run in instance.get_runs()}
        reused = instance.get_latest_materialization_event(dg.AssetKey("tokenized_dataset")).asset_materialization
    assert sorted(runs) == ["1", "2"] and all(run.is_success for run in runs.values())
    for number, point in enumerate(points, 1):
        assert runs[str(number)].tags["rex/sweep"] == table.stem
        assert point in runs[str(number)].tags["rex/overrides"]
    assert reused.metadata["unchanged"].value  # the second point has the tokens of the first
    # Corpus, tokens and training of the first point, and the training of the second.
    assert steps == {"01000000", "02000000", "03000000", "04000000"}
