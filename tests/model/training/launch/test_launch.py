"""A training in several processes makes what one process makes, and leaves none of them behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from model.errors import PipelineError, TransientError
from model.settings import ComputeSettings, TrainingSettings
from model.system.lifeline import Presence
from model.training.arguments import share_batch, training_arguments
from model.training.checkpoints import local as checkpoints
from model.training.launch import worker
from model.training.launch.job import PRESENCE, REPORTS, rendezvous, worker_environment
from model.training.launch.start import Reports, launch
from tests.model.training.launch.test_distributed import REPO, assert_same_curve, curve
from tests.model.training.launch.tiny import one_process, two_processes
from tests.model.training.tiny import experiment


@pytest.fixture(scope="module")
def one(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training in this process."""
    directory = tmp_path_factory.mktemp("one")
    launch(one_process(), dataset_dir, directory / "output", directory / "scratch")
    return directory


def workers(scratch: Path) -> list[psutil.Process]:
    """Living processes of the training in `scratch`, of its agent too."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(scratch) in " ".join(process.cmdline()) and "model.training.launch" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_a_checkpoint(scratch: Path) -> None:
    while not checkpoints.steps_saved(scratch):  # the limit is the test's own
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_make_the_model_of_one_though_one_of_them_is_killed(one, dataset_dir, tmp_path):
    killed: list[int] = []
    scratch, log = tmp_path / "scratch", []

    def kill_a_worker(step: int, metrics: dict[str, float]) -> None:
        if step and not killed:
            found = [process for process in workers(scratch) if "launch.worker" in " ".join(process.cmdline())]
            killed.append(max(process.pid for process in found))
            os.kill(killed[0], signal.SIGKILL)

    summary = launch(
        two_processes(), dataset_dir, tmp_path / "output", scratch, log=log.append, on_metrics=kill_a_worker
    )
    assert killed
    assert sum(line.startswith("training ") for line in log) == 2  # it was started again
    assert workers(scratch) == []
    assert summary.steps == 60
    assert_same_curve(curve(tmp_path / "output"), curve(one / "output"))
    ours, theirs = (load_file(directory / "output" / "model.safetensors") for directory in (tmp_path, one))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() <= 5e-3 * theirs[name].abs().max(), name


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_launcher_leaves_no_process_and_one_process_goes_on(one, dataset_dir, tmp_path):
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    program = str(REPO / "tests" / "model" / "training" / "launch" / "launcher.py")
    launcher = subprocess.Popen(
        [sys.executable, program, str(dataset_dir), str(output), str(scratch)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    wait_for_a_checkpoint(scratch)
    launcher.kill()
    launcher.wait()
    assert Presence(scratch / PRESENCE).wait_for_none(300)
    assert [process for process in workers(scratch) if process.pid != launcher.pid] == []
    steps = checkpoints.steps_saved(scratch)
    assert steps[-1] < 60
    summary = launch(one_process(), dataset_dir, output, scratch)
    assert summary.resumed_from_step == steps[-1]
    assert_same_curve(curve(output), curve(one / "output"))


@pytest.mark.slow
@pytest.mark.processes
def test_a_cancelled_training_saves_and_leaves_no_process(dataset_dir, tmp_path):
    scratch = tmp_path / "scratch"

    def cancel(step: int, metrics: dict[str, float]) -> None:
        if step:
            raise KeyboardInterrupt  # as a signal handler of the caller does

    with pytest.raises(KeyboardInterrupt):
        launch(two_processes(), dataset_dir, tmp_path / "output", scratch, on_metrics=cancel)
    assert workers(scratch) == []
    assert Presence(scratch / PRESENCE).wait_for_none(0)
    assert checkpoints.steps_saved(scratch)


# -- what needs no processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "passes", "processes", "shared"),
    [(8, 1, 2, (4, 1)), (8, 4, 2, (8, 2)), (8, 3, 2, (6, 2)), (6, 1, 3, (2, 1)), (1, 6, 3, (1, 2)), (5, 2, 10, (1, 1))],
)
def test_the_batch_is_shared_out_whole(size, passes, processes, shared):
    settings = TrainingSettings(per_device_train_batch_size=size, gradient_accumulation_steps=passes)
    found = share_batch(settings, 1, processes)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == shared
    assert size * passes == processes * shared[0] * shared[1]


def test_a_batch_that_cannot_be_shared_out_is_refused_when_the_settings_are_made():
    with pytest.raises(PipelineError, match=r"compute.processes times compute.nodes is 6: .* divides the 2 windows"):
        replace(experiment(), compute=ComputeSettings(engine="torchrun", processes=3, nodes=2))
    dropping = experiment(per_device_train_batch_size=4)
    with pytest.raises(PipelineError, match=r"model.attention_dropout is 0.1: expected 0 for 2 training processes"):
        replace(dropping, compute=ComputeSettings(engine="torchrun", processes=2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"processes": 2}, "compute.processes is 2: expected 1 for compute.engine 'local'"),
        ({"nodes": 0}, "compute.nodes is 0: expected 1 for compute.engine 'local'"),
        ({"engine": "torchrun", "endpoint": "host"}, "compute.endpoint is 'host': expected HOST:PORT"),
        ({"engine": "torchrun", "endpoint": "host:70000"}, "compute.endpoint is 'host:70000'"),
        ({"engine": "torchrun", "processes": 0}, "compute.processes is 0: expected a number greater than 0"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PipelineError) as error:
        ComputeSettings(**options)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, "full_shard", ["full_shard", "auto_wrap"]])
def test_sharding_of_parameters_is_refused_by_name_on_a_cpu(value, tmp_path):
    import torch

    settings = TrainingSettings(arguments={"fsdp": value})
    with pytest.raises(PipelineError, match=r"training.arguments names 'fsdp': on a CPU it would shard nothing"):
        training_arguments(settings, tmp_path, torch.device("cpu"), "float32")
    for off in (False, "", None):
        training_arguments(TrainingSettings(arguments={"fsdp": off}), tmp_path, torch.device("cpu"), "float32")


def test_hosts_meet_where_options_or_a_site_say(monkeypatch):
    for name in ("SLURM_NNODES", "PET_NNODES", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    several = ComputeSettings(engine="torchrun", nodes=2)
    assert rendezvous(ComputeSettings(engine="torchrun", nodes=0)) == (1, "")
    with pytest.raises(PipelineError, match=r"compute.nodes is 2 and compute.endpoint is empty: expected HOST:PORT"):
        rendezvous(several)
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    assert rendezvous(several) == (2, "node-0:29400")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert rendezvous(replace(several, nodes=0)) == (4, "node-0:1234")
    assert rendezvous(replace(several, endpoint="node-1:29500")) == (2, "node-1:29500")
    monkeypatch.setenv("SLURM_NNODES", "four")
    with pytest.raises(PipelineError, match=r"SLURM_NNODES is 'four': expected a number for compute.nodes"):
        rendezvous(replace(several, nodes=0))


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("model.training.launch.job.usable_cores", lambda: 16)
    assert worker_environment(4)["OMP_NUM_THREADS"] == "4"
    assert worker_environment(32)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environment(4)["OMP_NUM_THREADS"] == "3"


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(PipelineError, match=r"compute.processes is 4: expected at most the 2 GPUs of "):
        worker.expect_devices("auto", 4)
    worker.expect_devices("cuda", 2)
    worker.expect_devices("cpu", 4)


def test_what_a_process_reports_arrives_and_its_error_is_raised(tmp_path):
    log, metrics = [], []
    reports = Reports(tmp_path, log.append, lambda step, values: metrics.append((step, values)))
    file = tmp_path / "rank-0.jsonl"
    file.write_text('{"log": "one"}\n{"step": 3, "metrics": {"loss": 1.5}}\n{"log": "tw')
    reports.read()
    reports.read()
    assert (log, metrics) == (["one"], [(3, {"loss": 1.5})])
    with file.open("a") as half:
        half.write('o"}\n')
    reports.read()
    assert log == ["one", "two"]
    (tmp_path / "rank-1.jsonl").write_text('{"error": "a disk was busy", "is_transient": true}\n')
    with pytest.raises(TransientError, match="a disk was busy"):
        reports.read()


def test_a_refusal_in_a_process_is_reported_in_one_line(dataset_dir, tmp_path, monkeypatch):
    settings = experiment(arguments={"no_such_argument": 1})
    (tmp_path / REPORTS).mkdir()
    job = {"settings": asdict(settings), "scratch": str(tmp_path)}
    job |= {"dataset": str(dataset_dir), "output": str(tmp_path / "output")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    for name, value in {"RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "job.json")])
    assert worker.main() == 1
    with pytest.raises(PipelineError, match=r"training.arguments names 'no_such_argument'"):
        Reports(tmp_path / REPORTS, lambda line: None, None).read()
