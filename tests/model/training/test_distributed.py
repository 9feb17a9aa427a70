"""Two gloo processes under torchrun: one batch shared out, one writer, one termination for both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from model.errors import PipelineError
from model.training import checkpoints
from model.training.trainer import train
from tests.model.training.tiny import experiment

REPO = Path(__file__).resolve().parents[3]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = str(REPO / "tests" / "model" / "training" / "worker.py")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
        + [str(argument) for argument in arguments],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def curve(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "curves.json").read_text())


@pytest.fixture(scope="module")
def two_processes(dataset_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    done = torchrun(dataset_dir, directory / "output", directory / "scratch")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_two_processes_train_as_one_with_the_same_batch(two_processes, dataset_dir, tmp_path):
    settings = experiment(per_device_train_batch_size=2)
    settings.model.attention_dropout = 0.0
    train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch")
    alone, shared = curve(tmp_path / "output"), curve(two_processes / "output")
    assert [entry["step"] for entry in shared] == [entry["step"] for entry in alone]
    for ours, theirs in zip(shared, alone, strict=True):
        for key in ours.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)


def test_a_termination_of_one_process_ends_both_and_the_run_resumes_bit_exact(two_processes, dataset_dir, tmp_path):
    stopped = torchrun(dataset_dir, tmp_path / "output", tmp_path / "scratch", 6)
    assert stopped.returncode != 0
    assert checkpoints.steps_saved(tmp_path / "scratch")[-1] == 7
    mark = str(tmp_path / "scratch")
    assert not [p for p in psutil.process_iter() if mark in " ".join(_command(p))]
    resumed = torchrun(dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    weights = [directory / "output" / "model.safetensors" for directory in (tmp_path, two_processes)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert curve(tmp_path / "output") == curve(two_processes / "output")


def test_checkpoints_of_two_processes_are_refused_by_one(two_processes, dataset_dir, tmp_path):
    settings = experiment(per_device_train_batch_size=1)
    settings.model.attention_dropout = 0.0
    with pytest.raises(PipelineError, match=r"another training \(processes differ\)"):
        train(settings, dataset_dir, tmp_path / "output", two_processes / "scratch")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
