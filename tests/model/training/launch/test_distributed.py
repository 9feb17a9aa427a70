"""Two gloo processes under torchrun: one batch divided, one writer, one termination for both."""

import json
import shutil
from pathlib import Path

import pytest

from model.errors import PipelineError
from model.training.arguments import accumulation_steps
from model.training.checkpoints import local as checkpoints
from model.training.train import train
from tests.model.training.tiny import experiment
from tests.support import forked

REPO = Path(__file__).resolve().parents[4]


def torchrun(log: Path, *arguments: object, worker: str = "worker.py") -> forked.Ended:
    """Two processes of a worker under torchrun's own agent; all three are forked, for the imports."""
    program = Path(__file__).with_name(worker)
    options = ["--standalone", "--nproc-per-node", 2, "--start-method", "fork", "--run-path"]
    return forked.run("from torch.distributed.run import main; main()", *options, program, *arguments, log=log)


def curve(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "curves.json").read_text())


def assert_same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Up to the rounding of sums in another order."""
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key in one.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


@pytest.fixture(scope="module")
def two_processes(dataset_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    done = torchrun(directory / "log", dataset_dir, directory / "output", directory / "scratch")
    assert done.status == 0, done.said[-3000:]
    return directory


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_train_as_one_with_the_same_batch(two_processes, dataset_dir, tmp_path):
    settings = experiment(per_device_train_batch_size=2)
    settings.model.attention_dropout = 0.0
    train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert_same_curve(curve(two_processes / "output"), curve(tmp_path / "output"))


@pytest.mark.slow
@pytest.mark.processes
def test_a_termination_of_one_process_ends_both_and_the_run_resumes_bit_exact(two_processes, dataset_dir, tmp_path):
    stopped = torchrun(tmp_path / "log", dataset_dir, tmp_path / "output", tmp_path / "scratch", 6)
    assert stopped.status != 0 and stopped.left == []
    assert checkpoints.steps_saved(tmp_path / "scratch")[-1] == 7
    shutil.copytree(tmp_path / "scratch", tmp_path / "scratch for one")
    resumed = torchrun(tmp_path / "log", dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert resumed.status == 0, resumed.said[-3000:]
    weights = [directory / "output" / "model.safetensors" for directory in (tmp_path, two_processes)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert curve(tmp_path / "output") == curve(two_processes / "output")
    # One process goes on with what two began: twice the passes a step, the same batches.
    settings = experiment(per_device_train_batch_size=1)
    settings.model.attention_dropout = 0.0
    summary = train(settings, dataset_dir, tmp_path / "output of one", tmp_path / "scratch for one")
    assert summary.resumed_from_step == 7
    assert_same_curve(curve(tmp_path / "output of one"), curve(two_processes / "output"))


@pytest.mark.parametrize(("initial", "now", "passes"), [(2, 1, 8), (1, 2, 2), (4, 8, 2), (3, 2, 6), (8, 8, 4)])
def test_another_number_of_processes_keeps_the_batch(initial, now, passes):
    settings = experiment(gradient_accumulation_steps=4)
    assert accumulation_steps(settings.training, initial, now) == passes


def test_a_number_of_processes_that_cannot_go_on_is_told_which_can():
    settings = experiment(gradient_accumulation_steps=4)
    with pytest.raises(
        PipelineError, match=r"2 processes began this training and 1 would continue it, with .*dropout 0.1"
    ):
        accumulation_steps(settings.training, 2, 1, dropout=0.1)
    with pytest.raises(PipelineError, match=r"8 passes a step .* cannot be divided among 3; start 2 processes"):
        accumulation_steps(settings.training, 2, 3)
