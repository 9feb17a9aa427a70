"""Warnings of a running training: vanishing or repeated gradients, unmoved parameters, a loss above the unigram's."""

import json
import math

import numpy as np
import pytest

from model.baselines import token_baselines
from model.text.tokens import TokenDataset
from model.training import trainer
from model.training.health import find_warnings
from model.training.optim.optimizer import MuonAdamW, parameter_groups
from model.training.train import train
from tests.model.training.tiny import experiment

pytestmark = pytest.mark.medium

SETTINGS = experiment(max_steps=100).training


def history(*norms: float, loss: float = 1.0) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{"step": i + 1, "grad_norm": norm} for i, norm in enumerate(norms)]
    return [*found, {"step": 50, "eval_loss": loss}]


def test_a_training_that_learns_has_no_warnings():
    assert find_warnings(history(1.0, 0.9, 0.9, 0.8), SETTINGS, unigram=2.0, unmoved=[]) == []


def test_a_gradient_of_exactly_zero_is_a_warning_with_its_first_step():
    (line,) = find_warnings(history(1.0, 0.0, 0.0, 0.5), SETTINGS, 2.0, [])
    assert line == "the gradient norm is exactly 0 at step 2 and 1 later log lines"


def test_a_gradient_norm_that_repeats_is_a_warning_after_as_many_lines_as_are_set():
    (line,) = find_warnings(history(0.7, 0.5, 0.5, 0.5), SETTINGS, 2.0, [])
    assert line.startswith("the gradient norm is 0.5 in the last 3 log lines")
    assert (
        find_warnings(history(0.7, 0.5, 0.5, 0.5), experiment(watch_repeats=4, max_steps=100).training, 2.0, []) == []
    )


def test_without_clipping_no_norm_is_measured_and_none_is_judged():
    assert find_warnings(history(0.0, 0.0, 0.0), experiment(max_grad_norm=0.0, max_steps=100).training, 2.0, []) == []


@pytest.mark.parametrize(
    ("step", "loss", "warned"), [(9, 3.0, False), (10, 3.0, True), (10, 1.9, False), (0, 3.0, False)]
)
def test_a_loss_not_below_token_frequencies_is_a_warning_after_a_tenth_of_the_steps(step, loss, warned):
    found = find_warnings([{"step": step, "eval_loss": loss}], SETTINGS, unigram=2.0, unmoved=[])
    assert len(found) == warned
    assert not warned or "3.0000 at step 10, not below the 2.0000 nats" in found[0]


def test_a_loss_that_falls_later_takes_the_warning_back():
    entries = [{"step": 10, "eval_loss": 3.0}, {"step": 90, "eval_loss": 1.0}]
    assert find_warnings(entries, SETTINGS, 2.0, []) == []


def test_parameters_that_have_not_moved_are_named():
    (line,) = find_warnings(history(1.0), SETTINGS, 2.0, ["a", "b", "c", "d"])
    assert line == "parameters unchanged at step 50: a, b, c and 1 more"


def test_a_healthy_training_says_so_in_its_summary(dataset_dir, tmp_path):
    lines: list[str] = []
    summary = train(
        experiment(max_steps=40, eval_steps=20), dataset_dir, tmp_path / "out", tmp_path / "scratch", log=lines.append
    )
    assert summary.warnings == []
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"] == []
    assert any(line.startswith("self-check: gradients agree") for line in lines)


def test_a_training_that_changes_nothing_is_warned_of_in_log_metrics_and_summary(dataset_dir, tmp_path, monkeypatch):
    class Idle(MuonAdamW):
        def step(self, closure=None):
            pass

    monkeypatch.setattr(
        trainer, "build_optimizer", lambda model, settings, precision: Idle(parameter_groups(model, settings))
    )
    lines: list[str] = []
    counts: list[float] = []
    summary = train(
        experiment(),
        dataset_dir,
        tmp_path / "out",
        tmp_path / "scratch",
        log=lines.append,
        on_metrics=lambda step, metrics: counts.append(metrics.get("health_warnings", 0.0)),
    )
    unmoved, no_gain = summary.warnings
    assert "unchanged at step 12: model.embed_tokens.weight" in unmoved
    assert "nats per token of token frequencies" in no_gain
    assert counts[0] == 0 and counts[-1] == 2
    assert any(line.startswith("warning: parameters unchanged") for line in lines)


def test_the_baseline_is_that_of_the_report_on_the_same_windows(dataset_dir, tmp_path):
    from tests.model.training.test_self_check import set_up

    run, _, _ = set_up(dataset_dir, tmp_path, eval_windows=10**6)
    from model.training.health import unigram_loss

    dataset = TokenDataset(dataset_dir, "validation", run.sequence_length)
    size = len(dataset.text_bytes(1, len(dataset.tokens)))
    expected = (
        token_baselines(dataset_dir, run.sequence_length).unigram * size * math.log(2) / (len(dataset.tokens) - 1)
    )
    assert unigram_loss(run) == pytest.approx(expected, rel=0.01)
    assert np.isfinite(expected)
