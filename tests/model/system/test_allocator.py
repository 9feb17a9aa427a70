"""Memory that a step frees stays with the process, and goes back when told."""

import platform
import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from model.system.allocator import keep_freed_memory, trim

def fresh_pages(step):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def step():
    blocks = [np.ones(1 << 20) for _ in range(4)]

keep_freed_memory()
step()
kept = fresh_pages(step)
trim()
print(kept, fresh_pages(step))
"""


@pytest.mark.processes
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose allocator alone is tuned"
)
def test_freed_memory_is_kept_until_trimmed():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, trimmed = map(int, done.stdout.split())
    pages = 4 * 8 * (1 << 20) // resource.getpagesize()
    assert kept < pages // 10
    assert trimmed > pages // 10
