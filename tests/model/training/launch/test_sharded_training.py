"""A training that FSDP2 divides among two gloo processes makes the model of one process, and resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.errors import PipelineError
from model.settings import ComputeSettings, TrainingSettings
from model.training.arguments import training_arguments
from model.training.checkpoints import local as checkpoints
from model.training.checkpoints.sharded import is_sharded_checkpoint
from model.training.run import expect_sharding_helps
from model.training.train import train
from tests.model.training.launch.test_distributed import assert_same_curve, curve, torchrun
from tests.model.training.launch.tiny import sharded_experiment
from tests.support import forked

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def train_sharded(folder: Path, dataset: Path, **record: Any) -> forked.Ended:
    folder.mkdir(exist_ok=True)
    places = dataset, folder / "output", folder / "scratch"
    return torchrun(folder / "log", *places, json.dumps(record), worker="sharded_worker.py")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    one, other = (load_file(folder / "output" / "model.safetensors") for folder in (ours, theirs))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype
        assert (weight - other[name]).abs().max() <= 5e-3 * other[name].abs().max(), name


@pytest.fixture(scope="module")
def one(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(sharded_experiment(), dataset_dir, folder / "output", folder / "scratch", shares_batch=True)
    return folder


@pytest.fixture(scope="module")
def two(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = train_sharded(folder, dataset_dir)
    assert done.status == 0, done.said[-3000:]
    assert "self-check: gradients agree with plain float32 on the CPU" in done.said
    return folder


@pytest.mark.slow
@pytest.mark.processes
def test_a_sharded_training_makes_the_model_of_one_process_and_each_holds_half(one, two):
    assert_same_curve(curve(two / "output"), curve(one / "output"))
    assert_same_weights(two, one)
    assert {path.name for path in (two / "output").iterdir()} == {path.name for path in (one / "output").iterdir()}
    whole = sum(weight.nbytes for weight in load_file(one / "output" / "model.safetensors").values())
    state = torch.load(one / "scratch" / "checkpoint-12" / "optimizer.pt", weights_only=True)["state"]
    momenta = sum(value.nbytes for of_one in state.values() for value in of_one.values())
    for rank in (0, 1):
        held = json.loads((two / f"held-{rank}.json").read_text())
        assert held["parameters"] == pytest.approx(whole / 2, rel=0.01)
        assert held["optimizer"] == pytest.approx(momenta / 2, rel=0.01)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.processes
def test_a_process_that_dies_while_saving_leaves_the_last_checkpoint_and_the_run_resumes(two, dataset_dir, tmp_path):
    killed = train_sharded(tmp_path, dataset_dir, dies_after=8)
    assert killed.status != 0
    scratch = tmp_path / "scratch"
    assert (checkpoints.staging(scratch) / "checkpoint-8" / "__1_0.distcp").is_file()
    last = checkpoints.steps_saved(scratch)[-1]
    assert last < 8 and is_sharded_checkpoint(checkpoints.checkpoint_dir(scratch, last))
    shutil.copytree(scratch, tmp_path / "alone" / "scratch")
    resumed = train_sharded(tmp_path, dataset_dir)
    assert resumed.status == 0, resumed.said[-3000:]
    weights = [folder / "output" / "model.safetensors" for folder in (tmp_path, two)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert curve(tmp_path / "output") == curve(two / "output")
    # One process that holds the whole model goes on with what two sharded ones began.
    alone = tmp_path / "alone"
    summary = train(sharded_experiment(), dataset_dir, alone / "output", alone / "scratch", shares_batch=True)
    assert summary.resumed_from_step == last
    assert_same_curve(curve(alone / "output"), curve(two / "output"))
    assert_same_weights(alone, two)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.processes
def test_accumulated_gradients_and_recomputed_activations_are_those_of_one_process(dataset_dir, tmp_path):
    options = {"optim": "adamw", "activation_checkpointing": True, "gradient_accumulation_steps": 4}
    done = train_sharded(tmp_path / "two", dataset_dir, training=options)
    assert done.status == 0, done.said[-3000:]
    settings = sharded_experiment(**options)
    train(settings, dataset_dir, tmp_path / "one" / "output", tmp_path / "one" / "scratch", shares_batch=True)
    # AdamW divides small gradients by their size, rounding included: with it, one process that takes the windows in one
    # pass instead of two already differs by 0.0001 in the gradient norm.
    for ours, theirs in zip(*(curve(tmp_path / name / "output") for name in ("two", "one")), strict=True):
        for key in ours.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (ours["step"], key)
    assert_same_weights(tmp_path / "two", tmp_path / "one")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.processes
def test_bfloat16_passes_the_self_check_and_learns_as_one_process_does(dataset_dir, tmp_path):
    done = train_sharded(tmp_path / "two", dataset_dir, training={"precision": "bfloat16"})
    assert done.status == 0, done.said[-3000:]
    assert "self-check: gradients agree with plain float32 on the CPU" in done.said
    settings = sharded_experiment(precision="bfloat16")
    train(settings, dataset_dir, tmp_path / "one" / "output", tmp_path / "one" / "scratch", shares_batch=True)
    for ours, theirs in zip(*(curve(tmp_path / name / "output") for name in ("two", "one")), strict=True):
        for key in ours.keys() & {"loss", "eval_loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=0.02), (ours["step"], key)


def test_a_sharded_training_does_not_continue_a_whole_checkpoint(one, dataset_dir, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    shutil.copytree(one / "scratch", scratch)
    for step in checkpoints.steps_saved(scratch)[1:]:
        shutil.rmtree(checkpoints.checkpoint_dir(scratch, step))
    compute = ComputeSettings(engine="torchrun", processes=2, sharding="fsdp2")
    monkeypatch.setattr("model.training.run.expect_sharding_helps", lambda *args, **kwargs: None)
    with pytest.raises(PipelineError, match=r"checkpoint-\d+ was written without compute.sharding: expected a sharded"):
        train(
            replace(sharded_experiment(), compute=compute), dataset_dir, tmp_path / "output", scratch, shares_batch=True
        )


# -- what needs no processes ------------------------------------------------------------------------------------------


def test_sharding_is_refused_where_it_has_not_been_shown(dataset_dir, tmp_path):
    compute = ComputeSettings(engine="torchrun", processes=2, sharding="fsdp2")
    with pytest.raises(
        PipelineError, match=r"compute.sharding is 'fsdp2': expected 'none' on a CPU, .*or train on GPUs"
    ):
        train(replace(sharded_experiment(), compute=compute), dataset_dir, tmp_path / "output", tmp_path / "scratch")
    expect_sharding_helps("fsdp2", CUDA, "bfloat16", 2)
    with pytest.raises(
        PipelineError, match=r"compute.sharding is 'fsdp2' and one process trains: expected at least two"
    ):
        expect_sharding_helps("fsdp2", CUDA, "bfloat16", 1)
    with pytest.raises(PipelineError, match=r"training.precision is 'float16': expected bfloat16 or float32"):
        expect_sharding_helps("fsdp2", CUDA, "float16", 2)
    with pytest.raises(PipelineError, match=r"compute.sharding is 'fsdp2': expected 'none' for compute.engine 'local'"):
        ComputeSettings(sharding="fsdp2")
    with pytest.raises(PipelineError, match=r"training.torch_compile is True: expected none with compute.sharding"):
        replace(sharded_experiment(torch_compile=True), compute=compute)
    with pytest.raises(PipelineError, match=r"training.distill_from is 'teacher': expected none with compute.sharding"):
        replace(sharded_experiment(distill_from="teacher"), compute=compute)
    with pytest.raises(PipelineError, match=r"training.lora_rank is 4: expected none with compute.sharding"):
        replace(sharded_experiment(lora_rank=4, init_from="folder"), compute=compute)


@pytest.mark.parametrize("arguments", [{"fsdp": True}, {"fsdp": "full_shard"}, {"fsdp_config": {"fsdp_version": 2}}])
@pytest.mark.parametrize(
    ("device", "says"),
    [(CPU, "on a CPU it would shard nothing"), (CUDA, r"accelerate's FSDP does not fit .* set compute.sharding=fsdp2")],
    ids=["cpu", "cuda"],
)
def test_fsdp_of_transformers_is_refused_by_name(arguments, device, says, tmp_path):
    with pytest.raises(PipelineError, match=rf"training.arguments names '{next(iter(arguments))}': {says}"):
        training_arguments(TrainingSettings(arguments=arguments), tmp_path, device, "float32")
