"""The same fits in two checkouts: a change of structure must leave every number as it was.

    python benchmarks/same_results.py OLD NEW [--outputs DIR]

``OLD`` and ``NEW`` are directories of two checkouts, both run by this Python. Theophylline and the 200 bundled cells
are fitted by the command line of each, with the same seed and without a network. Figures: the largest difference of an
estimate, of a standard error and of -2 log L, and whether the printed tables are the same. A fit that is finished below
``DIR`` is taken up again. The exit code is 1 where a number differs by more than 1e-8.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_result

CASES = {"theophylline": "theophylline", "200 cells": "mrna_two_rate"}
OVERRIDES = ("posterior=none", "estimator=exact", "seed=0", "device=cpu")
ALLOWED = 1e-8  # where a library's routine took the place of one of ours


def fitted(checkout: Path, experiment: str, outputs: Path) -> Path:
    """Run ``scripts/fit_population.py`` of a checkout and return the directory of its fit."""
    command = [sys.executable, "scripts/fit_population.py", f"experiment={experiment}", *OVERRIDES]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    ended = subprocess.run(
        [*command, f"output_root={outputs}"], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} in {checkout} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    runs = [path.parent for path in (outputs / "fit_population").glob(f"{experiment}-*/manifest.json")]
    if len(runs) != 1:
        raise SystemExit(f"{outputs} must hold one fit of {experiment}, and holds {len(runs)}: choose an empty one.")
    return runs[0]


def commit(checkout: Path) -> str:
    """Of a checkout, with "+" where its working tree differs."""
    options = {"cwd": checkout, "capture_output": True, "text": True}
    found = subprocess.run(["git", "describe", "--always", "--abbrev=12"], **options)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **options)
    return found.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def differences(old: Path, new: Path) -> dict[str, float | bool]:
    """Largest differences of two fits of the same data.

    Raises:
        SystemExit: where they do not have the same unknowns.
    """
    before, after = (json.loads((run / "fit.json").read_text()) for run in (old, new))
    one, two = ({entry["name"]: entry for entry in told["unknowns"]} for told in (before, after))
    if list(one) != list(two):
        raise SystemExit(f"The fits have different unknowns: {', '.join(one)} and {', '.join(two)}.")
    tables = [(run / "table.txt").read_bytes() for run in (old, new)]
    return {
        "estimate_difference": max(_apart(one[name]["estimate"], two[name]["estimate"]) for name in one),
        "se_difference": max(_apart(one[name]["se"], two[name]["se"]) for name in one),
        "deviance_difference": _apart(before["minus_two_log_likelihood"], after["minus_two_log_likelihood"]),
        "same_table": tables[0] == tables[1],
    }


def _apart(one: float | None, two: float | None) -> float:
    """Infinite where only one of them is a number."""
    if one is None or two is None:
        return 0.0 if one is two else float("inf")
    return abs(one - two)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--outputs", type=Path)
    options = parser.parse_args()
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    outputs = (options.outputs or Path(tempfile.mkdtemp())).resolve()
    units = {
        "estimate_difference": "largest, unconstrained scale",
        "se_difference": "largest, unconstrained scale",
        "deviance_difference": "of -2 log L",
        "same_table": "whether table.txt has the same bytes",
    }
    figures: dict[str, Any] = {}
    for case, experiment in CASES.items():
        runs = {name: fitted(path, experiment, outputs / name) for name, path in checkouts.items()}
        found = differences(runs["old"], runs["new"])
        figures |= {f"{name}[{case}]": (value, units[name]) for name, value in found.items()}
    between = " and ".join(commit(path) for path in checkouts.values())
    write_result("same_results", figures, title=f"The same fits in two checkouts, {between}, estimator exact.")
    if any(not isinstance(value, bool) and not value <= ALLOWED for value, _ in figures.values()):
        raise SystemExit("The results differ.")


if __name__ == "__main__":
    main()
