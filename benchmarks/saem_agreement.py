"""Two independent ways to the maximum of the likelihood: estimators saem and exact on the same data.

    python benchmarks/saem_agreement.py --theophylline RUN --two-rate RUN [--cells 1000] [--people 100] [--data cells]

The RUNs are train_flow runs of the two experiments. Data: theophylline as it was measured; the first published two-rate
cells; and a simulated trial of theophylline, people of the published law with the designs of the real ones, resampled.
Differences are in standard errors of the exact fit; where parameters may be exchanged, under the nearer labelling.
Estimator laplace is reported beside them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from demo import FIXED_EFFECTS, OMEGAS, RESIDUAL
from population_convergence import CONSTANT, observed
from published_population import published_cells
from record import Figure, Spent, stopwatch, write_result
from theophylline_exact import read_data

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.compute.devices import keep_freed_memory
from nlme_sbi.designs import ResampledDesigns
from nlme_sbi.population import Exact, GaussianPopulation, Laplace, PopulationFit, Saem, fit_population

DATA = ("theophylline", "trial", "cells")
Fitted = tuple[PopulationFit, Spent]


def trial(posterior: AmortizedPosterior, real: Observations, people: int) -> Observations:
    """People of the published law, measured as the real ones were."""
    generator = torch.Generator().manual_seed(7)
    simulator = posterior.simulator
    model = GaussianPopulation(constant=("sigma",)).bind(posterior.parameters)
    names = posterior.parameters.names[:3]
    mean = torch.tensor([*(FIXED_EFFECTS[name][0] for name in names), RESIDUAL[0]], dtype=torch.float64)
    sd = torch.tensor([*(OMEGAS[name][0] for name in names), 0.0], dtype=torch.float64)
    design = ResampledDesigns(real.design, covariates=simulator.covariates).sample(people, generator)
    phi = model.sample(model.from_moments(mean, torch.diag(sd.square())), design, generator)
    output = simulator.simulate(phi, design, generator)
    return Observations(
        ids=tuple(f"person_{person}" for person in range(people)),
        values=output.values,
        design=design,
        signals=real.signals,
        signal_units=real.signal_units,
        time_unit=real.time_unit,
    )


def fitted(
    posterior: AmortizedPosterior,
    data: Observations,
    constant: tuple[str, ...],
    estimator: Exact | Saem | Laplace,
) -> Fitted:
    with stopwatch() as spent:
        fit = fit_population(
            posterior,
            data,
            GaussianPopulation(constant=constant),
            generator=torch.Generator().manual_seed(0),
            estimator=estimator,
        )
    print(fit.table(), f"\n{spent}\n", flush=True)
    return fit, spent


def labellings(fit: PopulationFit, pairs: tuple[tuple[str, str], ...]) -> list[list[int]]:
    """Orders of the unknowns under which the likelihood is the same: as it is, and with each pair exchanged."""
    names = fit.population.unknowns.names
    orders = [list(range(len(names)))]
    for first, second in pairs:
        exchanged = {first: second, second: first}
        swapped = [f"{kind}.{exchanged.get(name, name)}" for kind, name in (entry.split(".", 1) for entry in names)]
        orders.append([names.index(name) for name in swapped])
    return orders


def apart(fit: PopulationFit, exact: PopulationFit, pairs: tuple[tuple[str, str], ...]) -> float:
    """Largest difference in standard errors."""
    return min(
        float(((fit.theta[order] - exact.theta).abs() / exact.standard_errors).max())
        for order in labellings(exact, pairs)
    )


def deviance(fit: PopulationFit) -> float:
    return math.nan if fit.minus_two_log_likelihood is None else fit.minus_two_log_likelihood


def figures_of(name: str, fits: dict[str, Fitted], distance: dict[str, float]) -> dict[str, Figure]:
    exact, saem = fits["exact"], fits["saem"]
    error = 2 * math.hypot(exact[0].monte_carlo.objective_se, saem[0].monte_carlo.objective_se)
    found: dict[str, Figure] = {
        f"worst_se_{name}": (distance["saem"], "standard errors of the exact fit, saem against exact"),
        f"monte_carlo_se_{name}": (
            float((saem[0].monte_carlo.se / exact[0].standard_errors).max()),
            "of them saem's own Monte-Carlo SE, as it tells it",
        ),
        f"deviance_difference_{name}": (
            deviance(saem[0]) - deviance(exact[0]),
            f"-2 log L; Monte-Carlo SE {error:.2g}",
        ),
    }
    if "laplace" in fits:
        difference = deviance(fits["laplace"][0]) - deviance(exact[0])
        found[f"worst_se_laplace_{name}"] = (distance["laplace"], "standard errors, laplace against exact")
        found[f"laplace_difference_{name}"] = (difference, "-2 log L, laplace against exact")
    for estimator, (fit, spent) in fits.items():
        unit = "s a fit, draws included" + ("" if fit.converged else "; NOT converged")
        found[f"seconds_{estimator}_{name}"] = (spent.wall, unit)
        found[f"cpu_seconds_{estimator}_{name}"] = (spent.cpu, "CPU s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theophylline", type=Path, required=True)
    parser.add_argument("--two-rate", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, help="only these; all when left out")
    parser.add_argument("--without-laplace", action="store_true", help="it is slow on many cells with kinks")
    options = parser.parse_args()
    keep_freed_memory()
    oral = AmortizedPosterior.load(options.theophylline, device="cpu")
    cells = AmortizedPosterior.load(options.two_rate, device="cpu")
    real = read_data()
    sets = {
        "theophylline": (oral, real, ("sigma",)),
        "trial": (oral, trial(oral, real, options.people), ("sigma",)),
        "cells": (cells, observed(published_cells(options.cells)), CONSTANT),
    }
    title = (
        f"Estimators saem and exact on theophylline (12 people), a simulated trial ({options.people}) and "
        f"{options.cells} published two-rate cells."
    )
    figures: dict[str, Figure] = {}
    worst: list[float] = []
    for name, (posterior, data, constant) in ((name, sets[name]) for name in options.data):
        estimators = {"exact": Exact(), "saem": Saem(), **({} if options.without_laplace else {"laplace": Laplace()})}
        fits = {key: fitted(posterior, data, constant, estimator) for key, estimator in estimators.items()}
        pairs = tuple(getattr(posterior.simulator, "exchangeable", ()))
        distance = {key: apart(fits[key][0], fits["exact"][0], pairs) for key in list(fits)[1:]}
        figures |= figures_of(name, fits, distance)
        worst.append(distance["saem"])
        all_of_them = {"worst_se": (max(worst), f"standard errors, {len(worst)} data sets, every unknown"), **figures}
        write_result("saem_agreement", all_of_them, title=title)  # after each, so that nothing computed is lost


if __name__ == "__main__":
    main()
