"""What is compared when two trainings have a time each: the same text, tokens and score."""

import dataclasses
import math
import sysconfig
from pathlib import Path

import pytest
import torch

from bench.training import quality
from bench.training.__main__ import LONG, shakespeare_settings
from llm_assets.experiments.compose import compose
from model.errors import PipelineError
from model.text.tokens import TokenDataset


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quality.TEXT_BYTES, "tiny", 600_000)
        return quality.make_dataset(tmp_path_factory.mktemp("quality") / "dataset", "tiny")


def test_the_text_is_each_source_file_of_the_packages_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    for name, text in (("a.py", "import a\n"), ("b/a.py", "import a\n"), ("b/c.py", "import c\n"), ("d.py", " \n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(quality.package_texts(1000)) == ["import a\n", "import c\n"]
    assert len(list(quality.package_texts(1))) == 1


@pytest.mark.medium
def test_both_sides_are_scored_on_the_same_held_out_tokens(dataset_dir, tmp_path):
    validation = TokenDataset(dataset_dir, "validation", 128)
    assert len(validation.tokens) > 500
    ours = quality.train_ours(quality.settings_of("tiny", 3), dataset_dir, tmp_path / "ours")
    llama = quality.train_llama("tiny", 3, 1e-3, dataset_dir, tmp_path / "llama", 4)
    for found in (ours, llama):
        assert found["loop_s"] >= found["steps_s"] > 0 and found["after_s"] > 0
        # Nats of a token over bits of a byte: the same for both, by the tokens and bytes of the split.
        assert found["loss"] / found["bits_per_byte"] == pytest.approx(ours["loss"] / ours["bits_per_byte"])
    assert quality.windows_per_step("tiny") == 8


def test_a_side_has_as_many_steps_as_its_time_allows(monkeypatch, tmp_path):
    asked = []

    def run(side: str, shape: str, steps: int, rate: float, dataset_dir: Path, windows: int) -> dict[str, float]:
        """2 s before the first step, 0.5 s for each of 8 windows, and 1 s of evaluation in the loop."""
        asked.append((side, steps, windows))
        loop_s = windows / 16 * steps + 1
        bits = math.nan if rate == 3e-3 else abs(rate - 1e-3) + (1.0 if side == "llama" else 0.5)  # that rate diverges
        found = {"steps": steps, "loop_s": loop_s, "steps_s": loop_s - 1, "process_s": 2 + loop_s}
        return {**found, "bits_per_byte": bits, "loss": bits}

    monkeypatch.setattr(quality, "in_process", run)
    found = quality.compare("tiny", 1.0, 0.5, [3e-3, 1e-3, 1e-4], dataset_dir=tmp_path)
    assert found["llama"]["learning_rate"] == 1e-3 and found["llama"]["process_s"] == pytest.approx(60, abs=0.5)
    assert found["ours"]["process_s"] == pytest.approx(30, abs=0.5)
    assert found["time_ratio"] == pytest.approx(0.5, abs=0.02) and found["bits_per_byte_ratio"] < 1
    # Two probes of the time that a step takes, the second of 15 s of steps without the evaluation; three tries in a
    # quarter of the time each; and the whole.
    steps = [steps for side, steps, _ in asked if side == "llama"]
    assert steps == [4, 34, 24, 24, 24, 114]
    assert {windows for _, _, windows in asked} == {8}


def test_each_number_of_windows_is_tried_with_each_learning_rate(monkeypatch, tmp_path):
    def run(side: str, shape: str, steps: int, rate: float, dataset_dir: Path, windows: int) -> dict[str, float]:
        loop_s = windows / 16 * steps
        bits = 1 + abs(rate - 1e-3) + abs(windows - 4)
        found = {"steps": steps, "loop_s": loop_s, "steps_s": loop_s, "process_s": 2 + loop_s}
        return {**found, "bits_per_byte": bits, "loss": bits}

    monkeypatch.setattr(quality, "in_process", run)
    found = quality.compare("tiny", 1.0, 1.0, [1e-3, 1e-2], dataset_dir=tmp_path, windows=[2, 4])["llama"]
    assert list(found["tries"]) == ["2 windows, 0.001", "2 windows, 0.01", "4 windows, 0.001", "4 windows, 0.01"]
    assert (found["windows"], found["learning_rate"]) == (4, 1e-3)
    assert found["process_s"] == pytest.approx(60, abs=0.5)


def test_a_single_choice_is_not_tried():
    def side(seconds: float, rate: float) -> dict[str, float]:
        assert (seconds, rate) == (60, 1e-3), "only the whole training"
        return {"bits_per_byte": 2.0}

    expected = {"bits_per_byte": 2.0, "windows": 4, "learning_rate": 1e-3, "tries": {}}
    assert quality.tuned({4: side}, 60, [1e-3]) == expected


def test_characters_are_trained_as_their_experiment_says():
    measured, experiment = shakespeare_settings(*LONG), compose("shakespeare_char")
    assert measured.model == experiment.model and measured.tokenizer == experiment.tokenizer
    names = {"eval_steps", "save_steps", "sample_tokens"}
    given, own = (dataclasses.asdict(settings.training) for settings in (measured, experiment))
    assert {name for name in own if own[name] != given[name]} <= names


def test_nanogpt_is_needed_on_a_gpu_and_a_folder_must_be_one(tmp_path, monkeypatch):
    from argparse import ArgumentParser

    parser = ArgumentParser()
    quality.add_options(parser)
    for has_gpu, says in ((False, "--gpu: PyTorch sees no GPU"), (True, "--gpu needs --nanogpt DIR")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        with pytest.raises(PipelineError, match=says):
            quality.measure(parser.parse_args(["--gpu"]))
    with pytest.raises(PipelineError, match="is not a work tree of nanoGPT"):
        quality.measure(parser.parse_args(["--nanogpt", str(tmp_path), "--dataset", str(tmp_path)]))
    with pytest.raises(PipelineError, match="--windows are Llama's"):
        quality.measure(parser.parse_args(["--nanogpt", str(tmp_path), "--windows", "4"]))
    with pytest.raises(PipelineError, match="--windows 0: expected numbers greater than 0"):
        quality.measure(parser.parse_args(["--windows", "4", "0"]))
