"""How well ``refine`` finds a population without a likelihood: fresh populations of cells, from raw data to the table.

    python benchmarks/refined.py --directory DIR [--model two_rate] [--populations 5] [--cells 1000] [KEY=VALUE ...]

A network is trained on the broad prior once; every population is then refined from it by ``scripts/refine.py``. The
error is the mean squared error of the means and variances (log scale) against the sample truth, under the nearer of the
two labellings. Every population is a line of ``DIR/MODEL.jsonl``; the same command goes on where it was stopped, also
within a population.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_population import NAMES, TIMES, fresh_cells
from record import ROOT, Figure, stopwatch, write_result
from stages import run_stage

from nlme_sbi.types import Design
from simulators.mrna_langevin import MrnaLangevin

_LANGEVIN_MEAN = np.array([0.8, 0.03, 1.44, 300.0, 2.12, 0.9])
_LANGEVIN_VARIANCE = np.array([1.0, 1.0, 2.0, 5.0, 0.0, 0.1])
_SOURCE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Model:
    """A model of the benchmark: names, those that do not vary, and how it is chosen in a command."""

    names: tuple[str, ...]
    constant: tuple[str, ...]
    overrides: tuple[str, ...]


MODELS = {
    "two_rate": Model(
        NAMES,
        ("offset", "sigma"),
        (
            *("experiment=mrna_two_rate", "simulator=own", "simulator._target_=hidden_models.HiddenTwoRate"),
            "trust=[hidden_models]",
        ),
    ),
    "langevin": Model(
        tuple(MrnaLangevin.parameters.names), ("scale", "offset", "sigma"), ("experiment=mrna_langevin",)
    ),
}


def cells_of(model: str, cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``phi (cells, D)`` and log fluorescence ``(cells, 180)`` of a fresh population of the published law."""
    if model == "two_rate":
        made = fresh_cells(cells, seed=seed)
        return made.phi, made.values
    ratio = _LANGEVIN_VARIANCE / _LANGEVIN_MEAN**2
    mean = np.append(np.log(_LANGEVIN_MEAN / np.sqrt(1 + ratio)), [np.log(8.0), 0.5 * np.log(0.001)])
    sd = np.sqrt(np.append(np.log1p(ratio), [0.0, 0.0]))
    random = np.random.default_rng(seed)
    phi = mean + sd * random.standard_normal((cells, len(mean)))
    design = Design.regular(torch.as_tensor(TIMES, dtype=torch.float64), cells, 1)
    generator = torch.Generator().manual_seed(seed)
    values = MrnaLangevin().simulate(torch.as_tensor(phi, dtype=torch.float32), design, generator).values
    return phi, values[..., 0].double().numpy()


def write_cells(path: Path, values: np.ndarray) -> None:
    """Raw fluorescence, a column a cell."""
    header = ",".join(["time", *(f"cell_{cell}" for cell in range(len(values)))])
    np.savetxt(path, np.column_stack((TIMES, np.exp(values.T))), delimiter=",", header=header, comments="", fmt="%.9g")


