"""Freed memory is kept: tensors made again and again do not make the system hand out pages again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nlme_sbi.devices import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from nlme_sbi.devices import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def work():
    a = torch.ones(4_000_000)
    b, c, d = a + 1, a * 2, a - 1
    del a, b, c, d
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="another C library than glibc")
def test_pages_are_not_asked_for_again() -> None:
    # 20 x 4 tensors of 3906 pages: 312,000 faults where all is given back; where it is kept, those of one round at most.
    assert page_faults("kept") < 20_000
    assert page_faults("given back") > 100_000
