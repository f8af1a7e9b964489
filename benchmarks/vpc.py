"""Visual predictive check, prediction distribution errors and individual predictions of theophylline, independently.

    python benchmarks/vpc.py --posterior RUN [--seeds 20]

``RUN`` is a train_flow run of experiment theophylline. References, NumPy and SciPy only, at the fit's estimates:
quantiles of 20,000 data sets of an own simulation, binned by the number of the sample; prediction distribution errors
by Gauss-Hermite quadrature over the population, whose mean, covariance and distribution functions need no simulation;
individual predictions by quadrature of each posterior. Differences are of means over seeds, in Monte-Carlo standard
errors of both sides.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from record import stopwatch, write_result
from scipy.stats import norm
from theophylline_exact import fitted, read_data

from nlme_sbi import AmortizedPosterior, Observations
from nlme_sbi.diagnostics.fit.iwres import goodness_of_fit
from nlme_sbi.diagnostics.fit.npde import prediction_errors
from nlme_sbi.diagnostics.fit.vpc import visual_predictive_check
from nlme_sbi.population import PopulationFit
from nlme_sbi.population.models.interface import means_of
from nlme_sbi.population.theta_posterior.individuals import new_individuals

DATA_SETS, NODES, POSTERIOR_NODES = 20_000, 31, 41
REPLICATES, NULL, DRAWS = 2_000, 199, 2_000
QUANTILES, LIMITS = (0.05, 0.5, 0.95), (0.025, 0.5, 0.975)


@dataclass(frozen=True)
class Law:
    """Estimates: means and SDs of the logs of ka, CL, V, and the additive SD (mg/L)."""

    mean: np.ndarray
    sd: np.ndarray
    sigma: float


def law_of(fit: PopulationFit) -> Law:
    found = dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))
    mean = np.array([found[f"mean.{name}"] for name in ("ka", "CL", "V")])
    sd = np.exp([found[f"log_sd.{name}"] for name in ("ka", "CL", "V")])
    return Law(mean, sd, math.exp(found["mean.sigma"]))


def concentration(phi: np.ndarray, dose: np.ndarray, times: np.ndarray) -> np.ndarray:
    """mg/L for logs of ka, CL, V ``(..., 3)`` and times that broadcast against ``(...)``."""
    absorption, clearance, volume = np.exp(np.moveaxis(phi, -1, 0))
    elimination = clearance / volume
    scale = dose * absorption / (volume * (absorption - elimination))
    return scale * (np.exp(-elimination * times) - np.exp(-absorption * times))


def grid(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes ``(n^3, 3)`` and weights of the three-dimensional standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    places = np.array(list(product(points, repeat=3)))
    return places, np.prod(np.array(list(product(weights, repeat=3))), axis=1)


def simulated_bands(law: Law, dose: np.ndarray, times: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Ends and middles of bands, ``(limits, quantiles, samples)``, from data sets of an own simulation."""
    found = []
    for _ in range(DATA_SETS):
        phi = law.mean + law.sd * random.standard_normal((len(dose), 3))
        values = concentration(phi[:, None], dose[:, None], times) + law.sigma * random.standard_normal(times.shape)
        found.append(np.quantile(values, QUANTILES, axis=0))
    return np.quantile(found, LIMITS, axis=0)


