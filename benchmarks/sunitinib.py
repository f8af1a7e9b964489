"""Simulated trials of oral sunitinib and its metabolite: how often 95% intervals hold the truth.

    python benchmarks/sunitinib.py [--trials 20] [--patients 47]

Every patient takes 50, 37.5 or 25 mg a day, four weeks on and two off, and gives 1 to 13 samples over two cycles, in
which both concentrations are measured; what lies below 0.06 ng/mL is censored. Four parameters vary, with correlations;
the typical value of fm is known, because concentrations determine flows and volumes of the metabolite relative to it
only. Every trial is fitted through the command line with ``posterior=none``, prior and settings as they come. The truth
is the law that the trials were simulated from, by matrix exponentials of our own. Every trial is a line of --rows; the
same command goes on where it was stopped.

Source of the truth: Yu et al. (2015), Br. J. Clin. Pharmacol. 79:809, as in Arruda et al. (2024), ICML.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from record import Figure, stopwatch, write_result
from scipy.linalg import expm
from scipy.stats import norm
from stages import fitted

TYPICAL = {"ka": 0.133, "V2": 1820.0, "CLP": 33.9, "CLM": 16.5, "V3": 730.0, "Q34": 2.75, "V4": 592.0, "fm": 0.21}
TYPICAL |= {"Q25": 0.371, "sd_sunitinib": 0.367, "sd_metabolite": 0.281}
VARYING = ("V2", "V3", "CLP", "fm")
VARIANCES = (0.0621, 0.169, 0.088, 0.113)
COVARIANCES = {("V2", "V3"): 0.0473, ("V3", "CLP"): -0.0613, ("CLP", "fm"): -0.0421}
LIMIT = 0.06  # ng/mL
OPTIONS = ["experiment=sunitinib", "data.signal_levels={1: log_sunitinib, 2: log_metabolite}"]
OPTIONS += ["individuals.draws=0", "individuals.modes=false", "predictions.table=false"]  # tables alone


def covariance() -> np.ndarray:
    """Of the random effects, in the order of ``VARYING``."""
    matrix = np.diag(VARIANCES)
    for (row, column), value in COVARIANCES.items():
        places = VARYING.index(row), VARYING.index(column)
        matrix[places] = matrix[places[::-1]] = value
    return matrix


def rate_matrix(p: dict[str, float], weight: float) -> np.ndarray:
    """Of the amounts in gut, sunitinib (central), metabolite (central and peripheral), sunitinib (peripheral)."""
    size = weight / 70
    flow = size**0.75
    liver, clearance, metabolite = 80 * flow, p["CLP"] * flow, p["CLM"] * flow
    v2, v3, v4, v5 = p["V2"] * size, p["V3"] * size, p["V4"] * size, 588 * size
    passed = liver / (liver + clearance)  # of what enters the liver
    formed = p["fm"] * clearance / (liver + clearance)
    q25, q34 = p["Q25"] * flow, p["Q34"] * flow
    matrix = np.zeros((5, 5))
    matrix[0, 0] = -p["ka"]
    matrix[1, 0], matrix[2, 0] = p["ka"] * passed, p["ka"] * formed
    matrix[1, 1], matrix[2, 1] = (liver * passed - liver - q25) / v2, formed * liver / v2
    matrix[1, 4], matrix[4, 1], matrix[4, 4] = q25 / v5, q25 / v2, -q25 / v5
    matrix[2, 2], matrix[2, 3] = -(metabolite + q34) / v3, q34 / v4
    matrix[3, 2], matrix[3, 3] = q34 / v3, -q34 / v4
    return matrix


def log_concentrations(
    p: dict[str, float], weight: float, dose: float, taken: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """At increasing ``times``, ``(T, 2)``, from doses in micrograms."""
    matrix, size = rate_matrix(p, weight), weight / 70
    stops = sorted([(time, 1) for time in taken.tolist()] + [(time, 0) for time in times.tolist()])
    state, now, found = np.zeros(5), 0.0, []
    kept: dict[float, np.ndarray] = {}
    for time, is_dose in stops:
        step = round(time - now, 9)
        if step not in kept:
            kept[step] = expm(matrix * step)
        state, now = kept[step] @ state, time
        if is_dose:
            state[0] += dose
        else:
            found.append(np.log(np.maximum([state[1] / (p["V2"] * size), state[2] / (p["V3"] * size)], 1e-3)))
    return np.array(found)


def write_trial(path: Path, seed: int, patients: int) -> None:
    """An event table as such trials come."""
    random = np.random.default_rng(seed)
    effects = random.multivariate_normal(np.zeros(4), covariance(), patients)
    lines = ["ID,TIME,DV,AMT,EVID,DVID,ADDL,II,CENS,WT"]
    for patient in range(patients):
        p = {**TYPICAL}
        for name, effect in zip(VARYING, effects[patient], strict=True):
            p[name] *= math.exp(effect)
        weight = round(float(np.clip(random.normal(75, 14), 40, 130)), 1)
        dose = float(random.choice([50_000.0, 37_500.0, 25_000.0]))
        taken = np.concatenate([24.0 * np.arange(28), 24.0 * (42 + np.arange(28))])
        samples = int(random.integers(1, 14))
        days = np.sort(random.choice(70, samples, replace=False))
        times = np.round(24.0 * days + random.uniform(1, 23, samples), 2)
        values = log_concentrations(p, weight, dose, taken, times)
        values = values + random.standard_normal(values.shape) * [p["sd_sunitinib"], p["sd_metabolite"]]
        rows = [(0.0, f"{patient + 1},0,.,{dose:g},1,1,27,24,0,{weight}")]
        rows.append((1008.0, f"{patient + 1},1008,.,{dose:g},1,1,27,24,0,{weight}"))
        for time, pair in zip(times.tolist(), values.tolist(), strict=True):
            for signal, value in enumerate(pair, start=1):
                low = value < math.log(LIMIT)
                shown = math.log(LIMIT) if low else value
                rows.append((time, f"{patient + 1},{time:g},{shown!r},.,0,{signal},0,0,{int(low)},{weight}"))
        lines += [row for _, row in sorted(rows, key=lambda one: one[0])]
    path.write_text("\n".join(lines) + "\n")


def truths() -> dict[str, float]:
    """Of every unknown, on its own scale: means of logs, logs of SDs, correlations."""
    found = {f"mean.{name}": math.log(value) for name, value in TYPICAL.items() if name != "fm"}  # fm is fixed
    found |= {f"log_sd.{name}": 0.5 * math.log(value) for name, value in zip(VARYING, VARIANCES, strict=True)}
    return found


def measured(seed: int, patients: int) -> dict[str, Any]:
    """Estimates, SEs and cost of one trial."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.csv"
        write_trial(path, seed, patients)
        with stopwatch() as spent:
            fit = fitted([*OPTIONS, f"data.path={path}"], Path(folder), seed)
    unknowns = {entry["name"]: [entry["estimate"], entry["se"]] for entry in fit["unknowns"]}
    row = {"seed": seed, "converged": fit["converged"], "wall": spent.wall, "cpu": spent.cpu}
    return {**row, "unknowns": unknowns, "minus_two_log_likelihood": fit["minus_two_log_likelihood"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--patients", type=int, default=47)
    parser.add_argument("--rows", type=Path, default=Path("sunitinib_rows.jsonl"))
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {row["seed"] for row in rows}
    for seed in range(given.trials):
        if seed not in done:
            rows.append(measured(seed, given.patients))
            with given.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(seed, rows[-1]["converged"], round(rows[-1]["cpu"]), "CPU s", flush=True)
    rows = [row for row in rows if row["seed"] < given.trials]
    truth = truths()
    off = np.array([[(row["unknowns"][n][0] - v) / row["unknowns"][n][1] for n, v in truth.items()] for row in rows])
    held = np.abs(off) < norm.ppf(0.975)
    each = dict(zip(truth, held.mean(0).tolist(), strict=True))
    lowest = min(each, key=lambda name: each[name])
    figures: dict[str, Figure] = {
        "coverage": (float(held.mean()), f"of {held.size} 95% intervals hold the truth, information"),
        "coverage_lowest": (each[lowest], f"of {len(rows)} intervals of {lowest}, the lowest"),
        "worst_mean_z": (float(np.abs(off.mean(0)).max()), "largest mean of (estimate - truth) / SE over the unknowns"),
        "converged": (sum(row["converged"] for row in rows), f"of {len(rows)} trials"),
        "seconds": (
            float(np.median([row["wall"] for row in rows])),
            "s a trial, from file to tables, start-up included",
        ),
        "cpu_seconds": (float(np.median([row["cpu"] for row in rows])), "CPU s a trial"),
    }
    write_result("sunitinib", figures, title=f"{len(rows)} simulated sunitinib trials of {given.patients} patients.")


if __name__ == "__main__":
    main()
