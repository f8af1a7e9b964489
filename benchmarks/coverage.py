"""How often 95% intervals hold the truth: simulated theophylline trials, estimator exact, all methods of uncertainty.

    python benchmarks/coverage.py --posterior RUN [--populations 200] [--few 50] [--individuals 100]

Every population has new individuals from a known law (MODELS: the exact estimates on the real data), with the doses and
times of the twelve real people, over and over. Intervals of the means, the log SDs and the residual's log SD; profiles
and the bootstrap (200 replicates) on the first ``--few`` populations. ``RUN`` is a train_flow run of experiment
theophylline, which only tells where fits begin. A coverage p from n populations has the standard error
sqrt(p (1 - p) / n).
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
from record import Figure, stopwatch, write_result
from theophylline_exact import read_data

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.devices import keep_freed_memory
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.assessment import Assessment, assessed

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--populations", type=int, default=200)
    parser.add_argument("--few", type=int, default=50)
    parser.add_argument("--individuals", type=int, default=100)
    parser.add_argument("--rows", type=Path, help="also write every interval, one JSON object a line")
    options = parser.parse_args()
    keep_freed_memory()
    posterior, data = AmortizedPosterior.load(options.posterior, device="cpu"), read_data()
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[str, list[float]] = defaultdict(list)
    converged, redone = 0, 0
    with stopwatch() as spent:
        for seed in range(1, options.populations + 1):
            people = simulated(posterior, data, options.individuals, seed)
            fit = fit_population(
                posterior,
                people,
                GaussianPopulation(constant=("sigma",)),
                generator=torch.Generator().manual_seed(seed),
                # A tenth of a standard error, the wished Monte-Carlo accuracy, needs no more draws here.
                estimator=Exact(max_draws=256),
                starts=1,
            )
            methods = METHODS if seed <= options.few else METHODS[:2]
            fit = assessed(fit, Assessment(methods=methods), generator=torch.Generator().manual_seed(seed))
            converged += fit.converged
            redone += any(test.estimated for test in fit.variance_tests)
            for row in fit.intervals:
                inside = row.lower <= TRUTH[row.unknown] <= row.upper
                hits[row.method][row.unknown].append(inside)
                if row.method == "information" and row.se is not None:
                    errors[row.unknown].append((row.estimate - TRUTH[row.unknown]) / row.se)
                if options.rows is not None:
                    with options.rows.open("a") as file:
                        file.write(
                            json.dumps(
                                {
                                    "population": seed,
                                    "unknown": row.unknown,
                                    "method": row.method,
                                    "lower": row.lower,
                                    "upper": row.upper,
                                    "inside": inside,
                                }
                            )
                            + "\n"
                        )
            if seed % 5 == 0:
                pooled = {
                    method: float(np.mean([hit for found in of.values() for hit in found]))
                    for method, of in hits.items()
                }
                print(seed, pooled, flush=True)
    figures: dict[str, Figure] = {}
    for method in METHODS:
        found = hits[method]
        if not found:
            continue
        count = len(next(iter(found.values())))
        pooled = [hit for each in found.values() for hit in each]
        figures[method] = (100 * float(np.mean(pooled)), f"% of {len(pooled)} intervals, {count} populations")
        shares = {name: 100 * float(np.mean(each)) for name, each in found.items()}
        for name, share in shares.items():
            figures[f"{method}_{name}"] = (share, "%")
    figures["worst_mean_z"] = (
        max(abs(float(np.mean(each))) for each in errors.values()),
        "largest mean of (estimate - truth) / SE over the unknowns",
    )
    figures["converged"] = (converged, f"of {options.populations} fits")
    figures["at_boundary"] = (redone, "fits in which a variance ran to 0")
    figures["seconds"] = (spent.wall / options.populations, "s a population, methods included")
    figures["cpu_seconds"] = (spent.cpu / options.populations, "CPU s a population, methods included")
    write_result(
        "coverage",
        figures,
        title=f"Coverage of 95% intervals, {options.individuals} simulated people each, theophylline, estimator exact.",
    )


if __name__ == "__main__":
    main()
