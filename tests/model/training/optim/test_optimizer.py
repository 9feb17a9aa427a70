import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from model.build import build_config, build_model
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings
from model.system.devices import resolve_precision
from model.training import trainer
from model.training.optim import optimizer as optimizer_module
from model.training.optim.newton_schulz import orthogonalize
from model.training.optim.optimizer import MuonAdamW, build_optimizer, parameter_groups
from model.training.optim.schedule import muon_momentum, warmup_stable_decay
from model.training.train import train
from tests.model.training.tiny import experiment


def make_model() -> RexForCausalLM:
    config = build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return build_model(config, seed=0).eval()  # no dropout: two models take the same steps


def take_steps(model: RexForCausalLM, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(one: RexForCausalLM, other: RexForCausalLM) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_options_of_muon_reach_its_matrices():
    settings = TrainingSettings(muon_learning_rate=0.3, muon_momentum=0.7, newton_schulz_steps=4)
    (muon,) = [
        group for group in build_optimizer(make_model(), settings, "float32").param_groups if group["kind"] == "muon"
    ]
    assert (muon["lr"], muon["momentum"], muon["newton_schulz_steps"]) == (0.3, 0.7, 4)


@pytest.mark.parametrize(
    ("has_bfloat16", "precision", "dtype"),
    [
        (True, "auto", torch.bfloat16),
        (True, "float32", torch.float32),
        (False, "auto", torch.float32),
        (False, "bfloat16", torch.float32),
    ],
)
def test_muon_orthogonalizes_in_bfloat16_where_the_training_takes_it_and_it_is_fast(
    monkeypatch, has_bfloat16, precision, dtype
):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    dtypes = []

    def recording(matrices_NRC: Tensor, steps: int) -> Tensor:
        dtypes.append(matrices_NRC.dtype)
        return orthogonalize(matrices_NRC, steps)

    monkeypatch.setattr("model.training.optim.optimizer.orthogonalize", recording)
    model = make_model()
    take_steps(model, build_optimizer(model, TrainingSettings(), resolve_precision(precision, model.device)), 1)
    assert set(dtypes) == {dtype}
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


def test_orthogonalizing_in_bfloat16_comes_near_to_float32():
    matrices_NRC = torch.randn((3, 48, 96), generator=torch.Generator().manual_seed(0))
    exact_NRC = orthogonalize(matrices_NRC)
    rough_NRC = orthogonalize(matrices_NRC.bfloat16())
    assert rough_NRC.dtype == torch.bfloat16
    assert (rough_NRC.float() - exact_NRC).norm() / exact_NRC.norm() < 0.05


def singular_values(matrix_RC: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix_RC)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (2, 48, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices_NRC = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = singular_values(orthogonalize(matrices_NRC, steps=10))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (2, 48, 16)])
def test_the_steps_of_the_polar_express_come_nearer_to_orthogonal_and_converge(shape):
    random_NRC = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_NRM, _, right_NMC = torch.linalg.svd(random_NRC, full_matrices=False)
    values_M = torch.logspace(-2, 0, left_NRM.shape[-1], dtype=torch.float64)
    matrices_NRC = 7 * (left_NRM * values_M) @ right_NMC
    off = {
        steps: singular_values(orthogonalize(matrices_NRC.float(), steps, coefficients="polar_express")) - 1
        for steps in (5, 6)
    }
    assert off[5].abs().max() < 0.15
    assert off[6].abs().max() < 0.01
    converged_NRC = orthogonalize(matrices_NRC, 9, coefficients="polar_express")
    torch.testing.assert_close(converged_NRC, left_NRM @ right_NMC, atol=1e-6, rtol=0)


def test_the_coefficients_of_the_settings_reach_the_update():
    settings = TrainingSettings(newton_schulz_coefficients="polar_express")
    groups = build_optimizer(make_model(), settings, "float32").param_groups
    assert {group["newton_schulz_coefficients"] for group in groups} == {"polar_express"}
    off = {}
    for named in ("jordan", "polar_express"):
        before, update, _ = muon_update(newton_schulz_coefficients=named)
        off[named] = (singular_values((update + 0.05 * before) / (0.1 * 0.2 * 24**0.5)) - 1).abs().max()
    assert off["polar_express"] < 0.16 < off["jordan"]


