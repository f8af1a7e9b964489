"""One person's likelihood of theophylline by adaptive Gauss-Hermite quadrature in NumPy: nothing of ours is in it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.stats import norm

from nlme_sbi.types import Observations

# The maximum of the likelihood of theophylline: means and SDs of logs, and the additive residual SD.
ESTIMATE = {"ka": 0.4593, "CL": 1.0117, "V": 3.4538}
SDS = {"ka": 0.6364, "CL": 0.2652, "V": 0.1360}
RESIDUAL = 0.6959


def quadrature(
    person: tuple[np.ndarray, np.ndarray, float], *, mean: ArrayLike, sd: ArrayLike, residual: float, nodes: int
) -> float:
    """``log p(y)`` of (times, concentrations, dose), ``nodes`` a dimension about the mode.

    ``mean`` and ``sd`` are those of log ka, CL and V; ``residual`` is the additive SD.
    """
    times, values, dose = person
    beta, omega = np.asarray(mean, dtype=float), np.asarray(sd, dtype=float)

    def log_joint(eta: np.ndarray) -> np.ndarray:
        ka, clearance, volume = np.exp(beta + omega * eta).reshape(-1, 3).T[..., None]
        elimination = clearance / volume
        level = dose * ka / (volume * (ka - elimination)) * (np.exp(-elimination * times) - np.exp(-ka * times))
        return norm.logpdf(values, level, residual).sum(-1) + norm.logpdf(eta.reshape(-1, 3)).sum(-1)

    found = minimize(lambda eta: -log_joint(eta)[0], np.zeros(3), method="BFGS", options={"gtol": 1e-6})
    factor = np.linalg.cholesky(found.hess_inv)
    places, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(places, places, places, indexing="ij"), -1).reshape(-1, 3)
    log_weights = sum(np.log(part) for part in np.meshgrid(weights, weights, weights, indexing="ij")).ravel()
    terms = log_joint(found.x + grid @ factor.T) + 0.5 * (grid**2).sum(1) + log_weights
    return float(np.logaddexp.reduce(terms) + np.log(np.diag(factor)).sum())


def people(data: Observations) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Times, measured concentrations and dose of everybody."""
    found = []
    for row in range(len(data)):
        seen = data.design.observed[row, :, 0].numpy()
        times, values = data.design.times[row].double().numpy()[seen], data.values[row, :, 0].double().numpy()[seen]
        found.append((times, values, float(data.design.events.amount[row, 0])))
    return found
