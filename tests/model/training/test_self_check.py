"""The self-check: healthy trainings pass with room to spare, and a gradient that is wrong in any way ends the run."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.build import build_config, build_model
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings
from model.text.tokens import TokenDataset
from model.training import self_check as module
from model.training.loss import TrainingLoss
from model.training.run import TrainingRun, prepare_run
from model.training.self_check import plain_divergence, reference_gradients
from model.training.train import train
from model.training.trainer import RexTrainer
from tests.model.training.tiny import TOKENIZER, experiment

pytestmark = pytest.mark.medium

SHAPE = ModelSettings(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
Q = "model.layers.1.self_attn.q_proj.weight"


def zeroed(name, gradient):
    gradient.zero_()


def scaled(name, gradient):
    gradient.mul_(1.1)


def transposed(name, gradient):
    if name.endswith("self_attn.q_proj.weight"):
        gradient.copy_(gradient.t().clone())


def negated(name, gradient):
    if name == Q:
        gradient.neg_()


def zeroed_in_one_layer(name, gradient):
    if ".layers.1." in name:
        gradient.zero_()


def doubled_in_one_norm(name, gradient):
    if name == "model.layers.0.post_mlp_layernorm.weight":
        gradient.mul_(2)


def zeroed_in_one_head(name, gradient):
    if name == Q:
        gradient[8:16] = 0


def zeroed_in_one_head_of_the_output_projection(name, gradient):
    if name == Q.replace("q_proj", "o_proj"):
        gradient[:, 16:24] = 0


def not_a_number(name, gradient):
    if name == Q:
        gradient[3, 3] = float("nan")


def set_up(dataset_dir: Path, directory: Path, **training: object) -> tuple[TrainingRun, RexTrainer, list[str]]:
    lines: list[str] = []
    config = build_config(SHAPE, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    datasets = tuple(TokenDataset(dataset_dir, split, TOKENIZER.sequence_length) for split in ("train", "validation"))
    run = prepare_run(experiment(**training).training, config, datasets, directory, log=lines.append)
    model = build_model(config, seed=0)
    model.config.use_cache = False
    trainer = RexTrainer(run, model)
    trainer.model_wrapped = trainer.accelerator.prepare(model)
    return run, trainer, lines


def error_of(lines: list[str]) -> tuple[float, float]:
    found = re.search(r"agree with plain float32 on the CPU to ([\d.e+-]+) \(at most ([\d.]+)", lines[-1])
    assert found is not None, lines
    return float(found[1]), float(found[2])


def test_gradients_are_as_large_as_in_a_step(dataset_dir, tmp_path):
    """float16's scale is chosen for those: divided by the few tokens of the check they could overflow."""
    run, trainer, lines = set_up(dataset_dir, tmp_path, gradient_accumulation_steps=3)
    items = []

    def backward(batch, number):
        items.append(number.item())
        before = [parameter.grad for parameter in trainer.model.parameters()]
        trainer.model.zero_grad(set_to_none=True)
        loss = trainer.training_step(trainer.model_wrapped, batch, number)
        for parameter, earlier in zip(trainer.model.parameters(), before, strict=True):
            parameter.grad = (parameter.grad * 512).half().float() + (0.0 if earlier is None else earlier)
        return loss

    module.self_check(run, trainer.model, None, backward, gradient_scale=512.0)
    of_step = run.windows_per_step * (run.sequence_length - 1)
    assert items == [of_step, 2 * of_step]
    assert 1e-4 < error_of(lines)[0] < 1e-3  # float16 has 11 bits


