"""Layers packed for decoding compute what the originals compute, and their memory does not grow with use."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from model.modeling_rex import RexRMSNorm
from model.weights.packed import PackedLinear, PackedRMSNorm, pack
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 32, 63, 260])
def test_a_packed_product_is_the_product_whatever_the_number_of_rows(rows):
    x_MK, weight_NK = torch.randn(1, rows, 512), torch.randn(768, 512)
    expected = nn.functional.linear(x_MK, weight_NK)
    torch.testing.assert_close(PackedLinear(weight_NK)(x_MK), expected, atol=1e-3, rtol=1e-3)


def test_a_packed_norm_gives_what_the_norm_gives():
    norm = RexRMSNorm(512, 1e-3, initial_gain=1.5)
    x_MD = torch.randn(3, 512) * torch.tensor([[1e-3], [1.0], [1e3]])
    with torch.inference_mode():
        torch.testing.assert_close(PackedRMSNorm(norm)(x_MD), norm(x_MD), atol=1e-6, rtol=1e-5)


def test_layers_in_another_precision_are_not_packed():
    model = pack(tiny_model(tiny_tokenizer(), hidden_size=512).to(torch.bfloat16))
    assert not any(isinstance(module, PackedLinear | PackedRMSNorm) for module in model.modules())


MEMORY = """
import sys
from pathlib import Path
import torch
from model.weights.packed import PackedLinear

def held_mb():
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if "RssAnon" in line) / 1024

layer = PackedLinear(torch.randn(1280, 512))
with torch.inference_mode():
    for rows in (1, 16, 32, 300):
        layer(torch.ones(rows, 512))
    before = held_mb()
    for rows in range(1, 300):
        layer(torch.ones(rows, 512))
print(held_mb() - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_prompts_of_every_length_do_not_grow_the_memory():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40
