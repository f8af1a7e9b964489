"""Populations of ribosome cells by estimator exact, with a trained network: the published cells, and real ones.

    python benchmarks/models_population.py --ribosome RUN [--cells 500 1000] [--rows FILE]
    python benchmarks/models_population.py --ribosome RUN --two-rate RUN --real FOLDER

``RUN`` are runs of train_flow, experiments mrna_ribosome and mrna_two_rate. The published synthetic population is
regenerated here with solutions of its own (SciPy, tight tolerances); the error is the mean squared error of 11 means
and 11 variances on the log scale against the sample truth, variances of constant parameters being 0. ``--real FOLDER``
fits the eGFP cells that ``scripts/download_data.py`` gets, by both models, and compares AIC and BIC. Every fit is a
line of --rows; the same command goes on where it was stopped.

Source of the recipe: Arruda et al. (2024), ICML, and Fröhlich et al. (2018), npj Syst. Biol. Appl. 4:42.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from published_population import CELLS, TIMES, write_wide
from record import ROOT, Figure, stopwatch, write_result
from scipy.integrate import solve_ivp
from stages import finished_run, run_stage

NAMES = ("delta1_m0", "delta2", "e0_m0", "k2_m0_scale", "k2", "k1_m0", "r0_m0", "gamma", "t0", "offset", "sigma")
NATURAL_MEAN = np.array([1.2, 0.6, 0.85, 1e6, 1.9, 5.5, 0.1, 0.01, 0.9])
NATURAL_VARIANCE = np.array([1.1, 0.4, 0.5, 10, 2, 100, 0.1, 0.01, 0.5])
CONSTANT = ("k2_m0_scale", "offset", "sigma")


def signal(phi: np.ndarray) -> np.ndarray:
    """Noise-free log fluorescence of one cell, by an implicit method with tight tolerances."""
    d1, d2, e0, scale, k2, k1, r0, gamma, onset, offset = np.exp(phi[:10])

    def slope(_: float, x: np.ndarray) -> list[float]:
        m, e, r, p = x
        bound, freed = k1 * m * r, k2 * (r0 - r)
        return [-d1 * m * e - bound + freed, -d1 * m * e + d2 * (e0 - e), freed - bound, scale * (r0 - r) - gamma * p]

    after = np.maximum(TIMES - onset, 0.0)
    solution = solve_ivp(
        slope, (0, float(after[-1])), [1.0, e0, r0, 0.0], t_eval=np.unique(after), method="LSODA", rtol=1e-9, atol=1e-12
    )
    protein = np.interp(after, solution.t, solution.y[3])
    return np.log(np.maximum(protein + offset, 1e-12))


def published_ribosome_cells(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """``phi (cells, 11)`` and noisy log fluorescence ``(cells, 180)`` of the first published cells."""
    ratio = NATURAL_VARIANCE / NATURAL_MEAN**2
    mean = np.append(np.log(NATURAL_MEAN / np.sqrt(1 + ratio)), [np.log(8.0), 0.5 * np.log(0.001)])
    variance = np.append(np.log1p(ratio), [0.0, 0.0])
    np.random.seed(0)  # noqa: NPY002 the published recipe
    phi = np.random.multivariate_normal(mean, np.diag(variance), CELLS)  # noqa: NPY002
    noise = np.random.normal(0, 1, (CELLS, len(TIMES)))  # noqa: NPY002
    exact = np.array([signal(one) for one in phi[:cells]]).astype(np.float32)
    return phi[:cells], exact + np.exp(phi[:cells, 10:]) * noise[:cells]


def fit_published(run: Path, cells: int) -> dict[str, Any]:
    """One line of --rows: error, cost and verdict of the fit of the first ``cells``."""
    phi, values = published_ribosome_cells(cells)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_wide(directory / "cells.csv", values)
        options = ["experiment=mrna_ribosome", f"posterior={run.resolve()}", f"data.path={directory / 'cells.csv'}"]
        options += [f"population.constant=[{','.join(CONSTANT)}]", "individuals.draws=0", "individuals.modes=false"]
        with stopwatch() as spent:
            run_stage("fit_population", *options, "predictions.table=false", directory=directory)
        fit = json.loads((finished_run("fit_population", directory) / "fit.json").read_text())
    unknowns = {entry["name"]: entry for entry in fit["unknowns"]}
    mean = np.array([unknowns[f"mean.{name}"]["estimate"] for name in NAMES])
    varying = [name not in CONSTANT for name in NAMES]
    found = [
        np.exp(2 * unknowns[f"log_sd.{name}"]["estimate"]) if varies else 0.0
        for name, varies in zip(NAMES, varying, strict=True)
    ]
    squares = np.append((mean - phi.mean(0)) ** 2, (np.array(found) - phi.var(0)) ** 2)
    keys = (*NAMES, *(f"variance {name}" for name in NAMES))
    return {
        "fit": f"published_{cells}",
        "mse": float(squares.mean()),
        "parts": dict(zip(keys, squares.tolist(), strict=True)),
        "wall": spent.wall,
        "cpu": spent.cpu,
        "converged": fit["converged"],
        "minus_two_log_likelihood": fit["minus_two_log_likelihood"],
        "warnings": fit["warnings"],
    }


def fit_real(experiment: str, run: Path, folder: Path) -> dict[str, Any]:
    """The real cells by one model."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        options = [
            f"experiment={experiment}",
            f"posterior={run.resolve()}",
            "data=egfp",
            f"data.path={folder.resolve()}",
        ]
        with stopwatch() as spent:
            run_stage("fit_population", *options, "individuals.modes=false", directory=directory)
        fit = json.loads((finished_run("fit_population", directory) / "fit.json").read_text())
    kept = {key: fit[key] for key in ("converged", "minus_two_log_likelihood", "aic", "bic", "warnings")}
    return {"fit": f"real_{experiment}", "wall": spent.wall, "cpu": spent.cpu, **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ribosome", type=Path, required=True)
    parser.add_argument("--two-rate", type=Path)
    parser.add_argument("--cells", type=int, nargs="*", default=[500, 1000])
    parser.add_argument("--real", type=Path, help="folder of the real cells")
    parser.add_argument("--rows", type=Path, default=ROOT / "models_population_rows.jsonl")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {row["fit"] for row in rows}
    jobs = [(f"published_{count}", lambda count=count: fit_published(given.ribosome, count)) for count in given.cells]
    if given.real is not None:
        for experiment, run in (("mrna_ribosome", given.ribosome), ("mrna_two_rate", given.two_rate)):
            jobs.append((f"real_{experiment}", lambda one=experiment, run=run: fit_real(one, run, given.real)))
    for name, job in jobs:
        if name not in done:
            rows.append(job())
            with given.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1], indent=1), flush=True)
    figures: dict[str, Figure] = {}
    for row in rows:
        name = row["fit"].removeprefix("published_")
        if "mse" in row:
            figures[f"mse_{name}"] = (row["mse"], f"mean squared error of 22 moments, first {name} cells, sample truth")
        else:
            figures |= {f"{key}_{name}": (row[key], "of the real cells") for key in ("aic", "bic")}
        figures |= {
            f"seconds_{name}": (row["wall"], "s, raw data to tables, start-up included"),
            f"cpu_seconds_{name}": (row["cpu"], "CPU s"),
            f"converged_{name}": (row["converged"], "the fit's own verdict"),
        }
    write_result("models_population", figures, title="Ribosome cells by estimator exact.")


if __name__ == "__main__":
    main()
