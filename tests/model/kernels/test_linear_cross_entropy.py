"""The loss as an operator: PyTorch's own checks of it, and the same gradients compiled as eager."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

from model.build import build_config, build_model
from model.kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.modeling_rex import RexForCausalLM
from model.settings import ModelSettings, TrainingSettings
from model.training.loss import TrainingLoss

pytestmark = pytest.mark.medium

SHAPE = ModelSettings(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)
"""One layer: compiling takes seconds for each, and the loss follows the last."""
V = 61


def operands(dtype: torch.dtype, with_teacher: bool) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, 8, generator=generator).to(dtype).requires_grad_()
    labels_R = torch.randint(0, V, (23,), generator=generator)
    labels_R[:3] = -100
    teacher: tuple[object, ...] = (None, None, 0.0, 1.0, 0)
    if with_teacher:
        drawn = torch.randn(23, 6, generator=generator), torch.randn(V, 6, generator=generator)
        teacher = (*(value.to(dtype) for value in drawn), 0.3, 2.0, 5)
    return hidden_RD, weight_VD, labels_R, 1e-3, 7, *teacher


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_what_it_promises_to_autograd_and_to_compilers(dtype, with_teacher):
    passed = torch.library.opcheck(linear_cross_entropy_sum, operands(dtype, with_teacher))
    assert set(passed.values()) == {"SUCCESS"}
    assert "test_aot_dispatch_dynamic" in passed


def model_with_loss(with_teacher: bool, **training: float) -> RexForCausalLM:
    config = build_config(SHAPE, V, 0, 0, 1)
    model = build_model(config, seed=0).train()
    teacher = build_model(config, seed=1).eval() if with_teacher else None
    model.linear_loss = TrainingLoss(TrainingSettings(**training), teacher)
    return model


def loss_and_gradients(model: RexForCausalLM, forward, bfloat16: bool) -> tuple[float, dict[str, Tensor]]:
    ids_BT = torch.randint(2, V, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = forward(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


@pytest.mark.processes  # the compiler starts workers
@pytest.mark.parametrize(
    ("backend", "bfloat16", "with_teacher", "tolerance"),
    [
        pytest.param("inductor", False, False, 1e-4, marks=pytest.mark.slow),
        ("aot_eager", False, True, 1e-4),
        ("aot_eager", True, False, 0.05),
        ("aot_eager", True, True, 0.05),
    ],
)
def test_a_compiled_model_has_the_gradients_of_an_eager_one(backend, bfloat16, with_teacher, tolerance):
    """In one graph: a break before the loss would leave it uncompiled. aot_eager skips the C++ compiler."""
    model = model_with_loss(with_teacher, distill_temperature=2.0, distill_top_k=8, z_loss=1e-4)
    loss, expected = loss_and_gradients(model, model, False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled_loss, found = loss_and_gradients(model, compiled, bfloat16)
    assert compiled_loss == pytest.approx(loss, rel=tolerance)
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("with_teacher", [False, True])
def test_compilers_see_one_opaque_operator_and_none_of_its_products(with_teacher):
    recorded = EagerAndRecordGraphs()
    model = model_with_loss(with_teacher)
    counter = CompileCounterWithBackend(recorded)
    loss_and_gradients(model, torch.compile(model, fullgraph=True, backend=counter), False)
    (graph,) = recorded.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count("rex.linear_cross_entropy.default") + called.count("rex.linear_cross_entropy") == 1
    assert not [name for name in called if "addmm" in name or "scatter" in name]
