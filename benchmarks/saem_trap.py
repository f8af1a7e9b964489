"""Precise data of a dosed study, where SAEM with other defaults ends far off: residual SD and variability.

    python benchmarks/saem_trap.py [--studies 3]

60 individuals, one dose by mouth, absorption, central and peripheral compartment; CL, Vc, Q and Vp vary by 30%, the
residual SD is 2 in concentrations of up to a thousand. The data are simulated by matrix exponentials; the fits go
through the command line with ``posterior=none`` and no setting touched.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from record import ROOT, Figure, stopwatch, write_result
from stages import fitted

sys.path.insert(0, str(ROOT / "tests"))
from oracles.compartment_systems import WrittenDose, amounts, mammillary

TIMES = [0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 20, 24, 36, 48, 72]
TYPICAL, SPREAD, ABSORPTION, RESIDUAL = (4.0, 70.0, 4.0, 40.0), 0.3, 1.0, 2.0
OPTIONS = ["experiment=oral", "simulator.compartments=2", "simulator.noise=additive"]
OPTIONS += ["simulator.dose_unit=ug", "simulator.signal_unit=ug/L"]


def study(seed: int, path: Path) -> None:
    """Write a simulated event table."""
    random = np.random.default_rng(seed)
    lines = ["ID,TIME,DV,AMT,EVID"]
    for number in range(1, 61):
        clearance, central, flow, peripheral = np.array(TYPICAL) * np.exp(random.normal(0, SPREAD, 4))
        dose = float(random.choice([60_000.0, 120_000.0]))
        matrix = mammillary(clearance / central, [(flow / central, flow / peripheral)], ABSORPTION)
        amount = amounts(matrix, [WrittenDose(0.0, dose, 0.0, 0)], TIMES)[:, 1]
        measured = amount / central + random.normal(0, RESIDUAL, len(TIMES))
        lines.append(f"{number},0,.,{dose:g},1")
        lines += [f"{number},{time:g},{value!r},.,0" for time, value in zip(TIMES, measured.tolist(), strict=True)]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=3)
    given = parser.parse_args()
    figures: dict[str, Figure] = {}
    for estimator in ("exact", "saem"):
        scores, residuals, seconds, cpu, converged = [], [], [], [], 0
        for seed in range(given.studies):
            with tempfile.TemporaryDirectory() as folder:
                study(seed, Path(folder) / "study.csv")
                options = [*OPTIONS, f"data.path={folder}/study.csv", f"estimator={estimator}"]
                with stopwatch() as spent:
                    fit = fitted(options, Path(folder), seed)
            unknowns = {one["name"]: one for one in fit["unknowns"]}
            found = unknowns["mean.sigma"]
            z = {"sigma": (math.exp(found["estimate"]) - RESIDUAL) / (found["se"] * math.exp(found["estimate"]))}
            for name in ("CL", "Vc", "Q", "Vp"):
                sd = unknowns[f"log_sd.{name}"]
                spread = math.exp(sd["estimate"])
                z[name] = (spread - SPREAD) / (sd["se"] * spread)
            print(estimator, seed, {key: round(value, 2) for key, value in z.items()}, fit["converged"], spent)
            scores.append(max(map(abs, z.values())))
            residuals.append(math.exp(found["estimate"]))
            seconds.append(spent.wall)
            cpu.append(spent.cpu)
            converged += bool(fit["converged"])
        figures |= {
            f"worst_z_{estimator}": (max(scores), "SEs between residual SD or variability and the truth"),
            f"residual_sd_{estimator}": (float(np.median(residuals)), "median; the truth is 2"),
            f"seconds_{estimator}": (float(np.median(seconds)), "s a fit, start-up included"),
            f"cpu_seconds_{estimator}": (float(np.median(cpu)), "CPU s a fit"),
            f"converged_{estimator}": (converged, f"of {given.studies} studies"),
        }
    write_result("saem_trap", figures, title="A precise dosed study by exact and saem, nothing tuned.")


if __name__ == "__main__":
    main()
