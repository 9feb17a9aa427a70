"""Each Triton kernel gives what PyTorch gives.

`test_kernels.py` runs this file in a process with Triton's interpreter, which is chosen before the first import, and on
a machine with a GPU in one that compiles them.

The interpreter multiplies no bfloat16 matrices: float16 stands for it there.
"""

import os
from typing import ClassVar

import pytest
import torch

from model.generation.steps.draw import Adjustment
from model.generation.steps.graphs import kernels, plain, sampling, self_check
from model.generation.steps.graphs.adjustments import Adjustments
from model.generation.steps.graphs.pages import PAGE, Places
from model.weights import int8
from tests.support.graphs import GraphStepOnCPU
from tests.support.tiny import tiny_model, tiny_tokenizer

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SHORT = [torch.float32, torch.float16]
DTYPES = SHORT if DEVICE == "cpu" else [*SHORT, torch.bfloat16]
HEADS, SLOTS = 6, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [48, 128, 300])
def test_norms_and_the_residual_stream(dtype, size):
    x_ND, branch_ND, weight_D, post_D = (torch.randn(shape).to(dtype) for shape in ((3, size), (3, size), size, size))
    same(kernels.norm(x_ND, weight_D, 1e-6), plain.norm(x_ND, weight_D, 1e-6))
    for post in (None, post_D):
        found = kernels.add_norm(x_ND, branch_ND, post, weight_D, 1e-6)
        for mine, theirs in zip(found, plain.add_norm(x_ND, branch_ND, post, weight_D, 1e-6), strict=True):
            same(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "size", "rotated"), [(1, 16, 16), (2, 24, 8), (6, 64, 64)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rotated_keys_go_to_their_pages(dtype, groups, size, rotated, with_norms):
    width = 4
    table = torch.randperm(SLOTS * width, dtype=torch.int32).view(SLOTS, width)
    slot_N, position_N = (
        torch.tensor([2, 0, 1], dtype=torch.int32),
        torch.tensor([5, 0, 3 * PAGE - 1], dtype=torch.int32),
    )
    qkv_NE = torch.randn(3, (HEADS + 2 * groups) * size).to(dtype)
    cos, sin = torch.rand(width * PAGE, rotated // 2), torch.rand(width * PAGE, rotated // 2)
    weights = (torch.rand(size).to(dtype), torch.rand(size).to(dtype)) if with_norms else None
    caches = [torch.zeros(2, SLOTS * width, groups, PAGE, size, dtype=dtype) for _ in range(2)]
    queries = [
        operations.rotate_store(qkv_NE, (cos, sin), weights, 1e-6, Places(*cache, table, slot_N, position_N))
        for operations, cache in zip((kernels, plain), caches, strict=True)
    ]
    same(*queries)
    same(*caches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "size", "pages"), [(1, 24, 1), (2, 64, 10), (6, 16, 3)])
def test_attention_reads_a_text_up_to_its_end(monkeypatch, dtype, groups, size, pages):
    table = torch.randperm(SLOTS * pages, dtype=torch.int32).view(SLOTS, pages)
    cache = torch.randn(2, SLOTS * pages, groups, PAGE, size).to(dtype)
    slot_N = torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    position_N = torch.tensor([pages * PAGE - 1, 0, PAGE // 2, PAGE * pages // 2], dtype=torch.int32)
    for slot, position in ((2, pages * PAGE - 1), (0, 0), (1, max(PAGE // 2, PAGE * pages // 2))):
        # What a text has not written, NaN among it, is not read.
        page, offset = int(table[slot, position // PAGE]), position % PAGE
        cache[:, page, :, offset + 1 :] = torch.nan
        cache[:, table[slot, position // PAGE + 1 :].long()] = torch.nan
    q_NHK = torch.randn(4, HEADS, size).to(dtype)
    places = Places(*cache, table, slot_N, position_N)
    expected = plain.attention(q_NHK, places, 0.2)
    same(kernels.attention(q_NHK, places, 0.2), expected)
    monkeypatch.setattr(kernels, "BUSY_PROGRAMS", 1)  # without splits
    same(kernels.attention(q_NHK, places, 0.2), expected)


def test_a_text_is_split_by_its_own_length(monkeypatch):
    """However long the context is, and with empty parts."""
    monkeypatch.setattr(kernels, "SPLIT_POSITIONS", PAGE)
    lengths, size, pages = [1, PAGE, PAGE + 1, 3 * PAGE - 1, 7 * PAGE + 5, 16 * PAGE], 16, 16
    table = torch.randperm(len(lengths) * pages, dtype=torch.int32).view(len(lengths), pages)
    cache = torch.randn(2, len(lengths) * pages, 1, PAGE, size)
    slot_N = torch.arange(len(lengths), dtype=torch.int32)
    places = Places(*cache, table, slot_N, torch.tensor(lengths, dtype=torch.int32) - 1)
    q_NHK = torch.randn(len(lengths), HEADS, size)
    for programs in (6, 18, 30, 1024):
        monkeypatch.setattr(kernels, "BUSY_PROGRAMS", programs)
        same(kernels.attention(q_NHK, places, 0.2), plain.attention(q_NHK, places, 0.2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [80, 1500])
def test_the_gate(dtype, size):
    gate_up_NE = torch.randn(3, 2 * size).to(dtype)
    same(kernels.silu_times(gate_up_NE), plain.silu_times(gate_up_NE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5, 20, 70])
@pytest.mark.parametrize("inputs", [200, 1500])
def test_int8_products(dtype, rows, inputs):
    x_NI, weight_OI = torch.randn(rows, inputs).to(dtype), torch.randint(-127, 128, (50, inputs), dtype=torch.int8)
    scale_O = torch.rand(50) / 1000
    same(kernels.int8_product(x_NI, weight_OI, scale_O), plain.int8_product(x_NI, weight_OI, scale_O))


@pytest.mark.parametrize(
    "draw",
    [
        (0.0, 0, 1.0, 0.0, 0.0),
        (1.0, 0, 1.0, 0.0, 0.3),
        (0.8, 5, 1.0, 0.0, 0.7),
        (1.2, 0, 0.9, 0.0, 0.55),
        (1.0, 20, 0.8125, 0.0, 0.9),
        (1.0, 0, 1.0, 0.1, 0.4),
        (0.7, 7, 0.5, 0.05, 0.99),
        (1.0, 119, 0.96875, 0.0, 0.001),
        (1e-40, 0, 0.5, 0.0, 0.5),
        (1.0, 1, 1.0, 0.0, 0.9),
        (1.0, 0, 1e-9, 0.0, 0.9),
    ],
    ids=str,
)
@pytest.mark.medium
@pytest.mark.parametrize(
    ("block", "kept"), [(16, 4), (64, 1), (4096, 4)], ids=["some are gathered", "few are", "all at once"]
)
def test_the_chosen_tokens(monkeypatch, draw, block, kept):
    monkeypatch.setattr(sampling, "VOCABULARY_BLOCK", block)
    monkeypatch.setattr(sampling, "KEPT_BLOCKS", kept)
    logits_RV = torch.randn(8, 120) * 3
    logits_RV[1, 7] = logits_RV[1, 9] = logits_RV[1, 110] = logits_RV[1].max() + 1  # equals in several blocks
    logits_RV[2] = logits_RV[2].round()
    logits_RV[3, ::2] = -torch.inf
    logits_RV[4] = 0.5
    logits_RV[5, 3], logits_RV[6, 117], logits_RV[7] = torch.nan, torch.inf, -torch.inf
    draws_R5 = torch.tensor([draw] * len(logits_RV))
    assert kernels.choose(logits_RV, draws_R5).tolist() == plain.choose(logits_RV, draws_R5).tolist()


@pytest.mark.parametrize(
    "draw", [(1.0, 0, 0.95, 0.0, 0.5), (0.8, 40, 0.95, 0.0, 0.7), (1.0, 0, 1.0, 0.1, 0.4), (1.5, 9000, 0.99, 0.0, 0.6)]
)
def test_the_tokens_of_a_large_vocabulary(draw):
    logits_RV = torch.randn(4, 20_000) * torch.tensor([[0.1], [1.0], [4.0], [2.0]])
    logits_RV[2, 15_000:] = -torch.inf
    logits_RV[3, torch.arange(20_000) % 999 != 7] = -torch.inf  # fewer than top-k are allowed
    draws_R5 = torch.tensor([draw] * len(logits_RV))
    assert kernels.choose(logits_RV, draws_R5).tolist() == plain.choose(logits_RV, draws_R5).tolist()


def test_penalties_biases_and_masks():
    """Twice the same passes: the second finds what the first has left."""
    context, size, rows = 2100, 1100, 5
    logits_RV = torch.randn(rows, size) * 3
    wanted_R = torch.tensor([6, 0, 2, 3, 5], dtype=torch.int32)
    changes_R = torch.tensor([1, 3, 0, 1, 2], dtype=torch.int32)
    slot_N = torch.tensor([0, 4, 1, 2, 4, 3, 5], dtype=torch.int32)
    position_N = torch.tensor([0, 4, 9, 40, 4, 2000, 1030], dtype=torch.int32)
    id_N = torch.randint(0, size, (7,), dtype=torch.int32)
    both = []
    for operations in (kernels, plain):
        torch.manual_seed(1)
        made = Adjustments(6, context, rows, size, torch.device(DEVICE))
        made.tables.text_SL.random_(0, 7)
        made.tables.allowed_RW.random_(-(1 << 31), (1 << 31) - 1)
        assert made.set(0, Adjustment([3], 1.5, 0.0, 0.0, {}))
        assert made.set(2, Adjustment([], 1.0, 0.7, -0.4, {5: 2.0, size - 1: -100.0}))
        assert made.set(3, Adjustment([4] * 1500, 0.5, 0.01, 0.0, {token: token / 64 for token in range(512)}))
        assert made.set(5, Adjustment([1, 9, 1], 1.2, 0.1, 0.2, {}))
        found = []
        for _ in range(2):
            found.append(logits_RV.clone())
            operations.adjust(found[-1], made.tables, slot_N, position_N, id_N, wanted_R, changes_R)
        assert not made.tables.counts_RV.any()
        both.append((torch.stack(found), made.tables.text_SL[:6]))
    same(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])
    assert torch.equal(both[0][0][0], both[0][0][1])
    changed = (both[0][0][0] != logits_RV).any(dim=1)
    assert changed.tolist() == [True, True, False, True, True]


class Step(GraphStepOnCPU):
    """Takes the kernels, on any device."""

    operations: ClassVar[str] = "model.generation.steps.graphs.kernels"


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_step_of_kernels_gives_the_tokens_of_the_reference(monkeypatch, kind):
    """Prompts, samples, penalties, masks and tokens computed ahead: what the step compares when it starts."""
    monkeypatch.setattr(self_check, "TURNS", 2)
    torch.set_default_device("cpu")
    model = tiny_model(tiny_tokenizer(), num_hidden_layers=1, max_position_embeddings=2 * PAGE)
    if kind == "int8":
        int8.quantize(model)
    step = Step.create(model.to(DEVICE), 2)
    assert step.precision == kind
