"""Populations that are not Gaussian, through the command line: outlying cells, two kinds of cells.

    python benchmarks/populations.py [--cases outliers mixture] [--populations 5] [--cells 300] [--rows FILE]

Cells are simulated by the published two-rate model's own closed form in NumPy (`published_population`), under laws of
this script, and fitted with ``posterior=none``: exact maximum likelihood. Figures of a case that is not run are kept.

* ``outliers``: 95% of the cells follow a normal law of the logs, 5% lie eight SDs away in both rates and expression.
  Bias: mean over populations of estimate minus the regular cells' own mean (typical values) or log SD, root mean square
  over the four parameters, as a share of that with ``population=gaussian``. The share over both kinds of unknowns, the
  one that is named first, takes typical values in SDs of the regular cells.
* ``mixture``: 800 cells of one kind and 200 whose slower rate is larger, ``population=mixture``: the weight against
  0.2, and the share of the cells that fall into their own class, against the Bayes rule, which knows the law.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from published_population import NAMES, TIMES, log_signal, write_wide
from record import RESULTS, stopwatch, write_result
from scipy.optimize import least_squares
from stages import finished_run, run_stage

Figures = dict[str, tuple[float | int | str | bool | None, str]]
MODELS = {
    "gaussian": ["population=gaussian"],
    "student_t": ["population=student_t", "population.law.degrees_of_freedom=estimated"],
    "student_t_4": ["population=student_t"],
    "huber": ["population=huber"],
}
VARYING = 4
MEAN, SD = np.log([0.6, 0.06, 500.0, 0.9, 8.0, 0.05]), np.array([0.25, 0.3, 0.2, 0.15, 0.0, 0.0])
APART = 1.0  # logs between the classes' decay rates, 3.3 SDs within a class
OUTLYING, AWAY = 0.05, np.array([8.0, 8.0, -8.0, 0.0, 0.0, 0.0])


def fit(values: np.ndarray, folder: Path, *options: str) -> Path:
    """Run of a fit of these log signals."""
    write_wide(folder / "cells.csv", values)
    run_stage(
        "fit_population",
        "experiment=mrna_two_rate",
        "posterior=none",
        f"data.path={folder / 'cells.csv'}",
        "population.constant=[offset,sigma]",
        "fit.uncertainty=[information]",
        "predictions.table=false",
        "figures.individuals=0",
        *options,
        directory=folder,
    )
    return finished_run("fit_population", folder)


def unknowns(run: Path) -> tuple[dict[str, float], dict[str, float], bool]:
    """Estimates and standard errors by name, and whether the fit converged."""
    found = json.loads((run / "fit.json").read_text())
    rows = found["unknowns"]
    return (
        {row["name"]: row["estimate"] for row in rows},
        {row["name"]: row["se"] for row in rows},
        found["converged"],
    )


def noisy(phi: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Log signals with noise."""
    return log_signal(phi) + np.exp(phi[:, 5:]) * random.standard_normal((len(phi), len(TIMES)))


def measure_outliers(populations: int, cells: int, rows: Path) -> None:
    """Append errors under 5% outlying cells to a file, one line for each population and model that it lacks."""
    done = {(row["seed"], row["model"]) for row in read_rows(rows)}
    for seed in range(populations):
        random = np.random.default_rng(seed)
        phi = MEAN + SD * random.standard_normal((cells, len(NAMES)))
        outlying = np.arange(cells) < round(OUTLYING * cells)
        phi[outlying] += AWAY * SD
        values, regular = noisy(phi, random), phi[~outlying, :VARYING]
        for name, options in MODELS.items():
            if (seed, name) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                found, _, has_converged = unknowns(fit(values, Path(folder), *options))
            names = NAMES[:VARYING]
            typical = np.array([found[f"mean.{one}"] for one in names]) - regular.mean(0)
            spread = np.array([found[f"log_sd.{one}"] for one in names]) - np.log(regular.std(0))
            row = {"seed": seed, "model": name, "cells": cells, "converged": has_converged}
            row |= {"typical": (typical / SD[:VARYING]).tolist(), "log_sd": spread.tolist()}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Lines of :func:`measure_outliers`."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def outliers(rows: list[dict[str, Any]]) -> Figures:
    """Bias under 5% outlying cells, by population model, over the populations that every model was fitted to."""
    seeds = set.intersection(*({row["seed"] for row in rows if row["model"] == name} for name in MODELS))
    some = [row for row in rows if row["seed"] in seeds]
    bias = {
        name: np.mean([[row["typical"], row["log_sd"]] for row in some if row["model"] == name], 0) for name in MODELS
    }

    def size(parts: np.ndarray) -> float:
        return float(np.sqrt(np.mean(parts**2)))

    figures: Figures = {}
    for name in list(MODELS)[1:]:
        share = "share of the bias with population=gaussian"
        figures |= {
            f"{name}_bias_share": (size(bias[name]) / size(bias["gaussian"]), f"{share}, typical values and log SDs"),
            f"{name}_typical_bias_share": (size(bias[name][0]) / size(bias["gaussian"][0]), f"{share}, typical values"),
            f"{name}_sd_bias_share": (size(bias[name][1]) / size(bias["gaussian"][1]), f"{share}, log SDs"),
        }
    for name in MODELS:
        converged = sum(row["converged"] for row in some if row["model"] == name)
        figures |= {
            f"{name}_typical_bias": (size(bias[name][0]), "SDs of the regular cells, root mean square"),
            f"{name}_sd_bias": (size(bias[name][1]), "of log SDs, root mean square"),
            f"{name}_converged": (converged, f"of {len(seeds)} fits"),
        }
    return figures | {"outlier_populations": (len(seeds), f"populations of {some[0]['cells']} cells")}