@pytest.mark.parametrize("shape", [(2, 32, 96), (2, 96, 32)])
def test_wide_matrices_take_the_steps_of_all_others(shape):
    """As gradients are, nearly of low rank: what is small there must not drown in the rounding of X X^T."""
    generator = torch.Generator().manual_seed(0)
    left, right, rest = (torch.randn(size, generator=generator) for size in ((*shape[:2], 4), (2, 4, shape[2]), shape))
    matrices_NRC = left @ right + 0.01 * rest
    x_NRC = matrices_NRC.double() if shape[1] < shape[2] else matrices_NRC.double().mT
    gram_NRR = x_NRC @ x_NRC.mT
    x_NRC = x_NRC / gram_NRR.norm(dim=(-2, -1), keepdim=True).sqrt()
    for _ in range(5):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = 3.4445 * x_NRC + (-4.7750 * gram_NRR + 2.0315 * gram_NRR @ gram_NRR) @ x_NRC
    expected_NRC = x_NRC if shape[1] < shape[2] else x_NRC.mT
    assert (orthogonalize(matrices_NRC) - expected_NRC).norm() / expected_NRC.norm() < 1e-3


def test_muon_steps_as_torchs_does_though_it_takes_fewer_products():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(24, 96), (24, 96), (80, 16)]]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    rates = {"lr": 0.02, "weight_decay": 0.1}
    mine = MuonAdamW([{"params": ours, "kind": "muon", **rates}])
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **rates)
    start = [parameter.detach().clone() for parameter in ours]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        mine.step()
        torchs.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() / (other - before).norm() < 0.2


def test_adamw_is_the_one_of_torch_to_the_last_bit():
    settings = TrainingSettings(optim="adamw")
    model, reference = make_model(), make_model()
    ours = build_optimizer(model, settings, "float32")
    groups = [{k: v for k, v in group.items() if k != "kind"} for group in parameter_groups(reference, settings)]
    torchs = torch.optim.AdamW(groups, betas=(settings.adam_beta1, settings.adam_beta2), fused=True)
    take_steps(model, ours, 3)
    take_steps(reference, torchs, 3)
    assert_same_weights(model, reference)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_a_saved_optimizer_goes_on_bit_exact(optim):
    settings = TrainingSettings(optim=optim)
    model = make_model()
    optimizer = build_optimizer(model, settings, "float32")
    take_steps(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copied = copy.deepcopy(model)
    take_steps(model, optimizer, 2, first=2)

    restored = build_optimizer(copied, settings, "float32")
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    take_steps(copied, restored, 2, first=2)
    assert_same_weights(model, copied)


def test_every_parameter_is_in_one_group_and_only_norms_do_not_decay():
    model = make_model()
    groups = parameter_groups(model, TrainingSettings())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["weight_decay"] == 0) == ("norm" in name), name
            assert (group["kind"] == "muon") == ("_proj" in name), name


def test_one_scheduler_drives_both_learning_rates_in_their_ratio():
    settings = TrainingSettings(learning_rate=0.01, muon_learning_rate=0.03)
    optimizer = build_optimizer(make_model(), settings, "float32")
    scheduler = LambdaLR(optimizer, lambda step: warmup_stable_decay(step, warmup_steps=2, decay_steps=4, max_steps=10))
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
        assert rates["muon"] == pytest.approx(3 * rates["adamw"])
    assert rates["adamw"] == pytest.approx(0.01 / 4)


