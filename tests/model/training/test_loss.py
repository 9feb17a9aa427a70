import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

from model.build import build_config, build_model
from model.kernels.norm_rotary import use_cpu_kernels
from model.logits import IGNORE_INDEX
from model.training.loss import linear_cross_entropy
from tests.model.training.tiny import experiment
from tests.support.tiny import ROPE_SCALING

REPO = Path(__file__).resolve().parents[3]
B, T, D, V = 3, 17, 24, 61


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(B, T, D, generator=generator, requires_grad=True)
    weight_VD = torch.randn(V, D, generator=generator, requires_grad=True)
    labels_BT = torch.randint(0, V, (B, T), generator=generator)
    labels_BT[0, :9] = IGNORE_INDEX
    return hidden_BTD, weight_VD, labels_BT


def whole_logits(hidden_BTD, weight_VD, labels_BT, z_loss=0.0, items=None):
    """The definition, with all logits at once."""
    logits_RV = (hidden_BTD[:, :-1] @ weight_VD.t()).flatten(0, 1)
    labels_R = labels_BT[:, 1:].flatten()
    loss = functional.cross_entropy(logits_RV, labels_R, reduction="sum", ignore_index=IGNORE_INDEX)
    loss = loss + z_loss * (logits_RV.logsumexp(1).square() * (labels_R != IGNORE_INDEX)).sum()
    return loss / ((labels_R != IGNORE_INDEX).sum() if items is None else items)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("items", [None, 100])
def test_loss_and_gradients_are_those_of_whole_logits(rows, z_loss, items):
    hidden_BTD, weight_VD, labels_BT = example()
    loss = linear_cross_entropy(hidden_BTD, weight_VD, labels_BT, items, z_loss=z_loss, rows=rows)
    expected = whole_logits(hidden_BTD, weight_VD, labels_BT, z_loss, items)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (hidden_BTD, weight_VD)),
        torch.autograd.grad(3 * expected, (hidden_BTD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_token_that_is_nearly_impossible_has_a_finite_loss():
    hidden_BTD, weight_VD = torch.full((1, 2, 1), 100.0), torch.tensor([[2.0], [0.0]])
    loss = linear_cross_entropy(hidden_BTD, weight_VD, torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx(200.0)


def test_ragged_batches_add_up_to_one_large_batch():
    hidden_BTD, weight_VD, labels_BT = example()
    labels_BT[1, 3:] = IGNORE_INDEX
    items = (labels_BT[:, 1:] != IGNORE_INDEX).sum()
    parts = [linear_cross_entropy(hidden_BTD[i : i + 1], weight_VD, labels_BT[i : i + 1], items) for i in range(B)]
    whole = linear_cross_entropy(hidden_BTD, weight_VD, labels_BT)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), weight_VD)[0], torch.autograd.grad(whole, weight_VD)[0])


def test_under_autocast_the_loss_is_float32_and_close():
    hidden_BTD, weight_VD, labels_BT = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden_BTD, weight_VD, labels_BT)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole_logits(hidden_BTD, weight_VD, labels_BT).item(), rel=0.02)
    loss.backward()
    assert weight_VD.grad.dtype == hidden_BTD.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "shape",
    [{}, {"post_norm": False, "qk_norm": True}, {"partial_rotary_factor": 0.5, "rope_scaling": ROPE_SCALING["yarn"]}],
    ids=["post_norm", "qk_norm", "partial and scaled"],
)
def test_gradients_written_out_for_the_cpu_are_those_that_pytorch_derives(shape):
    config = build_config(replace(experiment().model, **shape), 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    config.attention_dropout = 0.0
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for written_out in (True, False):
        model = build_model(config, seed=0).train()
        if written_out:
            use_cpu_kernels(model)
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_under_autocast_gradients_written_out_are_as_near_to_float32_as_those_that_pytorch_derives():
    config = build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    config.attention_dropout = 0.0
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients(bfloat16: bool, kernels: bool = True) -> dict[str, Tensor]:
        model = build_model(config, seed=0).train()
        if kernels:
            use_cpu_kernels(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    exact, ours = gradients(False), gradients(True)
    derived = gradients(True, kernels=False)
    for name, gradient in exact.items():
        error, usual = ((found[name] - gradient).norm() / gradient.norm() for found in (ours, derived))
        assert error < 0.02 and error < 1.5 * usual + 1e-3, name


PEAK_OF_A_STEP = """
import resource, torch
from model.training.loss import linear_cross_entropy
hidden = torch.zeros(2, 1025, 8, requires_grad=True)
weight = torch.zeros(60_000, 8, requires_grad=True)
labels = torch.zeros(2, 1025, dtype=torch.long)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, labels).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_the_logits_of_a_large_vocabulary_never_exist_whole():
    unit = 1 if sys.platform == "darwin" else 1024
    done = subprocess.run([sys.executable, "-c", PEAK_OF_A_STEP], cwd=REPO, capture_output=True, text=True, check=True)
    whole = 2 * 1024 * 60_000 * 4  # bytes: 492 MB
    assert int(done.stdout) * unit < whole / 4


@pytest.mark.parametrize("taught", [False, True])
def test_the_operator_keeps_what_compilers_ask_of_one(taught):
    hidden_BTD, weight_VD, labels_BT = example()
    hidden_RD = hidden_BTD.detach().flatten(0, 1).requires_grad_()
    teacher = (torch.randn(B * T, 5), torch.randn(V, 5), 0.5, 2.0, 3) if taught else (None, None, 0.0, 1.0, 0)
    arguments = (hidden_RD, weight_VD.detach().requires_grad_(), labels_BT.flatten(), 0.01, 7, *teacher)
    torch.library.opcheck(torch.ops.rex.linear_cross_entropy.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(bfloat16):
    config = build_config(experiment().model, 300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    config.attention_dropout = 0.0
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    graphs: list[torch.fx.GraphModule] = []

    def recorded(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def gradients(compiled: bool) -> dict[str, Tensor]:
        model = build_model(config, seed=0).train()
        model.linear_loss = lambda hidden, weight, labels, items, ids: linear_cross_entropy(
            hidden, weight, labels, items
        )
        run = torch.compile(model, backend=aot_autograd(fw_compiler=recorded), fullgraph=True) if compiled else model
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = run(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    eager, compiled = gradients(False), gradients(True)
    for name, expected in eager.items():
        assert expected.norm() > 0
        error = (compiled[name] - expected).norm() / expected.norm()
        assert error < (0.05 if bfloat16 else 1e-4), name
    assert sum(node.target is torch.ops.rex.linear_cross_entropy.default for node in graphs[0].graph.nodes) == 1