def test_tf32_is_a_precision_of_its_own(dataset_dir, tmp_path):
    run, trainer, lines = set_up(dataset_dir, tmp_path)
    run.arguments.tf32 = True

    def backward(batch, number):
        loss = trainer.training_step(trainer.model_wrapped, batch, number)
        for parameter in trainer.model.parameters():
            parameter.grad *= 1.005
        return loss

    module.self_check(run, trainer.model, None, backward)
    assert error_of(lines) == (pytest.approx(0.005, rel=0.3), 0.01)
    run.arguments.tf32 = None
    with pytest.raises(PipelineError, match=r"expected at most 0.001 \(cpu, float32"):
        module.self_check(run, trainer.model, None, backward)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"precision": "bfloat16"},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 3, "z_loss": 1e-2},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_a_healthy_training_passes_with_room_to_spare(dataset_dir, tmp_path, training):
    _, trainer, lines = set_up(dataset_dir, tmp_path, **training)
    trainer.check_gradients()
    error, most = error_of(lines)
    assert 0 < error < most / 2


def test_as_many_tokens_are_compared_as_the_processor_computes_in_a_second(monkeypatch):
    settings = SimpleNamespace(per_device_train_batch_size=4)
    run = SimpleNamespace(settings=settings, world_size=1, sequence_length=2048)
    gpt2_size = SimpleNamespace(num_parameters=lambda: 124_000_000)
    found = []
    for cores in (1, 2, 16, 64):
        monkeypatch.setattr(module, "usable_cores", lambda cores=cores: cores)
        found.append(module._labeled(run, gpt2_size, None)[1])
    assert found == [26, 53, 430, 430]
    tiny = SimpleNamespace(num_parameters=lambda: 1000)
    assert module._labeled(run, tiny, None)[1] == module.MAX_TOKENS


@pytest.mark.parametrize("kept", ["the first", "the last", "twice the last", "twice the first"])
def test_passes_whose_gradients_do_not_add_up_end_the_run(dataset_dir, tmp_path, kept):
    run, trainer, lines = set_up(dataset_dir, tmp_path, gradient_accumulation_steps=2)

    def backward(batch, number):
        before = [parameter.grad for parameter in trainer.model.parameters()]
        trainer.model.zero_grad(set_to_none=True)
        loss = trainer.training_step(trainer.model_wrapped, batch, number)
        for parameter, earlier in zip(trainer.model.parameters(), before, strict=True):
            if earlier is not None:
                one = earlier if "first" in kept else parameter.grad
                parameter.grad = 2 * one if "twice" in kept else one
        return loss

    with pytest.raises(PipelineError, match=r"self-check: the gradient of .* has norm"):
        module.self_check(run, trainer.model, None, backward)
    assert not lines
    trainer.check_gradients()
    assert error_of(lines)[0] < 1e-4


@pytest.mark.slow
def test_a_compiled_training_passes_on_a_batch_of_its_own_shape(dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 40)  # the rest of each window has no labels
    arguments = {"torch_compile_backend": "aot_eager"}
    _, trainer, lines = set_up(
        dataset_dir, tmp_path, torch_compile=True, arguments=arguments, per_device_train_batch_size=3
    )
    shapes = []
    step = trainer.training_step
    monkeypatch.setattr(
        trainer,
        "training_step",
        lambda model, batch, items: shapes.append(batch["input_ids"].shape) or step(model, batch, items),
    )
    trainer.check_gradients()
    assert shapes == [(3, 64)]
    assert error_of(lines)[0] < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "damage",
    [
        zeroed,
        scaled,
        transposed,
        negated,
        zeroed_in_one_layer,
        doubled_in_one_norm,
        zeroed_in_one_head,
        zeroed_in_one_head_of_the_output_projection,
        not_a_number,
    ],
)
def test_a_wrong_gradient_ends_the_run_and_is_named(dataset_dir, tmp_path, monkeypatch, damage, precision):
    _, trainer, _ = set_up(dataset_dir, tmp_path, precision=precision)
    step = trainer.training_step

    def damaged(model, batch, items):
        loss = step(model, batch, items)
        for name, parameter in trainer.model.named_parameters():
            damage(name, parameter.grad)
        return loss

    monkeypatch.setattr(trainer, "training_step", damaged)
    with pytest.raises(PipelineError, match=r"^self-check: the gradient of model\.\S+.* has norm .* torch 2") as caught:
        trainer.check_gradients()
    message = str(caught.value)
    assert "\n" not in message and "training.self_check=false" in message and f"cpu, {precision}" in message
    if damage in (negated, zeroed_in_one_head, not_a_number):
        assert Q in message
    if damage is zeroed_in_one_head:
        assert "(head 1)" in message


