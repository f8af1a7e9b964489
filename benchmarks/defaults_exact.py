"""The default population on cells for whom two parameters are the same: exact, from the command line, nothing declared.

    python benchmarks/defaults_exact.py --posterior RUN [--cells 40 200]

``RUN`` is a train_flow run of experiment mrna_two_rate. The bundled cells (all, and the first 40) are fitted with every
parameter free to vary and again with offset and sigma declared constant. Figures: whether both variances come out as 0,
the largest distance of another unknown between the two fits in standard errors, and the ratio of CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from record import ROOT, Figure, write_result
from stages import finished_run, run_stage

CONSTANT = ("offset", "sigma")


def fit(posterior: Path, cells: Path, directory: Path, *overrides: str) -> tuple[dict[str, Any], float]:
    """What ``fit.json`` holds, and the CPU seconds of the whole command."""
    before = os.times()
    run_stage(
        "fit_population",
        f"posterior={posterior}",
        f"data.path={cells}",
        "estimator=exact",
        "predictions.table=false",
        *overrides,
        directory=directory,
    )
    after = os.times()
    told = json.loads((finished_run("fit_population", directory) / "fit.json").read_text())
    return told, after.children_user - before.children_user + after.children_system - before.children_system


def worst_shift(free: dict[str, Any], declared: dict[str, Any]) -> float:
    """Largest distance of an unknown that both have, in standard errors of the declared fit."""
    other = {entry["name"]: entry for entry in declared["unknowns"]}
    shared = [(entry, other[entry["name"]]) for entry in free["unknowns"] if entry["name"] in other]
    return max(abs(one["estimate"] - two["estimate"]) / two["se"] for one, two in shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[40, 200])
    options = parser.parse_args()
    sheet = pd.read_csv(ROOT / "data" / "mrna_two_rate_cells" / "cells.csv")
    figures: dict[str, Figure] = {}
    shifts, ratios, zeros = [], [], []
    for count in options.cells:
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            path = directory / "cells.csv"
            sheet.iloc[:, : count + 1].to_csv(path, index=False)
            posterior = options.posterior.resolve()
            for name in ("free", "declared"):
                (directory / name).mkdir()
            free, spent = fit(posterior, path, directory / "free")
            declared, least = fit(
                posterior, path, directory / "declared", f"population.constant=[{','.join(CONSTANT)}]"
            )
        at_zero = {test["parameter"] for test in free["variance_tests"] if test["estimated"]}
        zeros.append(float(at_zero == set(CONSTANT) and free["converged"] and declared["converged"]))
        shifts.append(worst_shift(free, declared))
        ratios.append(spent / least)
        figures[f"cpu_seconds_{count}"] = (spent, f"CPU s, {count} cells, nothing declared constant, start-up included")
        figures[f"cpu_seconds_{count}_constant"] = (least, "CPU s, offset and sigma declared constant")
        print(count, at_zero, shifts[-1], ratios[-1], free["message"], sep="\n  ")
    figures["variances_at_zero"] = (min(zeros), "1: offset and sigma, and no others, in every fit; all converged")
    figures["worst_shift_se"] = (max(shifts), "standard errors between the two fits")
    figures["cpu_ratio"] = (max(ratios), "CPU seconds, nothing declared over declared")
    write_result("defaults_exact", figures, title="Cells with two constants that nobody declared, exact.")


if __name__ == "__main__":
    main()