def moments(fit: Mapping[str, Any], model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Estimated means and variances of the logs; variance 0 where constant."""
    found = {entry["name"]: entry["estimate"] for entry in fit["unknowns"]}
    mean = np.array([found[f"mean.{name}"] for name in model.names])
    variance = np.array([np.exp(2 * found.get(f"log_sd.{name}", -np.inf)) for name in model.names])
    return mean, variance


def estimation_error(mean: np.ndarray, variance: np.ndarray, phi: np.ndarray) -> tuple[float, bool]:
    """Mean squared error of means and variances against the sample truth, and whether delta and gamma are exchanged."""
    orders = (np.arange(len(mean)), np.array([1, 0, *range(2, len(mean))]))
    errors = [
        float(np.sum((mean[order] - phi.mean(0)) ** 2 + (variance[order] - phi.var(0)) ** 2) / (2 * len(mean)))
        for order in orders
    ]
    return min(errors), errors[1] < errors[0]


def covered(fit: Mapping[str, Any], model: Model, phi: np.ndarray, *, exchanged: bool) -> tuple[int, int]:
    """How many 95% intervals hold the sample truth, of how many: means and log SDs that are estimated."""
    places = {name: place for place, name in enumerate(model.names)}
    if exchanged:
        places["delta"], places["gamma"] = places["gamma"], places["delta"]
    held = total = 0
    for entry in fit["unknowns"]:
        if entry["fixed"] or entry["quantity"] not in ("mean", "log_sd"):
            continue
        column = phi[:, places[entry["parameter"]]]
        truth = column.mean() if entry["quantity"] == "mean" else np.log(column.std())
        held += int(abs(entry["estimate"] - truth) < 1.959964 * entry["se"])
        total += 1
    return held, total


def _experiment(model: Model) -> str:
    return model.overrides[0].removeprefix("experiment=")


def trained(model: Model, directory: Path, overrides: list[str]) -> Path:
    """The network on the broad prior."""
    given = [one for one in overrides if not one.startswith(("refine.", "fit."))]
    with stopwatch() as spent:
        run_stage("train_flow", *model.overrides, "simulations=online", "device=cpu", *given, directory=directory)
    # Refined networks lie beside it, under the experiment's name with _refined.
    manifests = (directory / "outputs" / "train_flow").glob(f"{_experiment(model)}-*/manifest.json")
    newest = max(manifests, key=lambda path: path.stat().st_mtime)
    if spent.cpu > 30:  # otherwise it was finished before
        (directory / "training.json").write_text(json.dumps({"cpu": spent.cpu}))
    return newest.parent


def refined(name: str, directory: Path, cells: int, seed: int, overrides: list[str], posterior: Path) -> dict[str, Any]:
    """One population: plain, for a line of JSON."""
    model = MODELS[name]
    phi, values = cells_of(name, cells, seed)
    path = directory / f"{name}_{cells}_{seed}.csv"
    interrupted = path.exists()  # then rounds that were made before are found, and their seconds are not known
    write_cells(path, values)
    given = [one for one in overrides if one.startswith(("refine.", "fit."))]
    with stopwatch() as spent:
        run_stage(
            "refine",
            *model.overrides,
            f"posterior={posterior}",
            f"data.path={path}",
            f"population.constant=[{','.join(model.constant)}]",
            "device=cpu",
            "predictions.table=false",
            "figures.individuals=0",
            "individuals.modes=false",
            *given,
            directory=directory,
        )
    run = max((directory / "outputs" / "refine").glob("*/manifest.json"), key=lambda one: one.stat().st_mtime).parent
    results = json.loads((run / "manifest.json").read_text())["results"]
    fits = directory / "outputs" / "fit_population"
    rounds = (run / "rounds.csv").read_text().splitlines()
    first, last = (row.split(",")[rounds[0].split(",").index("fit")] for row in (rounds[1], rounds[-1]))
    before, unchecked, after = (
        json.loads((fits / fit / "fit.json").read_text()) for fit in (first, last, results["fit"])
    )
    error, exchanged = estimation_error(*moments(after, model), phi)
    return {
        "seed": seed,
        "cells": cells,
        "error": error,
        "prior_ratio": estimation_error(*moments(before, model), phi)[0],
        "uncorrected": estimation_error(*moments(unchecked, model), phi)[0],
        "covered": covered(after, model, phi, exchanged=exchanged),
        "rounds": results["rounds"],
        "settled": results["settled"],
        "converged": results["converged"],
        "cpu": None if interrupted else spent.cpu,
    }


def told(rows: list[dict[str, Any]], directory: Path) -> dict[str, Figure]:
    """Figures of all populations that were refined."""
    errors, before = [row["error"] for row in rows], [row["prior_ratio"] for row in rows]
    held, total = (sum(row["covered"][place] for row in rows) for place in (0, 1))
    unit = f"mean over {len(rows)} fresh populations of {rows[0]['cells']} cells"
    training = directory / "training.json"
    figures: dict[str, Figure] = {
        "mse_refined": (float(np.mean(errors)), unit),
        "worst": (max(errors), "the worst of them"),
        "prior_ratio": (float(np.mean(before)), f"{unit}, with the network on the broad prior"),
        "uncorrected": (float(np.mean([row["uncorrected"] for row in rows])), f"{unit}, before the self-check"),
        "improvement": (float(np.mean(before) / np.mean(errors)), "times below prior_ratio"),
        "coverage": (held / total, f"share of {total} intervals (95%) that hold the sample truth"),
        "rounds": (float(np.mean([row["rounds"] for row in rows])), "rounds, mean"),
        "converged": (sum(row["converged"] for row in rows), f"of {len(rows)} say so"),
    }
    spent = [row["cpu"] for row in rows if row["cpu"] is not None]
    if spent:
        unit = f"CPU min a population, broad network apart, {len(spent)} populations without interruption"
        figures["cpu_minutes"] = (float(np.mean(spent)) / 60, unit)
    if training.exists():
        figures["cpu_minutes_broad"] = (json.loads(training.read_text())["cpu"] / 60, "CPU min, network on the prior")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(MODELS), default="two_rate")
    parser.add_argument("--populations", type=int, default=5)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    directory: Path = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_SOURCE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = directory / f"{options.model}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    posterior = trained(MODELS[options.model], directory, options.overrides)
    for seed in range(1, options.populations + 1):
        if any((row["seed"], row["cells"]) == (seed, options.cells) for row in rows):
            continue
        rows.append(refined(options.model, directory, options.cells, seed, options.overrides, posterior))
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)
    some = [row for row in rows if row["cells"] == options.cells]
    name = "refined" if options.model == "two_rate" else f"refined_{options.model}"
    write_result(
        name,
        told(some, directory),
        title=f"scripts/refine.py on {options.model} cells, likelihood hidden, offset and sigma constant.",
    )


if __name__ == "__main__":
    main()
