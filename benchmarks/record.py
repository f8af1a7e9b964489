"""What every benchmark shares: the machine, a calibration figure, and one JSON file a benchmark."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
Figure = tuple[float | int | str | bool | None, str]


@dataclass
class Spent:
    """Wall and CPU seconds of a block, children included; filled in when the block ends."""

    wall: float = 0.0
    cpu: float = 0.0


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextmanager
def stopwatch() -> Iterator[Spent]:
    """Measure a block: ``with stopwatch() as spent: ...``."""
    spent, wall, cpu = Spent(), time.perf_counter(), _cpu_seconds()
    try:
        yield spent
    finally:
        spent.wall, spent.cpu = time.perf_counter() - wall, _cpu_seconds() - cpu


def calibration_seconds() -> float:
    """CPU seconds of twenty products of fixed 1000 x 1000 matrices in numpy: the machine's speed at this moment."""
    matrix = np.random.default_rng(0).standard_normal((1000, 1000))
    with stopwatch() as spent:
        for _ in range(20):
            matrix @ matrix
    return spent.cpu


def machine() -> str:
    """Processor, cores, memory and versions in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}; {platform.system()}; {versions}"


def commit() -> str:
    """The commit that was measured, with "+" where the working tree differs from it."""
    found = subprocess.run(["git", "describe", "--always", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def write_result(name: str, figures: Mapping[str, Figure], *, title: str) -> Path:
    """Write ``benchmarks/results/<name>.json`` and print it; the calibration figure is added."""
    shown = dict(figures)
    shown["calibration_cpu_seconds"] = (calibration_seconds(), "CPU s for 20 products of 1000 x 1000 matrices, numpy")
    content = {
        "title": title,
        "commit": commit(),
        "machine": machine(),
        "figures": {key: {"value": value, "unit": unit} for key, (value, unit) in shown.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    for key, (value, unit) in shown.items():
        print(f"{key:32} {value:.5g} {unit}" if isinstance(value, float) else f"{key:32} {value} {unit}")
    return path
