"""How the estimate approaches the truth with the number of cells: estimators exact and prior_ratio, two-rate cells.

    python benchmarks/population_convergence.py --posterior RUN [--populations 10 5] [--prefixes 50 100 200 1000]

Fresh populations of 1000 and of 10,000 cells from the published law with seeds of their own, then prefixes of the
published cells. ``RUN`` is a train_flow run of experiment mrna_two_rate. The error is the mean squared error of 6 means
and 6 variances (log scale) against the sample truth, under the nearer of the two labellings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from published_population import NAMES, TIMES, SyntheticCells, estimation_error, fresh_cells, published_cells
from record import Figure, Spent, stopwatch, write_result

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.devices import keep_freed_memory
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, PriorRatio, fit_population
from nlme_sbi.types import Design

CONSTANT = ("offset", "sigma")


def observed(cells: SyntheticCells) -> Observations:
    count = len(cells.values)
    return Observations(
        ids=tuple(f"cell_{cell}" for cell in range(count)),
        values=torch.as_tensor(cells.values, dtype=torch.float64)[..., None],
        design=Design.regular(torch.as_tensor(TIMES, dtype=torch.float64), count, 1),
        signals=("log_fluorescence",),
        signal_units=("log a.u.",),
        time_unit="h",
    )


def fitted(
    posterior: AmortizedPosterior, cells: SyntheticCells, *, seed: int, estimator: Exact | PriorRatio
) -> tuple[PopulationFit, Spent]:
    with stopwatch() as spent:
        fit = fit_population(
            posterior,
            observed(cells),
            GaussianPopulation(constant=CONSTANT),
            generator=torch.Generator().manual_seed(seed),
            estimator=estimator,
        )
    return fit, spent


def moments(fit: PopulationFit) -> tuple[np.ndarray, np.ndarray]:
    """Estimated means and variances; variance 0 where constant."""
    return fit.population.mean(fit.theta).numpy(), fit.population.covariance(fit.theta).diagonal().numpy()


def gamma_z(fit: PopulationFit, cells: SyntheticCells) -> tuple[float, float]:
    """(estimate - sample truth) / SE of the mean and the variance of log gamma, of the nearer labelling."""
    mean, variance = moments(fit)
    name = "gamma" if abs(mean[1] - cells.phi[:, 1].mean()) < abs(mean[0] - cells.phi[:, 1].mean()) else "delta"
    column = NAMES.index(name)
    se = dict(zip(fit.population.unknowns.names, fit.standard_errors.tolist(), strict=True))
    true_mean, true_variance = cells.phi[:, 1].mean(), cells.phi[:, 1].var()
    variance_se = 2 * variance[column] * se[f"log_sd.{name}"]
    return (mean[column] - true_mean) / se[f"mean.{name}"], (variance[column] - true_variance) / variance_se


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--populations", type=int, nargs=2, default=(10, 5))
    parser.add_argument("--prefixes", type=int, nargs="*", default=(50, 100, 200, 500, 1000, 10000))
    options = parser.parse_args()
    keep_freed_memory()
    posterior = AmortizedPosterior.load(options.posterior, device="cpu")
    figures: dict[str, Figure] = {}
    scores: list[tuple[float, float]] = []
    for count, repeats in zip((1000, 10000), options.populations, strict=True):
        errors, ratio_errors, walls, cpus = [], [], [], []
        for seed in range(1, repeats + 1):
            cells = fresh_cells(count, seed=seed)
            fit, spent = fitted(posterior, cells, seed=seed, estimator=Exact())
            errors.append(estimation_error(*moments(fit), cells.phi))
            scores.append(gamma_z(fit, cells))
            walls.append(spent.wall)
            cpus.append(spent.cpu)
            print(count, seed, errors[-1], scores[-1], spent, f"-2 log L {fit.minus_two_log_likelihood}", flush=True)
            if seed <= 2 and count == 1000:
                ratio, _ = fitted(posterior, cells, seed=seed, estimator=PriorRatio(max_draws=2000))
                ratio_errors.append(estimation_error(*moments(ratio), cells.phi))
        if errors:
            figures[f"mse_{count}_exact"] = (float(np.mean(errors)), f"mean over {repeats} fresh populations")
            figures[f"mse_{count}_exact_worst"] = (max(errors), "the worst of them")
            figures[f"seconds_{count}_exact"] = (float(np.mean(walls)), "s a fit, draws included")
            figures[f"cpu_seconds_{count}_exact"] = (float(np.mean(cpus)), "CPU s a fit")
        if ratio_errors:
            figures[f"mse_{count}_prior_ratio"] = (float(np.mean(ratio_errors)), f"{len(ratio_errors)} of them")
    if scores:
        z = np.array(scores)
        bias = np.abs(z.mean(0))
        figures["worst_bias_se"] = (float(bias.max()), f"mean of (estimate - sample truth) / SE, {len(z)} populations")
    for count in options.prefixes:
        cells = published_cells(count)
        fit, spent = fitted(posterior, cells, seed=0, estimator=Exact())
        figures[f"mse_{count}_published"] = (estimation_error(*moments(fit), cells.phi), f"{spent.wall:.0f} s")
        print(count, figures[f"mse_{count}_published"], flush=True)
    write_result("population_convergence", figures, title="Two-rate cells, estimator exact: error with the cells.")


if __name__ == "__main__":
    main()
