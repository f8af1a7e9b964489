"""How often 95% intervals hold the truth: simulated theophylline trials, estimator exact, all methods of uncertainty.

    python benchmarks/coverage.py --posterior RUN [--populations 200] [--few 50] [--individuals 100]

Every population has new individuals from a known law (MODELS: the exact estimates on the real data), with the doses and
times of the twelve real individuals, over and over. Intervals of the means, the log SDs and the residual's log SD;
profiles and the bootstrap (200 replicates) on the first ``--few`` populations. Each population is a line of ``--rows``;
the same command goes on where it was stopped (remove that file after a change of the code). ``RUN`` is a train_flow run
of experiment theophylline, which only provides starting points of fits. A coverage p from n populations has the
standard error sqrt(p (1 - p) / n).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from demo import FIXED_EFFECTS, OMEGAS, RESIDUAL
from record import ROOT, Figure, stopwatch, write_result
from theophylline_exact import read_data

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.uncertainty.methods import Assessment, add_intervals

METHODS = ("information", "sandwich", "profile", "bootstrap")
TRUTH = {
    **{f"mean.{name}": value for name, (value, _) in FIXED_EFFECTS.items()},
    "mean.sigma": RESIDUAL[0],
    **{f"log_sd.{name}": math.log(value) for name, (value, _) in OMEGAS.items()},
}


def simulated(posterior: AmortizedPosterior, data: Observations, individuals: int, seed: int) -> Observations:
    """A population from the law of TRUTH, with the designs of the data in turn."""
    generator = torch.Generator().manual_seed(seed)
    names = posterior.parameters.names
    mean = torch.tensor([TRUTH[f"mean.{name}"] for name in names], dtype=torch.float64)
    sd = torch.tensor([math.exp(TRUTH.get(f"log_sd.{name}", -math.inf)) for name in names], dtype=torch.float64)
    noise = torch.randn((individuals, len(names)), generator=generator, dtype=torch.float64)
    rows = torch.arange(individuals) % len(data)
    design = data.design[rows]
    made = posterior.simulator.simulate(mean + sd * noise, design, generator)
    if bool(made.status.any()):
        raise ValueError("A simulation failed.")
    return Observations(
        ids=tuple(f"person_{row}" for row in range(individuals)),
        values=torch.where(design.observed, made.values, torch.zeros_like(made.values)),
        design=design,
        signals=data.signals,
        signal_units=data.signal_units,
        time_unit=data.time_unit,
    )


def assessed_population(
    posterior: AmortizedPosterior, data: Observations, seed: int, *, individuals: int, methods: tuple[str, ...]
) -> dict[str, object]:
    """One population's intervals, whether they hold the truth, and what it cost; plain, for a line of JSON."""
    with stopwatch() as spent:
        fit = fit_population(
            posterior,
            simulated(posterior, data, individuals, seed),
            GaussianPopulation(constant=("sigma",)),
            generator=torch.Generator().manual_seed(seed),
            # The wished Monte-Carlo accuracy, a tenth of a standard error, needs no more draws here.
            estimator=Exact(max_draws=256),
            starts=1,
        )
        fit = add_intervals(fit, Assessment(methods=methods), generator=torch.Generator().manual_seed(seed))
    rows = [
        {
            "unknown": row.unknown,
            "method": row.method,
            "inside": row.lower <= TRUTH[row.unknown] <= row.upper,
            "z": None if row.se is None else (row.estimate - TRUTH[row.unknown]) / row.se,
        }
        for row in fit.intervals
    ]
    vanished = [test.parameter for test in fit.variance_tests if test.estimated]
    return {
        "seed": seed,
        "rows": rows,
        "converged": fit.converged,
        "vanished": vanished,
        "seconds": spent.wall,
        "cpu_seconds": spent.cpu,
    }


def told(populations: list[dict]) -> dict[str, Figure]:
    """Shares of intervals that hold the truth, pooled and for each unknown, in percent."""
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, list[float]] = defaultdict(list)
    for population in populations:
        for row in population["rows"]:
            hits[row["method"]][row["unknown"]].append(row["inside"])
            if row["method"] == "information":
                errors[row["unknown"]].append(row["z"])
    figures: dict[str, Figure] = {}
    for method in METHODS:
        found = hits[method]
        if found:
            pooled = [hit for each in found.values() for hit in each]
            count = max(len(each) for each in found.values())
            figures[method] = (100 * float(np.mean(pooled)), f"% of {len(pooled)} intervals, {count} populations")
            figures |= {f"{method}_{name}": (100 * float(np.mean(each)), "%") for name, each in found.items()}
    worst = max(abs(float(np.mean(each))) for each in errors.values())
    figures["worst_mean_z"] = (worst, "largest mean of (estimate - truth) / SE over the unknowns")
    figures["converged"] = (sum(each["converged"] for each in populations), f"of {len(populations)} fits")
    figures["at_boundary"] = (sum(bool(each["vanished"]) for each in populations), "fits in which a variance ran to 0")
    for key, unit in (("seconds", "s"), ("cpu_seconds", "CPU s")):
        figures[key] = (float(np.mean([each[key] for each in populations])), f"{unit} a population, methods included")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--populations", type=int, default=200)
    parser.add_argument("--few", type=int, default=50)
    parser.add_argument("--individuals", type=int, default=100)
    parser.add_argument("--rows", type=Path, default=ROOT / "outputs" / "coverage_rows.jsonl")
    options = parser.parse_args()
    keep_freed_memory()
    posterior, data = AmortizedPosterior.load(options.posterior, device="cpu"), read_data()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    done = {found["seed"]: found for found in map(json.loads, lines)}
    for seed in range(1, options.populations + 1):
        if seed not in done:
            methods = METHODS if seed <= options.few else METHODS[:2]
            done[seed] = assessed_population(posterior, data, seed, individuals=options.individuals, methods=methods)
            with options.rows.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
        if seed % 10 == 0:
            figures = told(list(done.values()))
            print(seed, {method: figures[method][0] for method in METHODS if method in figures}, flush=True)
    write_result(
        "coverage",
        told([done[seed] for seed in range(1, options.populations + 1)]),
        title=f"Coverage of 95% intervals, {options.individuals} simulated people each, theophylline, estimator exact.",
    )


if __name__ == "__main__":
    main()
