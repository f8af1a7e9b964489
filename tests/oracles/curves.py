"""Individual models of small studies in NumPy: curve, noise and likelihood of every individual at many parameters.

Nothing of the package is in this folder: what judges an estimator must not share its mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Curve = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_HALF_LOG_TWO_PI = 0.5 * np.log(2 * np.pi)


@dataclass(frozen=True)
class Noise:
    """SD of a measurement around ``f``: the constant part, the part proportional to ``|f|``, and how they combine.

    Args:
        constant: place of the log SD among the parameters, or None.
        proportional: place of the log CV, or None.
        sums_variances: whether the two parts combine as ``sqrt(a^2 + b^2 f^2)`` rather than ``a + b |f|``.
    """

    constant: int | None = None
    proportional: int | None = None
    sums_variances: bool = False

    def log_sd(self, phi: np.ndarray, curve: np.ndarray) -> np.ndarray:
        """Log SD of every measurement, for ``phi (..., D)`` and ``curve (..., T)``."""
        if self.proportional is None:
            return phi[..., self.constant, None]
        with np.errstate(divide="ignore"):
            relative = phi[..., self.proportional, None] + np.log(np.abs(curve))
        if self.constant is None:
            return relative
        absolute = phi[..., self.constant, None]
        if self.sums_variances:
            return 0.5 * np.logaddexp(2 * absolute, 2 * relative)
        return np.logaddexp(absolute, relative)


@dataclass(frozen=True)
class CurveModel:
    """A noise-free curve with its noise.

    Args:
        names: of the ``D`` parameters, unconstrained (logs unless ``curve`` reads them otherwise).
        curve: ``(phi (..., D), times (..., T), dose (...)) -> (..., T)``.
        noise: around it.
        scale: of every parameter, a change that matters: the unit of finite differences.
    """

    names: tuple[str, ...]
    curve: Curve
    noise: Noise
    scale: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """Measurements of ``I`` individuals at up to ``T`` times; a row is padded where ``measured`` is False."""

    times: np.ndarray
    values: np.ndarray
    measured: np.ndarray
    doses: np.ndarray

    @classmethod
    def of(cls, people: Sequence[tuple[Sequence[float], Sequence[float], float]]) -> Study:
        """From (times, values, dose) of each individual."""
        longest = max(len(times) for times, _, _ in people)
        shape = (len(people), longest)
        times, values, measured = np.ones(shape), np.ones(shape), np.zeros(shape, dtype=bool)
        for row, (when, what, _) in enumerate(people):
            count = len(when)
            times[row, :count], values[row, :count], measured[row, :count] = when, what, True
            times[row, count:] = when[-1]
        return cls(times, values, measured, np.array([float(dose) for _, _, dose in people]))

    def __len__(self) -> int:
        return len(self.times)

    @property
    def measurements(self) -> int:
        return int(self.measured.sum())


def log_likelihood(model: CurveModel, study: Study, rows: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """``log p(y_i | phi)`` for individuals ``rows (B,)`` at ``phi (B, S, D)``: ``(B, S)``."""
    times, values = study.times[rows, None], study.values[rows, None]
    with np.errstate(over="ignore", invalid="ignore"):
        curve = model.curve(phi, times, study.doses[rows, None])
        log_sd = model.noise.log_sd(phi, curve)
        residual = (values - curve) * np.exp(-log_sd)
        terms = -0.5 * residual**2 - log_sd - _HALF_LOG_TWO_PI
    total = np.where(study.measured[rows, None], terms, 0.0).sum(-1)
    return np.where(np.isfinite(total), total, -np.inf)


def _bateman(times: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``(exp(-second t) - exp(-first t)) / (first - second)``, exact where the two rates meet."""
    slower, gap = np.minimum(first, second), np.abs(first - second)
    reach = gap * times
    small = reach < 1e-8
    share = np.where(small, 1.0 - 0.5 * reach, -np.expm1(-reach) / np.where(small, 1.0, reach))
    return times * np.exp(-slower * times) * share


def oral_curve(phi: np.ndarray, times: np.ndarray, dose: np.ndarray) -> np.ndarray:
    """One compartment, first-order absorption: log ka, log CL, log V; a single dose at time 0."""
    log_ka, log_clearance, log_volume = (phi[..., place, None] for place in range(3))
    scale = dose[..., None] * np.exp(log_ka - log_volume)
    return scale * _bateman(times, np.exp(log_ka), np.exp(log_clearance - log_volume))


def biexponential_curve(phi: np.ndarray, times: np.ndarray, dose: np.ndarray) -> np.ndarray:
    """``A1 exp(-l1 t) + A2 exp(-l2 t)``, all logs."""
    del dose
    log_a1, log_l1, log_a2, log_l2 = (phi[..., place, None] for place in range(4))
    return np.exp(log_a1 - np.exp(log_l1) * times) + np.exp(log_a2 - np.exp(log_l2) * times)


def _logistic(asymptote: np.ndarray, phi: np.ndarray, times: np.ndarray) -> np.ndarray:
    return asymptote / (1.0 + np.exp((np.exp(phi[..., 1, None]) - times) * np.exp(-phi[..., 2, None])))


def logistic_curve(phi: np.ndarray, times: np.ndarray, dose: np.ndarray) -> np.ndarray:
    """``exp(log_asym) / (1 + exp((xmid - t) / scal))``, all logs."""
    del dose
    return _logistic(np.exp(phi[..., 0, None]), phi, times)


def normal_logistic_curve(phi: np.ndarray, times: np.ndarray, dose: np.ndarray) -> np.ndarray:
    """The logistic curve whose asymptote is not a log: linear in it."""
    del dose
    return _logistic(phi[..., 0, None], phi, times)


def emax_curve(phi: np.ndarray, times: np.ndarray, dose: np.ndarray) -> np.ndarray:
    """``E0 + Emax c / (EC50 + c)`` at concentrations ``times``, all logs."""
    del dose
    log_e0, log_emax, log_ec50 = (phi[..., place, None] for place in range(3))
    return np.exp(log_e0) + np.exp(log_emax) * times / (np.exp(log_ec50) + times)


ORAL = CurveModel(("ka", "CL", "V", "sigma"), oral_curve, Noise(constant=3), (1.0,) * 4)
BIEXPONENTIAL = CurveModel(("A1", "l1", "A2", "l2", "cv"), biexponential_curve, Noise(proportional=4), (1.0,) * 5)
LOGISTIC = CurveModel(("Asym", "xmid", "scal", "sigma"), logistic_curve, Noise(constant=3), (1.0,) * 4)
NORMAL_LOGISTIC = CurveModel(
    ("Asym", "xmid", "scal", "sigma"), normal_logistic_curve, Noise(constant=3), (50.0, 1.0, 1.0, 1.0)
)
EMAX = CurveModel(
    ("E0", "Emax", "EC50", "sd", "cv"), emax_curve, Noise(constant=3, proportional=4, sums_variances=True), (1.0,) * 5
)
