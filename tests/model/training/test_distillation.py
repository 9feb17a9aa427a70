"""A student that follows a teacher: the loss against its definition on whole logits, and trainings that use it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from model import logits
from model.errors import PipelineError
from model.kernels import linear_cross_entropy as kernel
from model.logits import IGNORE_INDEX
from model.settings import ExperimentSettings, TokenizerSettings
from model.text.tokenizer import train_tokenizer
from model.training.checkpoints import local as checkpoints
from model.training.loss import DistillationTargets, linear_cross_entropy
from model.training.train import train
from tests.model.training.tiny import experiment

pytestmark = pytest.mark.medium

B, T, D, E, V = 3, 9, 24, 16, 61


def example(**how: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DistillationTargets]:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(B, T, D, generator=generator, requires_grad=True)
    weight_VD = torch.randn(V, D, generator=generator, requires_grad=True)
    labels_BT = torch.randint(0, V, (B, T), generator=generator)
    labels_BT[0, :5] = IGNORE_INDEX
    teacher = torch.randn(B, T, E, generator=generator), torch.randn(V, E, generator=generator)
    return hidden_BTD, weight_VD, labels_BT, DistillationTargets(*teacher, **how)  # type: ignore[arg-type]


def whole_logits(hidden_BTD, weight_VD, labels_BT, targets) -> torch.Tensor:
    """The definition, with all logits of both models at once and PyTorch's own gradients."""
    labels_R = labels_BT[:, 1:].flatten()
    logits_RV = (hidden_BTD[:, :-1] @ weight_VD.t()).flatten(0, 1)
    expected_RV = (targets.hidden_BTE[:, :-1] @ targets.weight_VE.t()).flatten(0, 1)
    q_RV, p_RV = ((logits / targets.temperature).softmax(1) for logits in (logits_RV, expected_RV))
    if targets.top_k:
        rest = torch.ones_like(p_RV).scatter(1, p_RV.topk(targets.top_k, dim=1).indices, 0.0)
        q_RV, p_RV = (torch.cat([x[rest == 0].view(len(x), -1), (x * rest).sum(1, True)], 1) for x in (q_RV, p_RV))
    kl_R = targets.temperature**2 * (p_RV * (p_RV / q_RV).log()).sum(1)
    plain_R = functional.cross_entropy(logits_RV, labels_R, reduction="none", ignore_index=IGNORE_INDEX)
    counted = labels_R != IGNORE_INDEX
    return ((1 - targets.weight) * plain_R + targets.weight * kl_R)[counted].mean()


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("top_k", [0, 1, 8])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 3.0)])
def test_loss_and_gradients_are_those_of_whole_logits(rows, top_k, weight, temperature):
    *tensors, targets = example(weight=weight, temperature=temperature, top_k=top_k)
    ours = linear_cross_entropy(*tensors, targets=targets, rows=rows)
    expected = whole_logits(*tensors, targets)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(ours, tensors[:2]), torch.autograd.grad(expected, tensors[:2]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_student_that_predicts_as_its_teacher_has_nothing_to_learn(top_k):
    hidden_BTD, weight_VD, labels_BT, _ = example(weight=1.0, temperature=2.0, top_k=top_k)
    same = DistillationTargets(hidden_BTD.detach(), weight_VD.detach(), weight=1.0, temperature=2.0, top_k=top_k)
    loss = linear_cross_entropy(hidden_BTD, weight_VD, labels_BT, targets=same)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, weight_VD)[0].abs().max() < 1e-6


def test_a_student_that_rules_out_what_its_teacher_expects_has_a_finite_loss_and_gradient():
    hidden_BTD, weight_VD = torch.full((1, 2, 1), 100.0, requires_grad=True), torch.tensor([[2.0], [0.0], [0.0]])
    targets = DistillationTargets(torch.full((1, 2, 1), 3.0), torch.zeros(3, 1), weight=1.0, temperature=1.0, top_k=1)
    loss = linear_cross_entropy(hidden_BTD, weight_VD, torch.tensor([[0, 1]]), targets=targets)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, hidden_BTD)[0]).all()


