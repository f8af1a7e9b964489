r"""Variances at their boundary 0: a score test of variability.

A parameter without variability has the variance 0, the edge of what a variance may be. With :math:`L_i(s)` the
log-likelihood of individual i given the constant's value s, the derivative of its marginal log-likelihood in the
variance, at 0, is

.. math:: g_i = \frac12 \left( L_i''(s) + L_i'(s)^2 \right),

because a normal distribution around s with variance v solves the heat equation. The sum over individuals is positive
where variability would raise the likelihood. Its standard error comes from the individuals' residuals after regression
on the scores of the estimated unknowns: those were fitted, which takes its share out of the sum.

Source: Cox (1983), Biometrika 70:269, and Chesher (1984), Econometrica 52:865, for testing parameter variation;
Rao (1948) for score tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import ndtr
from torch import Tensor

from nlme_sbi.population.models.interface import MEAN
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import halves, scores, slopes_along

_STEP = 1e-4  # of central differences of exact derivatives
_LEVEL = 0.05  # one-sided p-value below which a parameter may vary


@dataclass(frozen=True)
class VarianceTest:
    """Score test of variability in a parameter that does not vary.

    Args:
        parameter: its name.
        z: about standard normal where it does not vary, larger where it does; NaN where individuals are too few.
        p: one-sided.
        monte_carlo_se: of z, from finitely many draws; NaN where it is not known.
        slope: derivative of the log-likelihood in the variance, at 0.
        estimated: whether the variance was estimated at 0, rather than given as 0.
    """

    parameter: str
    z: float
    p: float
    monte_carlo_se: float
    slope: float
    estimated: bool = False


def variance_tests(state: WeightedDraws, theta: Float[Tensor, " P"]) -> tuple[VarianceTest, ...]:
    """The score test for every constant parameter whose value is an unknown of its own.

    With too few individuals nothing is left to judge the sum by after the regression on the scores: ``z`` and ``p`` are
    NaN unless there are at least two more of them than unknowns.

    Args:
        state: draws, made for ``theta`` or nearby.
        theta: the estimate.
    """
    found = []
    slopes: Tensor | None = None
    for name in (state.population.parameters.names[column] for column in state.population.constant):
        direction = _direction(state, theta, name)
        if direction is None:
            continue
        if slopes is None:
            slopes = scores(state, theta)
        gain = variance_slopes(state, theta, direction)
        found.append(_test(name, gain, slopes, _noise(state, theta, direction)))
    return tuple(found)


def variance_slopes(
    state: WeightedDraws, theta: Float[Tensor, " P"], direction: Float[Tensor, " P"]
) -> Float[Tensor, " I"]:
    """``g_i`` for the constant that moves by 1 along ``direction``."""

    below, here, above = (
        slopes_along(state, theta + shift * direction, direction[None])[:, 0] for shift in (-_STEP, 0.0, _STEP)
    )
    return 0.5 * ((above - below) / (2 * _STEP) + here.square())


def _direction(state: WeightedDraws, theta: Tensor, name: str) -> Tensor | None:
    """Unit vector of the unknown that is this constant's value for every individual; None where there is no such
    unknown."""
    entry = state.population.unknowns.entry(MEAN, name)
    if entry is None:
        return None
    direction = torch.zeros_like(theta)
    direction[entry] = 1.0
    population, design = state.population, state.blocks[0].design
    change = population.constants(theta + direction, design) - population.constants(theta, design)
    column = [population.parameters.names[place] for place in population.constant].index(name)
    expected = torch.zeros_like(change)
    expected[:, column] = 1.0
    return direction if bool((change - expected).abs().max() < 1e-8) else None


def _test(name: str, gain: Float[Tensor, " I"], slopes: Float[Tensor, "I free"], noise: float) -> VarianceTest:
    individuals = len(slopes)
    scale = slopes.square().mean(0).sqrt().clamp_min(1e-300)
    design = torch.cat([torch.ones_like(slopes[:, :1]), slopes / scale], 1)
    left = individuals - design.shape[1]
    if left < 1 or not bool(torch.isfinite(gain).all()):
        return VarianceTest(name, math.nan, math.nan, math.nan, float(gain.sum()))
    solution = torch.linalg.lstsq(design, gain[:, None], driver="gelsd" if gain.device.type == "cpu" else None).solution
    residual = gain - (design @ solution)[:, 0]
    spread = math.sqrt(individuals * float(residual.square().sum()) / left)
    z = float(gain.sum()) / spread if spread > 0 else math.nan
    return VarianceTest(name, z, float(ndtr(-z)), noise / spread if spread > 0 else math.nan, float(gain.sum()))


def _noise(state: WeightedDraws, theta: Tensor, direction: Tensor) -> float:
    """Monte-Carlo standard error of the sum, from how every individual's halves of draws differ; that of densities
    which were fitted to the draws is not in it."""
    if state.draws < 2:
        return 0.0
    first, second = (variance_slopes(half, theta, direction) for half in halves(state))
    return 0.5 * float((first - second).square().sum().sqrt())


def describe_test(tests: tuple[VarianceTest, ...]) -> tuple[str, ...]:
    """A sentence below the table for each."""
    return tuple(sentence(test) for test in tests)


def sentence(test: VarianceTest) -> str:
    """The result of a score test: information for choosing the model, no alarm."""
    where = "its SD was estimated at 0, the boundary" if test.estimated else "given"
    begin = f"No variability of {test.parameter} ({where})"
    if math.isnan(test.z):
        return f"{begin}; no score test: too few individuals for the unknowns."
    error = "" if math.isnan(test.monte_carlo_se) else f" (Monte-Carlo SE {test.monte_carlo_se:.2g})"
    verdict = "it may vary" if test.p < _LEVEL else "no sign that it varies"
    return f"{begin}; score test: z = {test.z:.2f}{error}, one-sided p = {test.p:.2g}: {verdict}."
