"""Device and precision of a stage: `auto` resolved, and a clear error for a device that is missing.

`auto` chooses bfloat16 only if it is fast: on NVIDIA GPUs with native support, and CPUs with AMX or
AVX512-BF16. Other CPUs emulate it (on AVX2 a 256 x 256 product takes about 50 times as long as float32).
"""

from typing import Literal

import torch

from model.errors import PipelineError

Precision = Literal["float32", "bfloat16", "float16"]


def resolve_device(name: str, *, setting: str = "training.device") -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu" or "cuda".

    setting: the setting that an error names. Raises PipelineError if a GPU is requested and PyTorch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise PipelineError(
            f"{setting} is {name!r}: PyTorch {torch.__version__} ({build}) sees no GPU; set it to 'cpu' or 'auto'"
        )
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def set_tf32(*, enabled: bool) -> None:
    """Whether GPUs round the operands of float32 products to TensorFloat-32, in all of PyTorch's interfaces.

    With compilation transformers and accelerate switch it on unasked, each in another interface. Where the two
    disagree, reading the older one raises RuntimeError.
    """
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]  # of everything; those of CUDA follow
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def serving_dtype(precision: str, device: str, *, setting: str = "serving.device") -> torch.dtype | None:
    """The type of activations for "float32", "bfloat16" or "auto", which is bfloat16 on a GPU that computes it fast.

    None: as stored. Raises PipelineError as `resolve_device`.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    target = resolve_device(device, setting=setting)
    return torch.bfloat16 if target.type == "cuda" and has_fast_bfloat16(target) else None


def resolve_precision(precision: str, device: torch.device, *, setting: str = "training.precision") -> Precision:
    """The precision for "auto" (bfloat16 if it is fast, else float32), or the named one.

    Raises PipelineError for float16 without a GPU: it needs gradient scaling, which PyTorch has for GPUs only.
    """
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    if precision == "float16" and device.type == "cpu":
        raise PipelineError(f"{setting} is 'float16' on the CPU: expected a GPU; set it to 'float32' or 'bfloat16'")
    if precision not in ("float32", "bfloat16", "float16"):
        raise PipelineError(f"{setting} is {precision!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return precision  # type: ignore[return-value]
