"""Freed memory stays with the process instead of going back to the system at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nlme_sbi.compute.devices import keep_freed_memory

PROGRAM = """
import os, sys, torch
from pathlib import Path
from nlme_sbi.compute.devices import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
tensors = [torch.ones(2_500_000) for _ in range(10)]
del tensors
print(resident() - before)
"""


def mebibytes_left(how: str) -> float:
    """What a process still holds of ten tensors of 9.5 MiB each after it has freed them."""
    command = [sys.executable, "-c", PROGRAM, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="another C library than glibc")
def test_freed_tensors_stay_with_the_process() -> None:
    assert mebibytes_left("kept") > 80
    assert mebibytes_left("given back") < 40
