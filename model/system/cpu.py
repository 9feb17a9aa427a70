"""The cores that this process may use, and threads to match.

`os.cpu_count()` counts the machine's cores. A container's CPU quota and the scheduler's affinity allow fewer, and more
threads than cores preempt each other inside every matrix product: on one loaded core 2 threads were 18 times slower.
"""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SMALL_MODEL = 10_000_000
"""Parameters below which one thread decodes one text: the products are too small to share. 3 M parameters on 2 busy
cores gave 130 tokens/s with 1 thread and 15 with 2 (float32); 30 M in int8 gave 35 and 83."""


def decoding_threads(parameters: int, cores: int) -> int:
    """Threads for a model that answers one request at a time."""
    return 1 if parameters < SMALL_MODEL else cores


def release_worker_threads() -> None:
    """End the OpenMP threads that the calling thread's products left waiting; its next product starts them again.

    GNU OpenMP lets the threads of every pool sleep as soon as they wait, if all pools of the process together have
    more threads than there are cores. The thread that loaded a model would thus slow down the one that decodes with it:
    50 sleeps a token, and half as long again (`bench/LOG.md`).
    """
    import torch

    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        with suppress(OSError, AttributeError):  # torch was built with another OpenMP, or an old one
            soft = 1
            ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD).omp_pause_resource_all(soft)


def limit_threads() -> int:
    """Let torch compute in no more threads than there are usable cores, and return their number.

    Never raises the number: a lower one, set by the caller or OMP_NUM_THREADS (as torchrun does), stays.
    """
    import torch

    threads = min(torch.get_num_threads(), usable_cores())
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


def usable_cores(cgroup: Path | None = None, membership: Path | None = None) -> int:
    """Cores by affinity, at most the cgroup's CPU quota rounded down, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroup, membership)
    return max(1, affinity if quota is None else min(affinity, int(quota)))


def cpu_quota(cgroup: Path | None = None, membership: Path | None = None) -> float | None:
    """Cores that the tightest CPU quota of this process's cgroups allows, None without a quota.

    Reads cgroup v2 (`cpu.max` of the group and its parents) and v1 (`cpu.cfs_quota_us` over `cpu.cfs_period_us`).
    """
    quotas = [_read_quota(folder) for folder in _folders(cgroup or CGROUP, membership or MEMBERSHIP)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(cgroup: Path, membership: Path) -> list[Path]:
    """Every folder whose quota binds this process; inside a container its own group is mounted at the top."""
    folders = [cgroup, cgroup / "cpu", cgroup / "cpu,cpuacct"]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        inner = Path(path.lstrip("/"))
        for root in [cgroup / controllers] if controllers else [cgroup]:
            folders += [root / part for part in [inner, *inner.parents]]
    return folders


def _read_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None
