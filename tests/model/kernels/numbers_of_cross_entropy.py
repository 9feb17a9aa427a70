"""The Triton kernel of the loss gives what PyTorch gives, alone and in the operator.

`test_cross_entropy.py` runs this file in a process with Triton's interpreter, which is chosen before the first import,
and on a machine with a GPU in one that compiles it.
"""

import os

import pytest
import torch

from model.kernels import cross_entropy, linear_cross_entropy
from model.logits import IGNORE_INDEX

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("size", "block"), [(61, 4096), (61, 16), (64, 64), (5000, 4096)])
def test_losses_and_gradients_of_any_vocabulary(monkeypatch, size, block, dtype, z_loss):
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    logits_RV = (20 * torch.randn(9, size, generator=generator)).to(DEVICE, dtype)
    labels_R = torch.randint(0, size, (9,), generator=generator).to(DEVICE)
    labels_R[0], labels_R[1], labels_R[2], labels_R[8] = 0, size - 1, IGNORE_INDEX, IGNORE_INDEX
    logits_RV[4] = 0.0
    logits_RV[5] = -3e4
    logits_RV[6, 3] = 3e4
    counted = labels_R != IGNORE_INDEX
    labels_R1 = labels_R[:, None].clamp(min=0)
    expected_R1, expected_RV = linear_cross_entropy._cross_entropy(logits_RV.float(), labels_R1, z_loss)
    found_R = cross_entropy.cross_entropy_(logits_RV, labels_R, z_loss, IGNORE_INDEX)
    torch.testing.assert_close(found_R, expected_R1[:, 0] * counted, rtol=1e-5, atol=1e-5)
    expected_RV = (expected_RV * counted[:, None]).to(dtype)
    torch.testing.assert_close(logits_RV, expected_RV, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 100)
    assert not logits_RV[~counted].any()


def test_logits_that_are_not_numbers_are_a_loss_that_is_none():
    for broken in (torch.nan, torch.inf):
        logits_RV = torch.zeros(2, 100, device=DEVICE)
        logits_RV[0, 70] = broken
        labels_R = torch.tensor([3, 3], device=DEVICE)
        found_R = cross_entropy.cross_entropy_(logits_RV, labels_R, 0.0, IGNORE_INDEX)
        assert not found_R[0].isfinite() and found_R[1].isfinite()


def test_the_operator_takes_the_kernel_where_it_agrees(monkeypatch):
    kernel = cross_entropy.cross_entropy_
    assert linear_cross_entropy._agrees(kernel, DEVICE)
    assert not linear_cross_entropy._agrees(lambda logits_RV, *given: kernel(logits_RV, *given) * 1.01, DEVICE)
    assert not linear_cross_entropy._agrees(lambda logits_RV, *given: kernel(logits_RV.clone(), *given), DEVICE)
    generator = torch.Generator().manual_seed(0)
    hidden_RD, weight_VD = (torch.randn(size, 8, generator=generator).to(DEVICE) for size in (23, 61))
    labels_R = torch.randint(0, 61, (23,), generator=generator).to(DEVICE)
    labels_R[:3] = IGNORE_INDEX
    found = []
    for chosen in (None, kernel):
        monkeypatch.setattr(linear_cross_entropy, "fused_cross_entropy", lambda device, chosen=chosen: chosen)
        operands = hidden_RD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        arguments = (labels_R, 1e-3, 7, None, None, 0.0, 1.0, 0)
        total, *_ = linear_cross_entropy.linear_cross_entropy_sum(*operands, *arguments)
        (total / 20).backward()
        found.append((total, *(value.grad for value in operands)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