@pytest.fixture(scope="module")
def teacher(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    train(experiment(max_steps=60, eval_steps=60, save_steps=60), dataset_dir, directory / "out", directory / "scratch")
    return directory / "out"


def distillation(teacher: Path, **training: object) -> ExperimentSettings:
    """A narrower student with dropout, so that a result depends on the state of the random generator too."""
    settings = experiment(distill_from=str(teacher), distill_top_k=16, distill_temperature=2.0, **training)
    return replace(settings, model=replace(settings.model, hidden_size=16, intermediate_size=32))


def test_a_student_comes_closer_to_the_text_and_to_its_teacher(teacher, dataset_dir, tmp_path):
    curves = {}
    for weight in (0.0, 1.0):
        settings = distillation(teacher, max_steps=40, eval_steps=40, save_steps=40, distill_weight=weight)
        train(settings, dataset_dir, tmp_path / f"{weight}", tmp_path / f"scratch {weight}")
        curves[weight] = json.loads((tmp_path / f"{weight}" / "curves.json").read_text())
    alone, taught = ([entry["eval_loss"] for entry in curve if "eval_loss" in entry] for curve in curves.values())
    assert alone[0] == taught[0]
    assert taught[-1] < taught[0] - 1  # it has seen no label, only the teacher
    losses = [entry["loss"] for entry in curves[1.0] if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_a_distillation_that_stopped_between_log_lines_resumes_bit_exact(teacher, dataset_dir, tmp_path):
    train(distillation(teacher), dataset_dir, tmp_path / "whole", tmp_path / "scratch")

    def interrupt(step, metrics):
        if step == 9:
            raise KeyboardInterrupt

    parts = tmp_path / "scratch of parts"
    with pytest.raises(KeyboardInterrupt):
        train(distillation(teacher), dataset_dir, tmp_path / "parts", parts, on_metrics=interrupt)
    assert train(distillation(teacher), dataset_dir, tmp_path / "parts", parts).resumed_from_step == 8
    for name in ("model.safetensors", "curves.json", "summary.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_accumulated_batches_are_taught_as_one_large_batch(teacher, dataset_dir, tmp_path):
    curves = []
    for batch, accumulation in ((4, 1), (1, 4)):
        settings = distillation(
            teacher, max_steps=4, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        settings.model.attention_dropout = 0.0
        train(settings, dataset_dir, tmp_path / f"{batch}", tmp_path / f"scratch {batch}")
        curve = json.loads((tmp_path / f"{batch}" / "curves.json").read_text())
        curves.append([entry["loss"] for entry in curve if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_another_teacher_is_another_training(teacher, dataset_dir, tmp_path):
    train(distillation(teacher, max_steps=2), dataset_dir, tmp_path / "out", tmp_path / "scratch")
    record = json.loads((tmp_path / "scratch" / "run.json").read_text())
    with pytest.raises(PipelineError, match=r"another training \(distill_from differ\)"):
        checkpoints.open_scratch(tmp_path / "scratch", {**record, "distill_from": "of other weights"})


def test_a_teacher_of_another_tokenizer_or_a_shorter_context_is_refused_in_one_line(teacher, dataset_dir, tmp_path):
    settings = distillation(teacher)
    other = train_tokenizer(TokenizerSettings(vocab_size=265), ["for other in words:\n" * 50])
    copy = tmp_path / "teacher"
    copy.mkdir()
    for path in teacher.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    other.save_pretrained(copy)
    settings.training.distill_from = str(copy)
    expected = r"distill_from is .*its tokenizer \(\d+ tokens\) differs from .*300 tokens"
    with pytest.raises(PipelineError, match=expected):
        train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch")
    settings.training.distill_from = "/nowhere"
    with pytest.raises(PipelineError, match=r"distill_from is '/nowhere': no model.safetensors there; name the folder"):
        train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch2")
    config = json.loads((teacher / "config.json").read_text()) | {"max_position_embeddings": 32}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").write_bytes((teacher / "tokenizer.json").read_bytes())
    settings.training.distill_from = str(copy)
    with pytest.raises(
        PipelineError, match=r"its context is 32 tokens and a window has 64 \(tokenizer.sequence_length\)"
    ):
        train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch3")
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_text("{")
        with pytest.raises(PipelineError, match=rf"distill_from is '{copy}': .*{name} is not JSON"):
            train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch4")


def test_a_whole_vocabulary_of_logits_exists_neither_for_the_student_nor_for_the_teacher(monkeypatch):
    largest = 0
    divergence = kernel._divergence

    def watched(logits_RV, teacher_RV, *how):
        nonlocal largest
        largest = max(largest, len(logits_RV), len(teacher_RV))
        return divergence(logits_RV, teacher_RV, *how)

    monkeypatch.setattr(kernel, "_divergence", watched)
    monkeypatch.setitem(logits.CHUNK_BYTES, "cpu", 16 * 4 * V)
    *tensors, targets = example(weight=0.5, temperature=1.0, top_k=0)
    linear_cross_entropy(*tensors, targets=targets)
    assert largest == 16 < B * (T - 1)
