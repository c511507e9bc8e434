"""Freed memory is used again, not asked of the system anew."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from spaceexploreai.train.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(12_000_000) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def count_faults(kept: bool) -> int:
    code = FAULTS.format(kept=kept)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """Page faults of blocks of 48 MB, 12 of them; one page has at most 64 KiB, huge ones aside."""
    assert count_faults(kept=True) < 100
    assert count_faults(kept=False) > 10 * 12
