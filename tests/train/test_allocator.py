"""The C library's allocator, as a rank on the CPU uses it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

BLOCK = 64 * 2**20
COUNT_FAULTS = f"""
import resource, sys
import torch
from mmit.train.allocator import keep_freed_memory, memory_given_back

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros({BLOCK}, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory_given_back():
    pass
usual = [faults_of_a_step() for _ in range(12)][-1]
keep_freed_memory()
kept = [faults_of_a_step() for _ in range(12)][-1]
print(usual, kept)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_block_that_was_freed_is_not_faulted_in_again() -> None:
    """64 MiB are 16384 pages of 4 KiB, or 32 of 2 MiB: all are touched anew without, and none but strays with."""
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    usual, kept = map(int, run.stdout.split())
    assert usual >= BLOCK // 2**21
    assert kept < 8
