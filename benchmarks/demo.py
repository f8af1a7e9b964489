"""``make demo`` as a newcomer runs it: fresh clone, empty .venv, warm package caches; then against the exact fit.

Oracle: exact maximum likelihood of the same model and data by adaptive Gauss-Hermite quadrature, all 132 observations.

    python benchmarks/demo.py [--images docs/images]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

from record import ROOT, stopwatch, write_result
from stages import finished_run

# Estimate and standard error of each unknown; the residual SD enters on the log scale, as it is estimated.
FIXED_EFFECTS = {"ka": (0.4593, 0.1929), "CL": (1.0117, 0.0843), "V": (3.4538, 0.0462)}
OMEGAS = {"ka": (0.6364, 0.1509), "CL": (0.2652, 0.0664), "V": (0.1360, 0.0400)}
RESIDUAL = (math.log(0.6959), 0.0497 / 0.6959)


def differences(run: Path) -> dict[str, dict[str, float]]:
    """Distance of every estimate from the exact one, in the exact fit's standard errors."""
    unknowns = {entry["name"]: entry["estimate"] for entry in json.loads((run / "fit.json").read_text())["unknowns"]}
    return {
        "fixed": {name: abs(unknowns[f"mean.{name}"] - value) / se for name, (value, se) in FIXED_EFFECTS.items()},
        "omega": {name: abs(math.exp(unknowns[f"log_sd.{name}"]) - value) / se for name, (value, se) in OMEGAS.items()},
        "residual": {"sigma": abs(unknowns["mean.sigma"] - RESIDUAL[0]) / RESIDUAL[1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "nlme_sbi"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        with stopwatch() as spent:
            subprocess.run(["make", "demo"], cwd=clone, check=True)
        run = finished_run("fit_population", clone)
        found = differences(run)
        print((run / "table.txt").read_text())
        if images is not None:
            shutil.copy(run / "individual_fits.png", images / "theophylline_fits.png")
        stages = {
            stage: json.loads((finished_run(stage, clone) / "manifest.json").read_text())["seconds"]
            for stage in ("simulate", "train_flow", "fit_population", "diagnose", "report")
        }
    unit = "standard errors of the exact fit"
    write_result(
        "demo",
        {
            "minutes": (spent.wall / 60, "min, clone to table, installation included"),
            "cpu_minutes": (spent.cpu / 60, "CPU min"),
            **{f"seconds_{stage}": (seconds, "s, without start-up") for stage, seconds in stages.items()},
            "worst_fixed_effect_se": (max(found["fixed"].values()), unit),
            "worst_omega_se": (max(found["omega"].values()), unit),
            "residual_sd_se": (found["residual"]["sigma"], unit),
        },
        title="`make demo` in a fresh clone: theophylline against exact maximum likelihood.",
    )


if __name__ == "__main__":
    main()
