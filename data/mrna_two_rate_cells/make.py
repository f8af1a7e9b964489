"""Writes cells.csv, truth.csv and law.csv: 200 generated cells after mRNA transfection, and what they were made from.

Run ``python data/mrna_two_rate_cells/make.py``. NumPy alone, and on purpose not the simulator of this project: the
tests compare the two.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

SEED = 20160427
CELLS = 200
HOURS = np.arange(1, 181) / 6
NAMES = ["delta", "gamma", "k_m0_scale", "t0", "offset", "sigma"]
# Natural means and variances between cells: the law "simple" of Arruda et al. (2024); offset and sigma do not vary.
MEANS = np.array([0.8, 0.03, 502.0, 0.9, 8.0, np.sqrt(0.001)])
VARIANCES = np.array([1.0, 1.0, 1000.0, 0.1, 0.0, 0.0])


def law() -> pd.DataFrame:
    """Mean and variance of every parameter's logarithm: the log-normal with the natural moments above."""
    return pd.DataFrame(
        {
            "parameter": NAMES,
            "log_mean": np.log(MEANS**2 / np.sqrt(MEANS**2 + VARIANCES)),
            "log_variance": np.log1p(VARIANCES / MEANS**2),
        }
    )


def fluorescence(phi: np.ndarray, hours: np.ndarray) -> np.ndarray:
    """Fluorescence without noise, a.u., ``(cells, times)``, of logarithms ``phi (cells, 6)``.

    ``m' = -delta m``, ``P' = k m - gamma P`` from ``m = 1, P = 0`` at ``t0``. The solution is symmetric in the two
    rates; with the slower one in front it is ``k tau exp(-slow tau) (1 - exp(-x)) / x``, ``x = (fast - slow) tau``.
    """
    delta, gamma, k, t0, offset, _ = np.exp(phi).T[:, :, None]
    tau = np.clip(hours - t0, 0.0, None)
    slow, gap = np.minimum(delta, gamma), np.abs(delta - gamma)
    x = np.maximum(gap * tau, 1e-12)
    return k * tau * np.exp(-slow * tau) * -np.expm1(-x) / x + offset


def cells(seed: int = SEED, count: int = CELLS) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the parameters ``(count, 6)`` and measured fluorescence ``(count, 180)``."""
    rng = np.random.default_rng(seed)
    population = law()
    phi = population["log_mean"].to_numpy() + np.sqrt(population["log_variance"].to_numpy()) * rng.standard_normal(
        (count, len(NAMES))
    )
    sigma = np.exp(phi[:, -1:])
    return phi, fluorescence(phi, HOURS) * np.exp(sigma * rng.standard_normal((count, len(HOURS))))


if __name__ == "__main__":
    folder = Path(__file__).parent
    phi, measured = cells()
    ids = [f"cell_{number:03d}" for number in range(1, CELLS + 1)]
    sheet = pd.DataFrame(measured.T, columns=ids)
    sheet.insert(0, "time_h", [f"{hour:.10g}" for hour in HOURS])
    truth = pd.DataFrame(phi, columns=[f"log_{name}" for name in NAMES])
    truth.insert(0, "id", ids)
    sheet.to_csv(folder / "cells.csv", index=False, lineterminator="\n", float_format="%.7g")
    truth.to_csv(folder / "truth.csv", index=False, lineterminator="\n", float_format="%.9g")
    law().to_csv(folder / "law.csv", index=False, lineterminator="\n", float_format="%.9g")