def test_the_schedule_rises_stays_and_falls_to_zero():
    factors = [warmup_stable_decay(step, warmup_steps=4, decay_steps=5, max_steps=12) for step in range(13)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_a_schedule_without_warmup_or_decay_is_constant():
    assert {warmup_stable_decay(step, warmup_steps=0, decay_steps=0, max_steps=5) for step in range(5)} == {1.0}


def test_the_schedule_ends_at_its_floor_and_the_momentum_rises_and_falls_between_its_bounds():
    factors = [warmup_stable_decay(step, warmup_steps=0, decay_steps=4, max_steps=8, floor=0.2) for step in range(9)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    how = {"start": 0.85, "peak": 0.95, "decay_steps": 2, "max_steps": 6}
    rising = [muon_momentum(step, warmup_steps=2, **how) for step in range(7)]
    assert rising == pytest.approx([0.9, 0.95, 0.95, 0.95, 0.95, 0.9, 0.85])
    assert {muon_momentum(step, warmup_steps=0, **how) for step in range(7)} == {0.95}


def muon_update(**options: Any) -> tuple[Tensor, Tensor, MuonAdamW]:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(8, 24, generator=generator))
    before = parameter.detach().clone()
    optimizer = MuonAdamW([{"params": [parameter], "kind": "muon", "lr": 0.1, "weight_decay": 0.5}], **options)
    parameter.grad = torch.randn(8, 24, generator=generator) * torch.arange(1, 9)[:, None]
    optimizer.step()
    return before, parameter.detach() - before, optimizer


def test_normalized_rows_are_alike_in_size_and_the_whole_update_keeps_its_norm():
    options = {"newton_schulz_steps": 5}
    before, plain, _ = muon_update(**options)  # type: ignore[arg-type]
    _, normalized, optimizer = muon_update(normalize_rows=True, **options)  # type: ignore[arg-type]
    plain, normalized = (update + 0.05 * before for update in (plain, normalized))  # without the decay
    assert normalized.norm() == pytest.approx(plain.norm().item(), rel=1e-4)
    spread = [update.norm(dim=1).std() / update.norm(dim=1).mean() for update in (plain, normalized)]
    assert spread[1] < 1e-3 < spread[0]
    (state,) = optimizer.state.values()
    assert state["row_second_moment"].shape == (8, 1)


def test_cautious_weight_decay_leaves_alone_what_the_update_moves_outwards():
    before, plain, _ = muon_update()
    _, cautious, _ = muon_update(cautious_weight_decay=True)
    update = plain + 0.05 * before
    inwards = update * before < 0
    torch.testing.assert_close(cautious[inwards], plain[inwards])
    torch.testing.assert_close(cautious[~inwards], update[~inwards])


@pytest.mark.medium
def test_a_warmed_momentum_reaches_the_optimizer_at_each_step(dataset_dir, tmp_path, monkeypatch):
    seen: list[float] = []

    class Watched(MuonAdamW):
        def step(self, closure=None):
            seen.append(self.param_groups[-1]["momentum"])
            return super().step()

    monkeypatch.setattr(
        trainer, "build_optimizer", lambda model, settings, precision: Watched(parameter_groups(model, settings))
    )
    settings = experiment(
        max_steps=6, warmup_steps=0, decay_fraction=0.5, muon_momentum_warmup_steps=2, muon_momentum_start=0.85
    )
    train(settings, dataset_dir, tmp_path / "out", tmp_path / "scratch")
    assert seen == pytest.approx([0.9, 0.95, 0.95, 0.95, 0.95 - 0.1 / 3, 0.95 - 0.2 / 3])


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize(("device", "precision"), [("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "float32")])
def test_newton_schulz_is_in_bfloat16_only_where_that_is_fast(monkeypatch, is_fast, device, precision):
    monkeypatch.setattr(optimizer_module, "has_fast_bfloat16", lambda device: is_fast)
    model = make_model()
    monkeypatch.setattr(type(model), "device", torch.device(device))
    optimizer = build_optimizer(model, TrainingSettings(), precision)
    is_used = is_fast and (device == "cuda" or precision == "bfloat16")
    assert optimizer._newton_schulz_dtype == (torch.bfloat16 if is_used else torch.float32)
