"""The published synthetic two-rate population, regenerated, and the published error of an estimate.

Recipe: NumPy's legacy generator with seed 0, parameters of all 10,000 cells first, then the noise; noise-free log
signals in float64, cast to float32. Source: Arruda et al. (2024), ICML, and Fröhlich et al. (2018), npj Syst. Biol.
Appl. 4:42. Independent of the package: its own closed form, in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = ("delta", "gamma", "k_m0_scale", "t0", "offset", "sigma")
NATURAL_MEAN, NATURAL_VARIANCE = np.array([0.8, 0.03, 502, 0.9]), np.array([1.0, 1.0, 1000.0, 0.1])
TIMES = np.arange(1, 181) / 6
CELLS = 10_000


@dataclass(frozen=True)
class SyntheticCells:
    """``phi (cells, 6)`` on the log scale, noisy log fluorescence ``values (cells, 180)``, and the law's moments."""

    phi: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def law() -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of the logs."""
    ratio = NATURAL_VARIANCE / NATURAL_MEAN**2
    mean = np.log(NATURAL_MEAN / np.sqrt(1 + ratio))
    return np.append(mean, [np.log(8.0), 0.5 * np.log(0.001)]), np.append(np.log1p(ratio), [0.0, 0.0])


def other_law() -> tuple[np.ndarray, np.ndarray]:
    """A law of our own: both rates vary about values that are near each other, so that which is which differs between
    cells, expression varies widely, and background and noise are higher."""
    return np.log([0.5, 0.2, 300.0, 1.5, 20.0, 0.08]), np.array([0.1, 0.2, 0.25, 0.05, 0.0, 0.0])


def log_signal(phi: np.ndarray) -> np.ndarray:
    """Noise-free log fluorescence, float64, ``(cells, 180)``."""
    delta, gamma, scale, onset, offset = np.exp(phi[:, :5].T[..., None])
    elapsed = np.maximum(TIMES - onset, 0.0)
    slow, gap = np.minimum(delta, gamma), np.abs(delta - gamma)
    product = gap * elapsed
    safe = np.where(product > 1e-12, product, 1.0)
    factor = np.where(product > 1e-12, -np.expm1(-safe) / safe, 1.0)
    return np.log(scale * elapsed * np.exp(-slow * elapsed) * factor + offset)


def published_cells(cells: int = CELLS) -> SyntheticCells:
    """The first ``cells`` of the published 10,000."""
    mean, variance = law()
    np.random.seed(0)  # noqa: NPY002 the published recipe
    phi = np.random.multivariate_normal(mean, np.diag(variance), CELLS)  # noqa: NPY002
    signal = log_signal(phi).astype(np.float32)
    noise = np.exp(phi[:, 5:]) * np.random.normal(0, 1, (CELLS, len(TIMES)))  # noqa: NPY002
    values = signal + noise
    return SyntheticCells(phi[:cells], values[:cells], mean, variance)


def fresh_cells(cells: int, *, seed: int, moments: tuple[np.ndarray, np.ndarray] | None = None) -> SyntheticCells:
    """Another population from the published law (or another one's means and variances), by a seed of its own."""
    mean, variance = law() if moments is None else moments
    random = np.random.default_rng(seed)
    phi = mean + np.sqrt(variance) * random.standard_normal((cells, len(mean)))
    values = log_signal(phi) + np.exp(phi[:, 5:]) * random.standard_normal((cells, len(TIMES)))
    return SyntheticCells(phi, values, mean, variance)


def write_wide(path: Path, values: np.ndarray) -> None:
    """Raw data as a lab would have them: one column a cell, fluorescence and not its log, time in hours."""
    header = ",".join(["time", *(f"cell_{cell}" for cell in range(values.shape[0]))])
    np.savetxt(path, np.column_stack((TIMES, np.exp(values.T))), delimiter=",", header=header, comments="", fmt="%.9g")


def estimation_error(mean: np.ndarray, variance: np.ndarray, phi: np.ndarray) -> float:
    """Mean squared error of 6 means and 6 variances against the sample truth, nearer of the two labellings."""

    def error(order: list[int]) -> float:
        differences = [(mean[order] - phi.mean(0)) ** 2, (variance[order] - phi.var(0)) ** 2]
        return float(np.sum(differences) / (2 * len(mean)))

    return min(error([0, 1, 2, 3, 4, 5]), error([1, 0, 2, 3, 4, 5]))
