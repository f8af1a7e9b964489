"""Maximising the population likelihood: EM for the first steps, L-BFGS and Newton steps for the last digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from nlme_sbi.numerics.factorizations import cholesky_or_diagonal
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import expected_statistics, hessian, rough_information, value_and_gradient

EM_STEPS = 30
EVALUATIONS = 200  # of objective and gradient in one L-BFGS run
NEWTON_STEPS = 5
_EM_TOLERANCE = 0.1  # in the summed objective
NOWHERE = 1e30  # stands for minus infinity in a line search


@dataclass(frozen=True, eq=False)
class Maximum:
    """Result of a maximisation. ``step`` is the largest remaining Newton step, in standard errors; None before it is
    computed."""

    theta: Float[Tensor, " P"]
    objective: float
    evaluations: int
    step: float | None = None


def expectation_maximisation(state: WeightedDraws, theta: Float[Tensor, " P"], *, steps: int = EM_STEPS) -> Tensor:
    """EM with the model's closed-form M-step, as far as it has one; constants stay where they are.

    Stops when a step gains less than 0.1 in the summed objective, or lowers it: EM is slow near the maximum, and the
    steps that follow are not.
    """
    best, objective = theta, -math.inf
    for _ in range(steps):
        reached, statistics = expected_statistics(state, theta)
        if not reached > objective:
            return best
        gain, best, objective = reached - objective, theta, reached
        if statistics is None or gain < _EM_TOLERANCE:
            return best
        try:
            theta = state.population.m_step(statistics, theta)
        except ValueError:  # a singular covariance on the way: go on from where EM was
            return best
    return best


def lbfgs(
    state: WeightedDraws,
    theta: Float[Tensor, " P"],
    information: Float[Tensor, "free free"],
    *,
    tolerance: float = 1e-3,
    evaluations: int = EVALUATIONS,
    watch: Callable[[float], None] | None = None,
    free: Tensor | None = None,
    multiplicity: Float[Tensor, " I"] | None = None,
) -> Maximum:
    """L-BFGS with exact gradients in coordinates in which the objective is about a unit sphere.

    Args:
        state: the draws.
        theta: where to begin.
        information: (approximate) information matrix of the free unknowns; its inverse sets the coordinates, so that
            ``tolerance`` on the gradient is in units of standard errors.
        tolerance: largest gradient component at which it ends.
        evaluations: most evaluations of objective and gradient.
        watch: called with the objective at each evaluation.
        free: positions of the unknowns that may move, which ``information`` is about; all free ones when left out.
        multiplicity: how often each individual counts; once when left out.
    """
    free = state.population.unknowns.free.to(theta.device) if free is None else free
    factor = cholesky_or_diagonal(torch.linalg.inv(information))
    count = 0

    def place(u: NDArray[np.float64]) -> Tensor:
        return theta.index_add(0, free, factor @ torch.as_tensor(u, dtype=theta.dtype, device=theta.device))

    def downhill(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal count
        count += 1
        value, gradient = value_and_gradient(state, place(u), multiplicity=multiplicity)
        inner = (factor.T @ gradient[free]).cpu().numpy()
        if not (np.isfinite(value) and np.isfinite(inner).all()):
            return NOWHERE, np.zeros_like(inner)
        if watch is not None:
            watch(value)
        return -value, -inner

    options = {"maxfun": evaluations, "maxiter": evaluations, "gtol": tolerance, "ftol": 1e-14, "maxcor": 20}
    found = minimize(downhill, np.zeros(len(free)), jac=True, method="L-BFGS-B", options=options)
    return Maximum(place(found.x), -float(found.fun), count)


def newton(
    state: WeightedDraws, theta: Float[Tensor, " P"], *, tolerance: float = 1e-3
) -> tuple[Maximum, Float[Tensor, "free free"]]:
    """Damped Newton steps with the exact Hessian; the maximum and the negative Hessian there.

    A Hessian that is not negative definite ends the steps; the caller decides what that means.
    """
    free = state.population.unknowns.free.to(theta.device)
    objective, gradient = value_and_gradient(state, theta)
    information = -hessian(state, theta)
    for used in range(1, NEWTON_STEPS + 2):
        factor, info = torch.linalg.cholesky_ex(information)
        if int(info) != 0 or not bool(torch.isfinite(information).all()):
            return Maximum(theta, objective, used), information
        step = torch.cholesky_solve(gradient[free, None], factor)[:, 0]
        se = torch.cholesky_inverse(factor).diagonal().sqrt()
        size = float((step.abs() / se).max())
        if size < tolerance or used > NEWTON_STEPS:
            break
        moved = _backtrack(state, theta, (step, free), objective)
        if moved is None:
            break
        theta, objective, gradient = moved
        if size > 0.05:  # a smaller step leaves the Hessian as it was to about that relative error
            information = -hessian(state, theta)
    return Maximum(theta, objective, used, size), information


def _backtrack(
    state: WeightedDraws, theta: Tensor, direction: tuple[Tensor, Tensor], objective: float
) -> tuple[Tensor, float, Tensor] | None:
    step, free = direction
    for halvings in range(8):
        proposed = theta.index_add(0, free, step * 0.5**halvings)
        value, gradient = value_and_gradient(state, proposed)
        if value > objective - 1e-9 * (1 + abs(objective)):
            return proposed, value, gradient
    return None


def maximise(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Maximum:
    """From a start to its maximum: EM, then L-BFGS."""
    theta = expectation_maximisation(state, theta)
    return lbfgs(state, theta, rough_information(state, theta), tolerance=0.02)
