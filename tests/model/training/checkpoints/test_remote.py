"""Copies of checkpoints: a training goes on from them on another machine, here with another scratch folder."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model.errors import PipelineError
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints import remote as remote_checkpoints
from model.training.checkpoints.local import COMMITTED
from model.training.checkpoints.remote import RemoteCheckpoints, copied
from model.training.launch.start import launch
from tests.model.training.tiny import experiment

pytestmark = pytest.mark.medium


def checkpoint(scratch: Path, step: int, text: str = "weights") -> None:
    staged = checkpoints.staging(scratch) / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "model.bin").write_text(f"{text} of {step}")
    checkpoints.commit(scratch, step)
    (scratch / checkpoints.RECORD).write_text("{}")


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "copies") if request.param == "folder" else f"memory://{tmp_path.name}/copies"


@pytest.fixture
def remote(url: str) -> Callable[[Path], RemoteCheckpoints]:
    """The copies, seen from a machine with the given scratch folder; what it logs is in `.lines`."""

    def make(scratch: Path) -> RemoteCheckpoints:
        lines: list[str] = []
        made = RemoteCheckpoints(url, scratch, lines.append)
        made.lines = lines  # type: ignore[attr-defined]
        return made

    return make


def test_another_machine_has_the_checkpoints_of_the_first_and_those_it_pruned_are_gone(remote, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (2, 4, 6):
        checkpoint(here, step)
        remote(here).push()
        if step == 4:
            checkpoints.prune(here, 1, None)
    remote(there).fetch()
    assert checkpoints.steps_saved(there) == [4, 6]
    assert (checkpoints.checkpoint_dir(there, 6) / "model.bin").read_text() == "weights of 6"
    remote(there).remove()
    remote(tmp_path / "third").fetch()
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("damage", ["altered", "missing", "without its marker"])
def test_a_damaged_copy_is_not_used_and_the_one_before_is(remote, url, tmp_path, damage):
    checkpoint(tmp_path / "here", 2)
    checkpoint(tmp_path / "here", 4)
    remote(tmp_path / "here").push()
    made = remote(tmp_path / "there")
    name = f"{made._root}/checkpoint-4/{COMMITTED if damage == 'without its marker' else 'model.bin'}"
    made._fs.pipe_file(name, b"other") if damage == "altered" else made._fs.rm_file(name)
    made.fetch()
    assert checkpoints.steps_saved(tmp_path / "there") == [2]
    says = "fetched the checkpoint of step 2" if damage == "without its marker" else "the copy of step 4 in"
    assert any(says in line for line in made.lines)


def test_copies_that_are_behind_or_of_another_training_are_not_used(remote, tmp_path):
    checkpoint(tmp_path / "here", 2)
    remote(tmp_path / "here").push()
    checkpoint(tmp_path / "ahead", 4)
    remote(tmp_path / "ahead").fetch()
    assert checkpoints.steps_saved(tmp_path / "ahead") == [4]
    other = tmp_path / "other"
    other.mkdir()
    (other / checkpoints.RECORD).write_text('{"seed": 1}')
    made = remote(other)
    made.fetch()
    assert checkpoints.steps_saved(other) == [] and "are of another training" in made.lines[0]


def test_a_store_that_does_not_answer_costs_no_training_and_is_tried_again(remote, tmp_path, monkeypatch, caplog):
    made, lines = remote(tmp_path / "here"), []
    monkeypatch.setattr(remote_checkpoints, "LOOK_EVERY_S", 0.01)
    answers = made.push

    def silent() -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(made, "push", silent)
    with copied(made, tmp_path / "here", lines.append):
        checkpoint(tmp_path / "here", 2)
        while "not copied" not in caplog.text:
            time.sleep(0.01)
        monkeypatch.setattr(made, "push", answers)
    assert lines == [] and made._copies().keys() == {2}
    monkeypatch.setattr(made, "push", silent)
    with copied(made, tmp_path / "here", lines.append):
        pass
    assert lines == ["the last checkpoints were not copied: connection refused"]


def test_copies_that_cannot_be_read_are_one_line(remote, tmp_path, monkeypatch):
    made = remote(tmp_path / "here")

    def silent() -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(made, "_copies", silent)
    with pytest.raises(PipelineError, match=r"cannot be read \(connection refused\): run again when the store answers"):
        made.fetch()
    with pytest.raises(
        PipelineError, match=r"checkpoints cannot be copied to no-such-scheme://a: .*correct LLM_ASSETS"
    ):
        RemoteCheckpoints("no-such-scheme://a", tmp_path, print)


def test_a_training_that_was_stopped_goes_on_bit_exact_on_another_machine(remote, dataset_dir, tmp_path):
    def stop(step: int, metrics: dict[str, float]) -> None:
        if step >= 6:
            raise KeyboardInterrupt

    def train_on(machine: str, **arguments: object):
        scratch = tmp_path / machine / "scratch"
        return launch(experiment(), dataset_dir, tmp_path / machine / "output", scratch, **arguments)

    train_on("alone")
    with pytest.raises(KeyboardInterrupt):
        train_on("first", on_metrics=stop, remote=remote(tmp_path / "first" / "scratch"))
    summary = train_on("second", remote=remote(tmp_path / "second" / "scratch"))
    assert summary.resumed_from_step == checkpoints.steps_saved(tmp_path / "first" / "scratch")[-1] > 0
    curves = [
        json.loads((tmp_path / machine / "output" / "curves.json").read_text()) for machine in ("alone", "second")
    ]
    assert [entry.get("loss") for entry in curves[0]] == [entry.get("loss") for entry in curves[1]]
    ours, theirs = (load_file(tmp_path / name / "output" / "model.safetensors") for name in ("alone", "second"))
    assert all((weight == theirs[name]).all() for name, weight in ours.items())
