"""Maximum likelihood of small dosed studies by adaptive Gauss-Hermite quadrature, NumPy and SciPy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize

_STEP = 1e-4


@dataclass(frozen=True)
class Person:
    """Times and amounts of boluses, times and values of measurements, and a covariate (logarithm; 0 for none)."""

    dose_times: np.ndarray
    amounts: np.ndarray
    times: np.ndarray
    values: np.ndarray
    covariate: float = 0.0


# Concentration at a person's times for parameters (..., Q): (..., T).
Curve = Callable[[np.ndarray, Person], np.ndarray]


@dataclass(eq=False)
class Study:
    """A population model with ``Q`` log-normal parameters and a constant proportional error.

    Args:
        people: the individuals.
        curve: their noise-free signals.
        varying: which of the ``Q`` parameters vary.
        covariate_on: which typical values depend on the covariate, by a power.
        nodes: of the quadrature, a dimension.
    """

    people: list[Person]
    curve: Curve
    varying: tuple[int, ...]
    covariate_on: tuple[int, ...] = ()
    parameters: int = 2
    nodes: int = 15
    _modes: dict[int, np.ndarray] = field(default_factory=dict)

    def deviance(self, theta: np.ndarray) -> float:
        """-2 log L at means (Q), log SDs of what varies, log of the coefficient of variation, covariate effects."""
        count, free = self.parameters, len(self.varying)
        means, sds = theta[:count], np.exp(theta[count : count + free])
        log_cv, effects = theta[count + free], theta[count + free + 1 :]
        line, weight = np.polynomial.hermite_e.hermegauss(self.nodes)
        grid = np.stack(np.meshgrid(*[line] * free, indexing="ij"), axis=-1).reshape(-1, free)
        weights = sum(np.meshgrid(*[np.log(weight / np.sqrt(2 * np.pi))] * free, indexing="ij")).reshape(-1)
        total = 0.0
        for number, person in enumerate(self.people):
            typical = means.copy()
            for place, effect in zip(self.covariate_on, effects, strict=True):
                typical[place] += effect * person.covariate

            def joint(eta: np.ndarray, person: Person = person, typical: np.ndarray = typical) -> np.ndarray:
                phi = np.broadcast_to(typical, (*eta.shape[:-1], count)).copy()
                phi[..., list(self.varying)] += sds * eta
                predicted = self.curve(phi, person)
                sd = np.exp(log_cv) * predicted
                with np.errstate(all="ignore"):
                    terms = -0.5 * ((person.values - predicted) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
                return np.nan_to_num(terms.sum(-1), nan=-1e300, neginf=-1e300) - 0.5 * (eta**2).sum(-1)

            mode, curvature = _mode(joint, self._modes.get(number, np.zeros(free)))
            self._modes[number] = mode
            factor = np.linalg.cholesky(np.linalg.inv(curvature))
            at = mode + grid @ factor.T
            parts = joint(at) + weights + 0.5 * (grid**2).sum(-1)
            largest = parts.max()
            total += largest + np.log(np.exp(parts - largest).sum()) + np.log(np.diag(factor)).sum()
        return -2 * total

    def maximum(self, start: np.ndarray) -> tuple[np.ndarray, float]:
        """Estimates and -2 log L, maximised from ``start``."""
        found = minimize(self.deviance, start, method="BFGS", options={"gtol": 1e-3})
        return found.x, float(found.fun)


def _mode(joint: Callable[[np.ndarray], np.ndarray], at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mode by Newton's method with differences, and minus the curvature there."""
    size = len(at)
    unit = np.eye(size) * _STEP
    curvature = np.eye(size)
    for _ in range(60):
        probes = [at + sign * unit[j] for j in range(size) for sign in (1, -1)]
        probes += [
            at + a * unit[j] + b * unit[k] for j in range(size) for k in range(j) for a in (1, -1) for b in (1, -1)
        ]
        value, around = joint(at[None])[0], joint(np.array(probes))
        gradient = (around[0 : 2 * size : 2] - around[1 : 2 * size : 2]) / (2 * _STEP)
        hessian = np.diag((around[0 : 2 * size : 2] - 2 * value + around[1 : 2 * size : 2]) / _STEP**2)
        mixed = iter(around[2 * size :])
        for j in range(size):
            for k in range(j):
                pp, pm, mp, mm = (next(mixed) for _ in range(4))
                hessian[j, k] = hessian[k, j] = (pp - pm - mp + mm) / (4 * _STEP**2)
        values, vectors = np.linalg.eigh(-hessian)
        curvature = vectors @ np.diag(np.maximum(np.abs(values), 1e-2)) @ vectors.T
        step = np.linalg.solve(curvature, gradient)
        length = 1.0
        while joint((at + length * step)[None])[0] < value - 1e-10 and length > 1e-6:
            length /= 2
        at = at + length * step
        if np.abs(step).max() < 1e-6:
            break
    return at, curvature


def one_compartment(phi: np.ndarray, person: Person) -> np.ndarray:
    """Intravenous boluses, ``phi`` logs of CL and V."""
    rate = np.exp(phi[..., 0] - phi[..., 1])[..., None, None]
    elapsed = person.times[:, None] - person.dose_times
    amount = np.where(elapsed >= 0, person.amounts * np.exp(-rate * np.maximum(elapsed, 0)), 0.0).sum(-1)
    return amount / np.exp(phi[..., 1])[..., None]


def two_compartments(phi: np.ndarray, person: Person) -> np.ndarray:
    """One intravenous bolus, ``phi`` logs of CL, Vc, Q and Vp: the biexponential by its roots."""
    clearance, central, flow, peripheral = (np.exp(phi[..., place])[..., None] for place in range(4))
    total = clearance / central + flow / central + flow / peripheral
    product = clearance / central * flow / peripheral
    root = np.sqrt(np.maximum(total**2 - 4 * product, 0.0))
    fast = 0.5 * (total + root)
    slow = product / fast
    elapsed = person.times - person.dose_times[0]
    share = (fast - flow / peripheral) / np.maximum(fast - slow, 1e-300)
    return person.amounts[0] / central * (share * np.exp(-fast * elapsed) + (1 - share) * np.exp(-slow * elapsed))
