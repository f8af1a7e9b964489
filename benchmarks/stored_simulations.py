"""A million stored simulations: seconds, memory and disk of making them, and of a training that reads them.

    python benchmarks/stored_simulations.py [--count 1000000] [--steps 200] [--workers 2]

Runs ``scripts/simulate.py`` of the reference experiment (180 times, one signal) into a temporary folder, then
``scripts/train_flow.py`` on them for a few steps. Memory is the largest sum of resident memory over all processes of a
command, sampled five times a second; memory that processes share counts for each of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from record import ROOT, write_result

EXPERIMENT = "mrna_two_rate"
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Cost:
    """Seconds and peak memory of one command."""

    seconds: float
    peak_gb: float


def resident_bytes(session: int) -> int:
    """Memory of all processes of a session."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in brackets may hold spaces; the session is the fourth word after it.
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                total += int((entry / "statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):  # it has just ended
            continue
    return total


def measure_cost(stage: str, *overrides: str) -> Cost:
    """Run a stage in its own session and sample its memory."""
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), f"experiment={EXPERIMENT}", *overrides]
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{stage} ended with {process.returncode}: {' '.join(command)}")
    return Cost(time.perf_counter() - begin, peak / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = f"output_root={folder}"
        made = measure_cost("simulate", root, f"simulation.n={options.count}", f"simulation.workers={options.workers}")
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        read = measure_cost("train_flow", root, "simulations=latest", f"training.steps={options.steps}", "device=cpu")
    write_result(
        "stored_simulations",
        {
            "simulations": (options.count, "of 180 values each, stored in shards"),
            "seconds": (made.seconds, "s to simulate and store them, start-up included"),
            "peak_gb": (made.peak_gb, "GB, largest memory of all processes together while simulating"),
            "disk_gb": (disk / 1e9, "GB on disk"),
            "workers": (options.workers, "processes that simulate"),
            "training_steps": (options.steps, "steps of training on them"),
            "training_seconds": (read.seconds, "s of these, start-up and checks of the stored bytes included"),
            "training_peak_gb": (read.peak_gb, "GB, largest memory while training"),
        },
        title="Memory, disk and seconds of a million stored simulations.",
    )


if __name__ == "__main__":
    main()
