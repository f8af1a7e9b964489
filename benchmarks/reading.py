"""Seconds and memory of reading: 5,000,000 long rows, a wide sheet of 10,000 columns, and how both grow.

    python benchmarks/reading.py

Every file is read in a process of its own, whose peak memory is that of Python, torch and the table together. Growth is
the CPU time of a cell in the large file over that in the small one: 1 where reading is linear. Small files are read
three times, and the fastest counts, because a busy machine slows a short measurement most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from record import ROOT, write_result

READ = """
import json, resource, sys, time
from nlme_sbi.io import LongTable, WideSheet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began, cpu = time.perf_counter(), time.process_time()
found = {"long": LongTable, "wide": WideSheet}[sys.argv[1]](sys.argv[2]).read()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu,
                  "gb": peak * 1024 / 1e9, "cells": found.values.numel(), "before": before * 1024 / 1e9}))
"""


def long_file(path: Path, rows: int) -> None:
    """``rows`` measurements of individuals with 50 each."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("id,time,value\n")
        for start in range(0, rows, 500_000):
            count = min(500_000, rows - start)
            places = np.arange(start, start + count)
            values = rng.normal(size=count)
            file.writelines(
                f"{place // 50},{place % 50},{value:.6g}\n" for place, value in zip(places, values, strict=True)
            )


def wide_file(path: Path, columns: int, rows: int = 100) -> None:
    """``columns`` individuals at ``rows`` times."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("time," + ",".join(f"cell_{k}" for k in range(columns)) + "\n")
        for row in range(rows):
            file.write(f"{row}," + ",".join(f"{value:.6g}" for value in rng.normal(size=columns)) + "\n")


def measured(kind: str, path: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak GB of reading a file."""
    done = subprocess.run(
        [sys.executable, "-c", READ, kind, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {}
        for kind, make, sizes in (("long", long_file, (1_000_000, 5_000_000)), ("wide", wide_file, (10_000, 80_000))):
            for size in sizes:
                path = folder / f"{kind}_{size}.csv"
                make(path, size)
                times = 3 if size == min(sizes) else 1
                found[kind, size] = min((measured(kind, path) for _ in range(times)), key=lambda one: one["cpu"])
                path.unlink()
                print(kind, size, found[kind, size], flush=True)
    long, wide = found["long", 5_000_000], found["wide", 10_000]

    def growth(small: dict[str, float], large: dict[str, float]) -> float:
        return (large["cpu"] / large["cells"]) / (small["cpu"] / small["cells"])

    write_result(
        "reading",
        {
            "long_seconds": (long["seconds"], "s, 5,000,000 long rows"),
            "long_cpu_seconds": (long["cpu"], "CPU s"),
            "long_peak_gb": (long["gb"], "GB, Python and torch included"),
            "long_growth": (growth(found["long", 1_000_000], long), "times the CPU a cell of a fifth of the rows"),
            "wide_seconds": (wide["seconds"], "s, 10,000 columns of 100 rows"),
            "wide_cpu_seconds": (wide["cpu"], "CPU s"),
            "wide_peak_gb": (wide["gb"], "GB, Python and torch included"),
            "wide_growth": (growth(wide, found["wide", 80_000]), "times the CPU a cell for eight times the columns"),
        },
        title="Reading large files: one row a measurement, one column an individual.",
    )


if __name__ == "__main__":
    main()
