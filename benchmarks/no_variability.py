"""Parameters without variability: offset and sigma of two-rate cells, estimated and given, estimator exact.

    python benchmarks/no_variability.py --posterior RUN [--cells 10000]

The published cells, whose offset and sigma do not vary. Two fits with equal seeds: both values estimated; both fixed at
the truth. Figures: how far the estimates are from the truth in their standard errors, and how far anything else moves
between the fits, beyond 3 Monte-Carlo standard errors of its difference. ``RUN`` is a train_flow run of experiment
mrna_two_rate.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from population_convergence import CONSTANT, observed
from published_population import NAMES, law, published_cells
from record import Figure, stopwatch, write_result

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, fit_population


def fitted(posterior: AmortizedPosterior, cells: Observations, population: GaussianPopulation) -> PopulationFit:
    generator = torch.Generator().manual_seed(0)
    return fit_population(posterior, cells, population, generator=generator, estimator=Exact())


def by_name(fit: PopulationFit) -> dict[str, tuple[float, float, float]]:
    """Estimate, standard error and Monte-Carlo error of every unknown; rates labelled so that delta is the faster."""
    names = fit.population.unknowns.names
    values = zip(fit.theta.tolist(), fit.standard_errors.tolist(), fit.monte_carlo.se.tolist(), strict=True)
    found = dict(zip(names, values, strict=True))
    if found["mean.delta"][0] < found["mean.gamma"][0]:
        other = {"delta": "gamma", "gamma": "delta"}
        swapped = {name: name.replace(*pair) for pair in other.items() for name in names if name.endswith(pair[0])}
        found = {swapped.get(name, name): value for name, value in found.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=10_000)
    options = parser.parse_args()
    keep_freed_memory()
    posterior, cells = (
        AmortizedPosterior.load(options.posterior, device="cpu"),
        observed(published_cells(options.cells)),
    )
    truth = dict(zip(NAMES, law()[0].tolist(), strict=True))
    given = {name: math.exp(truth[name]) for name in CONSTANT}
    with stopwatch() as spent:
        free = fitted(posterior, cells, GaussianPopulation(constant=CONSTANT))
        fixed = fitted(posterior, cells, GaussianPopulation(constant=CONSTANT, fixed={"mean": given}))
    for fit in (free, fixed):
        print(fit.table())
    estimates, others = by_name(free), by_name(fixed)
    figures: dict[str, Figure] = {}
    z = {name: (estimates[f"mean.{name}"][0] - truth[name]) / estimates[f"mean.{name}"][1] for name in CONSTANT}
    figures["worst_z"] = (max(map(abs, z.values())), "SE between offset or sigma and the truth")
    figures |= {f"z_{name}": (value, "SE from the truth") for name, value in z.items()}
    shifts = {}
    for name, (value, se, noise) in estimates.items():
        if name.removeprefix("mean.") not in CONSTANT:
            moved = abs(value - others[name][0])
            shifts[name] = (moved / se, max(0.0, moved - 3 * math.hypot(noise, others[name][2])) / se)
    figures["worst_shift_se"] = (
        max(beyond for _, beyond in shifts.values()),
        "SE that any other unknown moves when both are fixed, beyond 3 Monte-Carlo SE",
    )
    figures["worst_shift_plain"] = (max(moved for moved, _ in shifts.values()), "SE, Monte-Carlo error included")
    for test in free.variance_tests:
        figures[f"variability_z_{test.parameter}"] = (test.z, f"score test of variability, one-sided p = {test.p:.2g}")
    figures["mean_ess_share"] = (float(np.mean((free.ess / free.draws).numpy())), "effective share of the draws")
    figures["seconds"] = (spent.wall / 2, "s a fit")
    figures["cpu_seconds"] = (spent.cpu / 2, "CPU s a fit")
    write_result(
        "no_variability" if options.cells == 10_000 else f"no_variability_{options.cells}",
        figures,
        title=f"Offset and sigma of {options.cells} published two-rate cells, estimated and given, estimator exact.",
    )


if __name__ == "__main__":
    main()