def test_a_wrong_loss_ends_the_run(dataset_dir, tmp_path, monkeypatch):
    _, trainer, _ = set_up(dataset_dir, tmp_path)
    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda *given: step(*given) * 1.01)
    with pytest.raises(PipelineError, match=r"self-check: the loss of one batch is 5\.\d+ and 5\.\d+ in plain float32"):
        trainer.check_gradients()


def test_a_check_that_fails_costs_no_step_and_can_be_switched_off(dataset_dir, tmp_path, monkeypatch):
    step = RexTrainer.training_step

    def damaged(self, *given):
        loss = step(self, *given)
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        return loss

    monkeypatch.setattr(RexTrainer, "training_step", damaged)
    logged: list[int] = []
    settings = experiment()
    with pytest.raises(PipelineError, match="self-check: the gradient of"):
        train(
            settings,
            dataset_dir,
            tmp_path / "out",
            tmp_path / "scratch",
            on_metrics=lambda step, _: logged.append(step),
        )
    assert logged == [] and not (tmp_path / "out").exists()
    settings.training.self_check = False
    assert train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch").steps == 12


def test_a_stated_tolerance_counts(dataset_dir, tmp_path):
    _, trainer, _ = set_up(dataset_dir, tmp_path, precision="bfloat16", self_check_tolerance=1e-5)
    with pytest.raises(PipelineError, match="expected at most 1e-05"):
        trainer.check_gradients()


def test_the_check_leaves_random_state_weights_and_dropout_as_they_were(dataset_dir, tmp_path):
    _, trainer, _ = set_up(dataset_dir, tmp_path)
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    weights, random = copy.deepcopy(trainer.model.state_dict()), torch.get_rng_state()
    trainer.check_gradients()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert {layer.self_attn.attention_dropout for layer in trainer.model.model.layers} == {0.3}


def test_a_training_with_and_without_the_check_has_the_same_bits(dataset_dir, tmp_path):
    settings = experiment(max_steps=4)
    for check in (True, False):
        changed = replace(settings, training=replace(settings.training, self_check=check))
        train(changed, dataset_dir, tmp_path / f"{check}", tmp_path / f"scratch {check}")
    first, second = ((tmp_path / f"{check}" / "model.safetensors").read_bytes() for check in (True, False))
    assert first == second


@pytest.mark.parametrize("top_k", [0, 4])
def test_with_a_teacher_the_reference_has_the_loss_that_trains(top_k):
    config = build_config(SHAPE, 61, 0, 0, 1)
    settings = experiment(distill_temperature=2.0, distill_top_k=top_k, z_loss=1e-3).training
    model, teacher = build_model(config, seed=0), build_model(config, seed=1).eval()
    ids_BT = torch.randint(2, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    loss, expected = reference_gradients(model, teacher, ids_BT, settings)
    model.linear_loss = TrainingLoss(settings, teacher)
    found = model.train()(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_student_that_equals_its_teacher_diverges_by_nothing():
    logits_RV = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    for top_k in (0, 3):
        assert plain_divergence(logits_RV, logits_RV, 2.0, top_k).abs().max() < 1e-6


def test_the_reference_is_the_plain_model_and_not_the_one_that_trains(monkeypatch):
    kinds = []
    forward = RexForCausalLM.forward
    monkeypatch.setattr(
        RexForCausalLM,
        "forward",
        lambda self, *a, **k: (
            kinds.append((self.config._attn_implementation, self.training, self.linear_loss)) or forward(self, *a, **k)
        ),
    )
    model = build_model(build_config(SHAPE, 61, 0, 0, 1), seed=0).train()
    reference_gradients(model, None, torch.arange(2, 22)[None], experiment().training)
    assert kinds == [("eager", False, None)]
