"""Straight lines with noise, whose likelihood the simulator hides: the population's maximum is known exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import SimulatorOutput

NOISE = 0.3
TIMES = np.linspace(0.0, 1.5, 4)
LEVEL, LEVEL_SD, SLOPE = 1.2, 0.5, -0.7  # of the population that data are made from; the slope does not vary


class HiddenLine:
    """``y(t) = level + slope t + noise`` with SD 0.3: a simulator without a likelihood."""

    parameters = ParameterSpace((Parameter("level", transform="identity"), Parameter("slope", transform="identity")))
    signals, signal_units, time_unit, covariates, takes_doses = ("y",), ("",), "", (), False

    def simulate(self, phi, design, generator):
        times = design.times.to(phi)
        line = phi[:, :1] + phi[:, 1:] * times
        noise = torch.randn(line.shape, generator=generator, device=generator.device, dtype=line.dtype)
        return SimulatorOutput((line + NOISE * noise)[..., None], torch.zeros(len(phi), dtype=torch.long))


class OtherLine(HiddenLine):
    """The same by another name: a simulator that a network of the first does not belong to."""


def measurements(individuals: int, *, seed: int, level: float = LEVEL) -> np.ndarray:
    """Data of a population, ``(individuals, times)``."""
    random = np.random.default_rng(seed)
    levels = level + LEVEL_SD * random.standard_normal((individuals, 1))
    return levels + SLOPE * TIMES + NOISE * random.standard_normal((individuals, len(TIMES)))


def write_sheet(path: Path, values: np.ndarray) -> None:
    """The data as a sheet, a column an individual."""
    header = ",".join(["time", *(f"i{row}" for row in range(len(values)))])
    np.savetxt(path, np.column_stack([TIMES, values.T]), delimiter=",", header=header, comments="", fmt="%.10g")


def exact_estimate(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of the likelihood over (level, slope, log SD of the level) with its standard errors."""

    def negative(theta: np.ndarray) -> float:
        residuals = values - theta[0] - theta[1] * TIMES
        covariance = NOISE**2 * np.eye(len(TIMES)) + np.exp(2 * theta[2])
        whitened = np.linalg.solve(np.linalg.cholesky(covariance), residuals.T)
        return 0.5 * (whitened**2).sum() + 0.5 * len(values) * np.linalg.slogdet(covariance)[1]

    found = minimize(negative, np.array([values.mean(), 0.0, -0.5]), method="BFGS", options={"gtol": 1e-8}).x
    step = 1e-3
    axes = step * np.eye(3)
    information = [
        [
            (negative(found + a + b) - negative(found + a - b) - negative(found - a + b) + negative(found - a - b))
            / (4 * step**2)
            for a in axes
        ]
        for b in axes
    ]
    return found, np.sqrt(np.diag(np.linalg.inv(np.array(information))))
