"""Freed memory stays with the process instead of going back to the system at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nlme_sbi.compute.devices import keep_freed_memory

# In processes of their own, forked where torch is imported.
PROGRAM = """
import os, torch
from pathlib import Path
from nlme_sbi.compute.devices import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
for how in ("given back", "kept"):
    child = os.fork()
    if child == 0:
        if how == "kept":
            assert keep_freed_memory()
        before = resident()
        tensors = [torch.ones(2_500_000) for _ in range(10)]
        del tensors
        print(resident() - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="another C library than glibc")
def test_freed_tensors_stay_with_the_process() -> None:
    """What a process still holds of ten tensors of 9.5 MiB each after it has freed them, in MiB."""
    told = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    given_back, kept = map(float, told.splitlines())
    assert kept > 80
    assert given_back < 40
