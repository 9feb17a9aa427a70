"""The hardware and package versions of a measurement, and its number of threads."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from model.system.cpu import decoding_threads, usable_cores


def torch_threads(parameters: int) -> int:
    """Threads for decoding: as many as the service uses, unless OMP_NUM_THREADS is set."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    return decoding_threads(parameters, usable_cores())


def all_threads() -> int:
    """Threads for untimed work: one per usable core, unless OMP_NUM_THREADS is set."""
    return torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else usable_cores()


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date as a flat dictionary; memory in bytes."""
    return {
        "processor": _processor(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_average": round(psutil.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "int8_engine": torch.backends.quantized.engine,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    features = next((line for line in lines if line.startswith("flags")), "").split()
    known = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in features]
    return f"{names[0] if names else platform.machine()} ({', '.join(known) or 'no AVX2'})"
