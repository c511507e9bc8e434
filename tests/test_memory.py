"""Memory of tensors on CPU."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from spaceexploreai.train.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(2**24)
print(faults(), keep_freed_memory(), faults(), faults(), resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_freed_memory_is_not_cleared_by_the_kernel_again():
    """In a process of its own, as it stays so for good."""
    shown = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    before, told, _, after, page = shown
    assert told == "True"
    assert int(before) > 0.9 * 2**26 / int(page) > 100 * int(after)
