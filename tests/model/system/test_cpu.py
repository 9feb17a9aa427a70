"""Cores are counted by affinity and CPU quota, in both layouts of the kernel's control groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.system.cpu import cpu_quota, decoding_threads, usable_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def quota(root: Path, membership: str) -> float | None:
    write(root / "membership", membership)
    return cpu_quota(root, root / "membership")


def test_without_a_quota_there_is_none(tmp_path):
    write(tmp_path / "cpu.max", "max 100000\n")
    assert quota(tmp_path, "0::/\n") is None
    assert cpu_quota(tmp_path / "nothing", tmp_path / "nothing") is None


def test_the_tightest_quota_on_the_way_up_binds(tmp_path):
    write(tmp_path / "outer/cpu.max", "150000 100000\n")
    write(tmp_path / "outer/inner/cpu.max", "400000 100000\n")
    assert quota(tmp_path, "0::/outer/inner\n") == 1.5


def test_a_containers_own_group_is_found_at_the_top(tmp_path):
    write(tmp_path / "cpu.max", "200000 100000\n")
    assert quota(tmp_path, "0::/docker/abc\n") == 2.0


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct", "cpu,cpuacct/docker/abc"])
def test_version_1_groups_are_read(tmp_path, folder):
    write(tmp_path / folder / "cpu.cfs_quota_us", "300000\n")
    write(tmp_path / folder / "cpu.cfs_period_us", "100000\n")
    assert quota(tmp_path, "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n") == 3.0


def test_version_1_without_a_quota_says_minus_one(tmp_path):
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
    assert quota(tmp_path, "4:cpu:/\n") is None


def test_a_quota_below_one_core_still_leaves_one(tmp_path):
    write(tmp_path / "cpu.max", "50000 100000\n")
    write(tmp_path / "membership", "0::/\n")
    assert usable_cores(tmp_path, tmp_path / "membership") == 1


def test_affinity_limits_the_cores(tmp_path):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores(tmp_path, tmp_path / "nothing") == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_small_models_decode_in_one_thread():
    assert decoding_threads(3_000_000, 8) == 1
    assert decoding_threads(30_000_000, 8) == 8


WAITING_THREADS = """
import os, torch
from model.system.cpu import release_worker_threads

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
x = torch.randn(600, 600)
before = count()
expected = x.sin().sum()
started = count() - before
release_worker_threads()
left = count() - before
assert torch.equal(x.sin().sum(), expected)
print(started, left, count() - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_threads_that_wait_for_products_end_and_start_again():
    done = subprocess.run([sys.executable, "-c", WAITING_THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0", "2"]
