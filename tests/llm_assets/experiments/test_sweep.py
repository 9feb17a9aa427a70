"""The sweep's command line: a mistake at any point is named before a run starts."""

import subprocess
import sys

import pytest


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
    ],
    ids=["one run", "a sweep", "an unknown option", "a wrong type", "an unknown experiment", "no value"],
)
def test_a_mistake_ends_the_sweep_before_a_run_starts(arguments, says):
    done = subprocess.run(
        [sys.executable, "-m", "llm_assets.experiments.sweep", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert "RUN_START" not in done.stderr + done.stdout
