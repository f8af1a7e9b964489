"""Standard errors of the estimates from the observed information, and, separately, Monte-Carlo standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.factorizations import eigh_or_diagonal
from nlme_sbi.population.objective.interface import SetsOfDraws, WeightedDraws
from nlme_sbi.population.objective.objective import (
    log_mean_error,
    objective_error,
    score_error,
    score_variance,
    scores,
    value_and_gradient,
)

_NAMED, _NAMED_FROM = 3, 0.3  # most unknowns that are named, and the least part of a direction for that
_HALF_STEPS = 8
_HALF_TOLERANCE = 0.01  # in standard errors


@dataclass(frozen=True, eq=False)
class MonteCarloError:
    """What finitely many draws do to objective and estimates.

    Args:
        objective_se: standard error of the summed objective, ``sqrt(sum(1/ESS_i - 1/S))`` (see
            :func:`nlme_sbi.population.objective.objective.log_mean_error` for draws that carry weights); where
            densities were fitted to the draws, from the differences between halves instead, which see that error too.
        objective_bias: ``-1/2 sum(1/ESS_i - 1/S)``: the log of a mean is biased, and it adds up over individuals.
        objective_bias_jackknife: half-sample jackknife, mean over the halves' maxima minus the whole's; None where a
            half found no maximum.
        se: ``(P,)`` standard error of each unknown, 0 where fixed.
        bias: ``(P,)`` half-sample jackknife bias of each unknown; NaN where a half found no maximum.
    """

    objective_se: float
    objective_bias: float
    objective_bias_jackknife: float | None
    se: Float[Tensor, " P"]
    bias: Float[Tensor, " P"]

    def worst(self, standard_errors: Float[Tensor, " P"], free: Tensor) -> tuple[float, float]:
        """Largest Monte-Carlo SE and largest bias over the free unknowns, in standard errors."""
        relative = torch.stack([self.se, self.bias.abs()])[:, free] / standard_errors[free]
        relative = torch.where(torch.isnan(relative), math.inf, relative)
        largest = relative.amax(1)
        return float(largest[0]), float(largest[1])


def covariance_from(information: Float[Tensor, "free free"]) -> Float[Tensor, "free free"] | None:
    """Inverse of the observed information, or None where it is not positive definite."""
    if not bool(torch.isfinite(information).all()):
        return None
    # Judged on unit diagonals, because unknowns have very different scales.
    diagonal = information.diagonal()
    if bool((diagonal <= 0).any()):
        return None
    scale = diagonal.rsqrt()
    factor, info = torch.linalg.cholesky_ex(information * scale[:, None] * scale)
    if int(info) != 0 or float(factor.diagonal().min()) < 1e-6:
        return None
    return torch.cholesky_inverse(factor) * scale[:, None] * scale


def name_weakest(information: Float[Tensor, "free free"], labels: Sequence[str]) -> str:
    """The unknowns, by their printed names, that the data say least about together: those that dominate the direction
    in which the likelihood curves least."""
    if not bool(torch.isfinite(information).all()):
        return ""
    scale = information.diagonal().abs().clamp_min(1e-300).rsqrt()
    _, vectors = eigh_or_diagonal(information * scale[:, None] * scale)
    share = vectors[:, 0].abs()
    chosen = share.argsort(descending=True)[:_NAMED]
    return ", ".join(labels[place] for place in chosen.tolist() if float(share[place]) > _NAMED_FROM)


def describe_unidentified(names: str) -> str:
    """What it means that the observed information is not positive definite, as the end of a sentence."""
    what = f"data say next to nothing about {names}" if names else "some unknown is not identified by these data"
    return f"the observed information is not positive definite: {what}"


def sandwich(
    state: WeightedDraws, theta: Float[Tensor, " P"], covariance: Float[Tensor, "free free"]
) -> Float[Tensor, "free free"]:
    r"""Robust covariance :math:`H^{-1} \left(\sum_i s_i s_i^T\right) H^{-1}` of the free unknowns.

    It holds where the population model is wrong in its shape, as long as individuals are independent; the inverse
    information ``covariance`` holds only where the model is right. With few individuals it is too small.

    Source: Huber (1967); White (1982), Econometrica 50:1.
    """
    slopes = scores(state, theta) @ covariance
    return slopes.T @ slopes


def monte_carlo_error(
    state: WeightedDraws,
    theta: Float[Tensor, " P"],
    covariance: Float[Tensor, "free free"] | None,
    objective: float,
) -> MonteCarloError:
    """Errors from finitely many draws at the optimum.

    Args:
        state: all draws.
        theta: the optimum on them, or near it.
        covariance: of the free unknowns, inverse observed information; None where it is not known, which leaves the
            errors of the estimates unknown too.
        objective: the maximum.
    """
    fixed = state.population.unknowns.fixed.to(theta.device)
    free = state.population.unknowns.free.to(theta.device)
    variance, excess = (float(each.sum()) for each in log_mean_error(state, theta))
    objective_se = math.sqrt(variance)
    unknown = torch.where(fixed, torch.zeros_like(theta), math.nan)
    if covariance is None:
        return MonteCarloError(objective_se, -0.5 * excess, None, unknown, unknown)
    halves = [state.half(which) for which in (0, 1)]
    if state.fitted:
        # Fitting mixtures to halves of the draws costs more than all else here: once is enough.
        sets = None if isinstance(state, SetsOfDraws) else halves
        objective_se = float(objective_error(state, theta, sets).norm())
        spread = score_error(state, theta, sets)
        excess = _bound_by_error(excess, objective_se)
    else:
        spread = score_variance(state, theta)
    spreads = (covariance @ spread @ covariance).diagonal().clamp_min(0)
    ends = [_half_maximum(half, theta, covariance) for half in halves]
    bias, jackknife = unknown, None
    if all(end is not None for end in ends):
        found = [end for end in ends if end is not None]
        # An estimate that was checked on these draws, not maximised on them, lies a little beside their maximum.
        gradient = value_and_gradient(state, theta)[1][free]
        maximum = theta.index_add(0, free, covariance @ gradient)
        bias = torch.stack([end for end, _ in found]).mean(0) - maximum
        jackknife = sum(value for _, value in found) / 2 - objective - 0.5 * float(gradient @ covariance @ gradient)
    return MonteCarloError(
        objective_se=objective_se,
        objective_bias=-0.5 * excess,
        objective_bias_jackknife=jackknife,
        se=torch.zeros_like(theta).index_copy(0, free, spreads.sqrt()),
        bias=bias,
    )


def likelihood_error(
    state: WeightedDraws, theta: Float[Tensor, " P"], *, se: Float[Tensor, " P"], bias: Float[Tensor, " P"]
) -> MonteCarloError:
    """Error of the objective from the draws, where that of the unknowns (``se``, ``bias``) is known from elsewhere."""
    variance, excess = (float(each.sum()) for each in log_mean_error(state, theta))
    objective_se = math.sqrt(variance)
    if state.fitted:
        objective_se = float(objective_error(state, theta).norm())
        excess = _bound_by_error(excess, objective_se)
    return MonteCarloError(objective_se, -0.5 * excess, None, se, bias)


def _bound_by_error(excess: float, error: float) -> float:
    """The value from the weights, bounded by the error: evenly spread draws err less than their weights suggest."""
    return max(-(error**2), min(excess, error**2))


def _half_maximum(half: WeightedDraws, theta: Tensor, covariance: Tensor) -> tuple[Tensor, float] | None:
    """Maximum on half of the draws, by steps with the whole's curvature; None where they do not converge."""
    free = half.population.unknowns.free.to(theta.device)
    se = covariance.diagonal().sqrt()
    value, gradient = value_and_gradient(half, theta)
    shrink = 1.0
    for _ in range(_HALF_STEPS):
        step = shrink * (covariance @ gradient[free])
        if not bool(torch.isfinite(step).all()):
            return None
        if float((step.abs() / se).max()) < _HALF_TOLERANCE * shrink:
            return theta, value + 0.5 * float(step @ gradient[free])
        proposed = theta.index_add(0, free, step)
        reached, slope = value_and_gradient(half, proposed)
        if reached > value:
            theta, value, gradient = proposed, reached, slope
        else:
            shrink *= 0.5
    return theta, value