def exact_errors(law: Law, dose: float, times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decorrelated and plain normal scores of one individual, by quadrature."""
    places, weights = grid(NODES)
    curves = concentration((law.mean + law.sd * places)[:, None], np.array(dose), times)
    mean = weights @ curves
    apart = curves - mean
    factor = np.linalg.cholesky((apart * weights[:, None]).T @ apart + law.sigma**2 * np.eye(len(times)))
    inverse = np.linalg.inv(factor)
    scores = []
    for rows in (inverse, np.eye(len(times))):
        # A linear combination of measurements is normal given the parameters.
        place = rows @ (values - mean)
        width = law.sigma * np.linalg.norm(rows, axis=1)
        below = weights @ norm.cdf((place - apart @ rows.T) / width)
        scores.append(norm.ppf(below))
    return scores[0], scores[1]


def exact_curve(law: Law, dose: float, times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean of an individual's curve and the posterior SD of it, on a grid about the mode of its posterior."""
    places = np.linspace(-4, 4, POSTERIOR_NODES)
    cube = np.array(list(product(places, repeat=3)))
    centre, spread = law.mean.copy(), law.sd.copy()
    for _ in range(6):  # the grid moves to where the posterior is, and shrinks to its width
        phi = centre + spread * cube
        curves = concentration(phi[:, None], np.array(dose), times)
        log_p = -0.5 * (((values - curves) / law.sigma) ** 2).sum(1) - 0.5 * (((phi - law.mean) / law.sd) ** 2).sum(1)
        weights = np.exp(log_p - log_p.max())
        weights /= weights.sum()
        centre = weights @ phi
        spread = np.maximum(np.sqrt(weights @ (phi - centre) ** 2) * 1.5, 0.02 * law.sd)
    mean = weights @ curves
    return mean, np.sqrt(weights @ (curves - mean) ** 2)


def worst(differences: np.ndarray, errors: np.ndarray) -> float:
    """Largest difference in standard errors, where there is any error."""
    return float(np.max(np.abs(differences[errors > 0]) / errors[errors > 0]))


def of_package(
    fit: PopulationFit, data: Observations, posterior: AmortizedPosterior, seed: int
) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    simulator = posterior.simulator
    thetas = fit.theta.expand(REPLICATES + NULL, -1)
    phi = new_individuals(fit.population, thetas, data.design, generator)
    check = visual_predictive_check(simulator, phi[:, :REPLICATES], data, generator=generator, probabilities=QUANTILES)
    errors = prediction_errors(simulator, phi, data, generator=generator, null=NULL)
    typical = means_of(fit.population, fit.theta, data.design)
    draws = fit.individual_draws(DRAWS, generator)
    goodness = goodness_of_fit(simulator, draws, typical, data, generator=generator)
    (signal,) = check.signals
    return {
        "bands": np.stack([signal.lower, signal.median, signal.upper]),
        "observed": signal.observed,
        "npde": errors.npde[..., 0].numpy(),
        "npd": errors.npd[..., 0].numpy(),
        "curves": goodness.individual_prediction[..., 0].numpy(),
        "p": np.array([check.p_value, errors.tests.p_value]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = read_data()
    posterior = AmortizedPosterior.load(options.posterior, device="cpu")
    fit = fitted(posterior, data, 0)
    law = law_of(fit)
    times, values = data.design.times.double().numpy(), data.values[..., 0].double().numpy()
    dose = data.design.events.amount.double().max(1).values.numpy()
    with stopwatch() as spent:
        runs = [of_package(fit, data, posterior, seed) for seed in range(options.seeds)]
    found = {name: np.stack([run[name] for run in runs]) for name in runs[0]}
    mean = {name: values.mean(0) for name, values in found.items()}
    error = {name: values.std(0, ddof=1) / math.sqrt(options.seeds) for name, values in found.items()}
    random = np.random.default_rng(1)
    references = [simulated_bands(law, dose, times, random) for _ in range(2)]
    bands = (references[0] + references[1]) / 2
    # A reference has ten times the data sets of one seed.
    of_both = np.hypot(error["bands"], error["bands"] * math.sqrt(options.seeds * REPLICATES / (2 * DATA_SETS)))
    exact = [exact_errors(law, *one) for one in zip(dose, times, values, strict=True)]
    npde, npd = np.stack([one[0] for one in exact]), np.stack([one[1] for one in exact])
    inside = np.abs(npde) < 2.5  # beyond, a few simulated values decide
    curves = [exact_curve(law, *one) for one in zip(dose, times, values, strict=True)]
    curve = np.stack([one[0] for one in curves])
    compared = f"mean of {options.seeds} seeds, {REPLICATES} data sets each"
    figures = {
        "band_worst_z": (worst(mean["bands"] - bands, of_both), f"Monte-Carlo SEs, of {bands.size} ends and medians"),
        "band_worst_difference": (float(np.abs(mean["bands"] - bands).max()), f"mg/L, {compared}"),
        "observed_quantiles": (
            float(np.abs(mean["observed"] - np.quantile(values, QUANTILES, axis=0)).max()),
            "mg/L, largest difference of the data's own quantiles",
        ),
        "npde_worst_z": (
            worst((mean["npde"] - npde)[inside], error["npde"][inside]),
            f"Monte-Carlo SEs, of {int(inside.sum())} errors below 2.5",
        ),
        "npde_rms_difference": (float(np.sqrt(np.mean((mean["npde"] - npde)[inside] ** 2))), f"of them, {compared}"),
        "npd_worst_z": (worst((mean["npd"] - npd)[inside], error["npd"][inside]), "the same without decorrelation"),
        "curve_worst_z": (
            worst(mean["curves"] - curve, error["curves"]),
            f"Monte-Carlo SEs, individuals' mean curves, {DRAWS} draws a seed",
        ),
        "curve_worst_difference": (float(np.abs(mean["curves"] - curve).max()), "mg/L"),
        "vpc_p": (float(mean["p"][0]), "p-value of the check, mean over seeds"),
        "npde_p": (float(mean["p"][1]), "p-value of the errors, mean over seeds"),
        "cpu_seconds": (spent.cpu / options.seeds, "CPU s a seed, all three"),
    }
    write_result("vpc", figures, title="Theophylline: predictive checks against own simulation and quadrature, NumPy.")


if __name__ == "__main__":
    main()