def mixture() -> Figures:
    """Weights and memberships of 800 cells of one kind and 200 of another."""
    random = np.random.default_rng(0)
    label = np.repeat([0, 1], [800, 200])
    phi = MEAN + SD * random.standard_normal((len(label), len(NAMES)))
    phi[:, 1] += APART * label
    values = noisy(phi, random)
    with tempfile.TemporaryDirectory() as folder, stopwatch() as spent:
        run = fit(values, Path(folder), "population=mixture", "population.differing=[gamma]")
        print((run / "table.txt").read_text())
        found, errors, has_converged = unknowns(run)
        individuals = pd.read_csv(run / "individuals.csv")
    share = 1 / (1 + np.exp(-found["class_odds.class 2"]))
    error = share * (1 - share) * errors["class_odds.class 2"]
    accuracy = float((individuals["class"].to_numpy() - 1 == label).mean())
    bayes = float((class_of_bayes(values) == label).mean())
    differ = found["mean.gamma.class 2"] - found["mean.gamma"]
    return {
        "mixture_weight_z": ((share - 0.2) / error, "SEs between the weight of class 2 and 0.2"),
        "mixture_weight": (share, f"of class 2 (SE {error:.2g})"),
        "mixture_accuracy": (accuracy, "share of the cells in their own class"),
        "mixture_accuracy_bayes": (bayes, "the same by the Bayes rule: true law, same data"),
        "mixture_accuracy_gap": (bayes - accuracy, "of the cells"),
        "mixture_distance_error": (differ - APART, f"log units; the classes' gammas are {APART} apart"),
        "mixture_converged": (has_converged, ""),
        "mixture_cpu_seconds": (spent.cpu, "CPU s, start-up included"),
    }


def class_of_bayes(values: np.ndarray) -> np.ndarray:
    """The more probable class given a cell's data under the true law, by Laplace's approximation of each class's
    evidence (180 measurements a cell), with the benchmark's own closed form and SciPy's least squares."""
    sd = SD[:VARYING]

    def misfit(phi: np.ndarray, data: np.ndarray, centre: np.ndarray) -> np.ndarray:
        whole = np.concatenate([phi, MEAN[VARYING:]])[None]
        residual = (log_signal(whole)[0] - data) / np.exp(MEAN[-1])
        return np.concatenate([residual, (phi - centre) / sd])

    labels = []
    for data in values:
        masses = []
        for centre in (MEAN[:VARYING], MEAN[:VARYING] + APART * (np.arange(VARYING) == 1)):
            ends = [least_squares(misfit, start, args=(data, centre)) for start in (MEAN[:VARYING], centre)]
            best = min(ends, key=lambda end: end.cost)
            masses.append(-best.cost - 0.5 * np.linalg.slogdet(best.jac.T @ best.jac)[1])
        labels.append(int(masses[1] + np.log(0.2) > masses[0] + np.log(0.8)))
    return np.array(labels)


def kept() -> Figures:
    """Figures of an earlier run."""
    path = RESULTS / "populations.json"
    if not path.exists():
        return {}
    figures = json.loads(path.read_text())["figures"]
    return {name: (one["value"], one["unit"]) for name, one in figures.items() if name != "calibration_cpu_seconds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["outliers", "mixture"], choices=["outliers", "mixture"])
    parser.add_argument("--populations", type=int, default=5)
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument(
        "--rows", type=Path, default=Path("outliers.jsonl"), help="fits of outlying cells, to resume from"
    )
    options = parser.parse_args()
    figures = kept()
    for case in options.cases:
        if case == "outliers":
            measure_outliers(options.populations, options.cells, options.rows)
            figures |= outliers(read_rows(options.rows))
        else:
            figures |= mixture()
        write_result(
            "populations",
            figures,
            title="Two-rate cells, 5% of them outlying or of two kinds (800 + 200): estimator exact, posterior=none.",
        )


if __name__ == "__main__":
    main()
