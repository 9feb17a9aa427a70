import shutil
import signal
from pathlib import Path

import pytest

from model.errors import PipelineError
from model.training.checkpoints import local as checkpoints
from model.training.outputs.summary import TrainingSummary
from model.training.train import train
from tests.model.training.tiny import experiment
from tests.support import forked

pytestmark = pytest.mark.medium

KILLED_BETWEEN_CHECKPOINTS = """
def on_metrics(step, metrics):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED_WHILE_WRITING_THE_SECOND_CHECKPOINT = """
import torch
save = torch.save
def save_and_die(value, path, *args, **kwargs):
    save(value, path, *args, **kwargs)
    if "checkpoint-5" in str(path):  # the weights and the optimizer are written, the rest is not
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_and_die
on_metrics = None
"""

KILLED_BEFORE_A_FINISHED_CHECKPOINT_COUNTS = """
rename = Path.rename
def die_instead(path, target):
    if path.name == "checkpoint-5":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
Path.rename = die_instead
on_metrics = None
"""

TERMINATED = """
def on_metrics(step, metrics):
    if step == 6:  # before the checkpoint of step 8; steps 7 and 8 are in one line of the log
        os.kill(os.getpid(), signal.SIGTERM)
"""

CHILD = """
import os, signal, sys
from pathlib import Path
from model.training.train import train
from tests.model.training.tiny import experiment
{sabotage}
dataset, output, scratch = (Path(argument) for argument in sys.argv[1:])
train(experiment(), dataset, output, scratch, on_metrics=on_metrics)
"""


@pytest.fixture(scope="module")
def uninterrupted(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSummary]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    summary = train(experiment(), dataset_dir, directory / "output", directory / "scratch")
    return directory / "output", summary


def assert_same_result(output_dir: Path, expected_dir: Path) -> None:
    assert (output_dir / "model.safetensors").read_bytes() == (expected_dir / "model.safetensors").read_bytes()
    for name in ("curves.json", "summary.json", "README.md", "config.json"):
        assert (output_dir / name).read_bytes() == (expected_dir / name).read_bytes()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("sabotage", "resumed_from"),
    [
        (KILLED_BETWEEN_CHECKPOINTS, 5),
        (KILLED_WHILE_WRITING_THE_SECOND_CHECKPOINT, 4),
        (KILLED_BEFORE_A_FINISHED_CHECKPOINT_COUNTS, 4),
        (TERMINATED, 7),
    ],
    ids=["between checkpoints", "while writing a checkpoint", "before a checkpoint counts", "terminated"],
)
def test_a_run_that_a_signal_ended_resumes_bit_exact(uninterrupted, dataset_dir, tmp_path, sabotage, resumed_from):
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    program = CHILD.format(sabotage=sabotage)
    child = forked.run(program, dataset_dir, output, scratch, log=tmp_path / "log")
    assert child.status == -(signal.SIGTERM if sabotage is TERMINATED else signal.SIGKILL), child.said
    summary = train(experiment(), dataset_dir, output, scratch)
    assert summary.resumed_from_step == resumed_from
    assert not checkpoints.staging(scratch).exists()
    assert_same_result(output, uninterrupted[0])


def interrupt(step: int, metrics: dict[str, float]) -> None:
    if step == 9:
        raise KeyboardInterrupt


def test_an_interrupt_passes_through_and_the_run_resumes_bit_exact(uninterrupted, dataset_dir, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(experiment(), dataset_dir, tmp_path / "output", tmp_path / "scratch", on_metrics=interrupt)
    summary = train(experiment(), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert summary.resumed_from_step == 8
    assert_same_result(tmp_path / "output", uninterrupted[0])


def test_in_bfloat16_and_with_attention_in_blocks_a_run_resumes_bit_exact_too(dataset_dir, tmp_path):
    mixed = experiment(precision="bfloat16")
    mixed.model.attention_dropout = 0.0  # with dropout, attention is PyTorch's
    train(mixed, dataset_dir, tmp_path / "whole", tmp_path / "scratch of the whole")
    with pytest.raises(KeyboardInterrupt):
        train(mixed, dataset_dir, tmp_path / "output", tmp_path / "scratch", on_metrics=interrupt)
    assert train(mixed, dataset_dir, tmp_path / "output", tmp_path / "scratch").resumed_from_step == 8
    assert_same_result(tmp_path / "output", tmp_path / "whole")


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(uninterrupted, dataset_dir, tmp_path):
    train(experiment(), dataset_dir, tmp_path / "again", tmp_path / "scratch")
    assert_same_result(tmp_path / "again", uninterrupted[0])
    train(experiment(seed=1), dataset_dir, tmp_path / "other", tmp_path / "scratch of another seed")
    curves = [(tmp_path / name / "curves.json").read_text() for name in ("other", "again")]
    assert curves[0] != curves[1]


def test_a_finished_run_is_not_trained_again(dataset_dir, tmp_path):
    train(experiment(max_steps=4), dataset_dir, tmp_path / "first", tmp_path / "scratch")
    logged: list[int] = []
    summary = train(
        experiment(max_steps=4),
        dataset_dir,
        tmp_path / "second",
        tmp_path / "scratch",
        on_metrics=lambda step, metrics: logged.append(step),
    )
    assert logged == []
    assert summary.steps == 4
    assert_same_result(tmp_path / "second", tmp_path / "first")


def test_a_run_without_progress_stops_early_and_stays_stopped(dataset_dir, tmp_path):
    frozen = {"learning_rate": 1e-30, "muon_learning_rate": 1e-30, "weight_decay": 0.0, "early_stopping_patience": 2}
    first = train(experiment(**frozen), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert first.steps < 12
    again = train(experiment(**frozen), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    assert again.steps == again.resumed_from_step == first.steps


def test_scratch_of_another_training_is_refused_by_the_name_of_what_differs(dataset_dir, tmp_path):
    train(experiment(max_steps=2), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    with pytest.raises(PipelineError, match=r"another training \(training.learning_rate, training.max_steps differ\)"):
        train(experiment(learning_rate=0.5), dataset_dir, tmp_path / "output", tmp_path / "scratch")


def test_another_tokenizer_is_refused_by_name(dataset_dir, tmp_path):
    train(experiment(max_steps=2), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    other = shutil.copytree(dataset_dir, tmp_path / "dataset")
    file = other / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(PipelineError, match=r"another training \(tokenizer differ\)"):
        train(experiment(max_steps=2), other, tmp_path / "output", tmp_path / "scratch")


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path):
    for step in (2, 4):
        checkpoints.checkpoint_dir(tmp_path, step).mkdir()
        (checkpoints.checkpoint_dir(tmp_path, step) / checkpoints.STATE).touch()
    (checkpoints.checkpoint_dir(tmp_path, 2) / checkpoints.COMMITTED).touch()
    assert checkpoints.steps_saved(tmp_path) == [2]


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoints.checkpoint_dir(tmp_path, step).mkdir()
        (checkpoints.checkpoint_dir(tmp_path, step) / checkpoints.COMMITTED).touch()
    checkpoints.prune(tmp_path, keep=2, best_step=2)
    assert checkpoints.steps_saved(tmp_path) == [2, 6, 8]
