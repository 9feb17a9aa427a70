"""Model FLOP/s of a training, and its share of the measured matrix-multiplication peak.

Model FLOP/s utilization (MFU; PaLM, appendix B) = tokens/s * FLOPs per token / peak. The peak is measured in the run's
dtype on the run's machine, because a data sheet says little about two cores of a shared CPU.
"""

import time

import torch

from model.modeling_rex import RexForCausalLM
from model.system.devices import Precision
from model.system.memory import peak_resident_bytes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def flops_per_token(model: RexForCausalLM, sequence_length: int) -> int:
    """Floating-point operations per token, forward and backward: 6 N + 6 L T H K.

    N: parameters of matrix products (all but an untied input embedding); L layers, T tokens, H heads of size K.
    The attention term counts the causal half of 12 L T H K (PaLM, appendix B).
    """
    config = model.config
    assert config.head_dim is not None
    multiplied = model.num_parameters()
    if not config.tie_word_embeddings:
        multiplied -= model.model.embed_tokens.weight.numel()
    attention = config.num_hidden_layers * sequence_length * config.num_attention_heads * config.head_dim
    return 6 * multiplied + 6 * attention


def matmul_peak(device: torch.device, precision: Precision, *, size: int | None = None, rounds: int = 8) -> float:
    """FLOP/s of a square matrix product in `precision` on `device`: the best of `rounds`.

    The operands are random: a GPU multiplies constants with less power and so at higher clocks, 832 to 874 TFLOP/s on
    an H100 that reaches 733 with random numbers. size: rows and columns; 1,024 on a CPU (0.01 s for each round on two
    cores), 8,192 on a GPU. bfloat16 on a CPU that emulates it is measured on fewer rows.
    """
    dtype = _DTYPES[precision]
    if size is None:
        size = 8192 if device.type == "cuda" else 1024 if precision == "float32" else 512
    generator = torch.Generator(device).manual_seed(0)  # separate, to keep the training's random state
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(rounds):
            _wait(device)
            started = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated by PyTorch on the GPU, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
