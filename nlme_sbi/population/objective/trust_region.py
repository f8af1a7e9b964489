r"""Maximising the population likelihood: Newton steps in a trust region, each accepted or rejected on new draws.

A point is a theta with draws made for it, on which the likelihood, its score (Fisher's identity) and the observed
information (Louis' identity) are those of the real likelihood, but for Monte-Carlo error. From there a quadratic model
proposes; draws made at the proposed theta, independent of those at the old one, decide. A step is accepted where the
likelihood rises: by the difference of both values where that is large beside its Monte-Carlo error, otherwise by the
mean of the scores at both ends along the step, whose error is a small share of the gain. What is rejected shrinks the
region.

The region is measured in the complete data's information, the curvature that the likelihood would have if every
individual's parameters were known. One unit is what a single individual's complete data would determine: an SD of the
population for a mean, a factor of two for an SD, and for a constant what an individual's measurements say of it, or a
small share of the training prior's SD where that is more. With a large damping the step is that of EM (Lange 1995),
which rises from anywhere; with none it is Newton's.

Source: Moré and Sorensen (1983), SIAM J. Sci. Stat. Comput. 4:553, for the region; Lange (1995), J. R. Stat. Soc. B
57:425, for the step of EM as a gradient in the complete information.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.numerics.factorizations import eigh_or_diagonal
from nlme_sbi.population.objective.likelihood_point import Draw, NoLikelihoodError, Point
from nlme_sbi.population.objective.standard_errors import describe_unidentified
from nlme_sbi.population.objective.vanishing_sds import extend_step, hold_at_zero, vanishing_parameters

_LEAST_CURVATURE = 0.003  # of the likelihood's curvature, as a share of the complete data's, that a step assumes
_SHRINK, _GROW, _WIDEST = 0.35, 2.0, 64.0
_GOOD, _POOR = 0.7, 0.2  # gain beside the promised one from which a region grows, and below which it shrinks
_NARROWEST = 1e-3
_NEAR = 0.3  # standard errors: such a step gains less than what finitely many draws leave unknown
_LUCKY = 3  # steps rejected in a row after which the present point is drawn again
_CLEAR = 4.0  # Monte-Carlo errors by which values differ clearly


@dataclass(frozen=True, eq=False)
class Climb:
    """Result of a search.

    Args:
        point: the last accepted one.
        passes: how often draws were made.
        arrived: whether the score vanishes there: converged.
        reason: why it ended, where it has not converged.
        previous: the accepted point before the last one.
    """

    point: Point
    passes: int
    arrived: bool
    reason: str = ""
    previous: Point | None = None


@dataclass(frozen=True)
class Limits:
    """When a search ends.

    Args:
        tolerance: largest step left, in standard errors, beside Monte-Carlo error.
        errors: Monte-Carlo standard errors of the step left that are allowed beside it.
        passes: how often draws may be made.
        kept: parameters whose SD stays in the search however small it becomes.
        ends_at_zero: whether to end where an SD is on its way to 0, instead of holding it fixed and going on.
        enough: asked before every step, with the point, the one before it and the number of passes, whether to end
            there: a reason, or "".
    """

    tolerance: float
    errors: float
    passes: int
    kept: tuple[str, ...] = ()
    ends_at_zero: bool = False
    enough: Callable[[Point, Point | None, int], str] = lambda *_: ""


def climb_likelihood(
    draw: Draw,
    start: Point,
    limits: Limits,
    *,
    watch: Callable[[Point, int], None] = lambda *_: None,
) -> Climb:
    """From a point to where the score vanishes.

    Args:
        draw: makes draws for a theta; may raise :class:`NoLikelihoodError`.
        start: with draws made for it.
        limits: when to end.
        watch: called with each accepted point and the number of passes.
    """
    point, radius, passes = hold_at_zero(start, limits.kept), 1.0, 1
    previous: Point | None = None
    rejected = 0
    watch(point, passes)
    while True:
        if _has_arrived(point, limits):
            return Climb(point, passes, arrived=True, previous=previous)
        reason = limits.enough(point, previous, passes)
        if limits.ends_at_zero and vanishing_parameters(point):
            reason = "an SD goes to 0"
        if reason or passes >= limits.passes:
            return Climb(point, passes, arrived=False, reason=reason or _describe_score(point), previous=previous)
        step, promised = _proposal(point, radius)
        step = extend_step(point, step, limits.kept)
        length = _length(point, step)
        reached = _take_step(draw, point, step)
        passes += 1
        gain = -math.inf if reached is None else log_likelihood_gain(point, reached)
        if reached is None or not gain > -_tolerated_loss(point):
            radius = _SHRINK * min(radius, length)
            rejected += 1
            if rejected == _LUCKY:  # by chance, the draws here may overstate the likelihood
                previous, point, radius = point, _redraw(draw, point), 1.0
                passes += 1
                continue
            if radius < _NARROWEST:
                return Climb(point, passes, arrived=False, reason=_describe_stall(point), previous=previous)
            continue
        if gain < _POOR * promised:
            radius = max(_SHRINK * min(radius, length), _NARROWEST)
        elif gain > _GOOD * promised and length > 0.8 * radius:
            radius = min(_GROW * radius, _WIDEST)
        rejected = 0
        previous, point = point, hold_at_zero(reached, limits.kept)
        watch(point, passes)


def _redraw(draw: Draw, point: Point) -> Point:
    """The same theta with new draws."""
    again = _take_step(draw, point, torch.zeros_like(point.theta))
    return point if again is None else again


def log_likelihood_gain(before: Point, after: Point) -> float:
    """How much the log-likelihood has risen between two points with draws of their own.

    The difference of the values where their Monte-Carlo errors are small beside it; otherwise the trapezoidal rule on
    the scores, which must not contradict the values.
    """
    step = after.theta - before.theta
    along = 0.5 * float((before.gradient + after.gradient) @ step)
    apart = after.value - before.value
    error = math.hypot(before.error, after.error)
    if not math.isfinite(along):
        return apart
    if error < 0.1 * abs(apart):
        return apart
    return apart if abs(apart - along) > _CLEAR * error + 0.5 * abs(along) else along


def _tolerated_loss(point: Point) -> float:
    """Loss that an accepted step may show: next to nothing, but where the step is small beside the standard errors, so
    that its gain is within what finitely many draws leave."""
    near = point.left is not None and len(point.left) > 0 and float(point.left.abs().max()) < _NEAR
    return 0.5 * _NEAR**2 if near else 1e-9 * (1 + abs(point.value))


def _has_arrived(point: Point, limits: Limits) -> bool:
    if point.left is None:
        return len(point.active) == 0
    largest = float(point.left.abs().max()) if len(point.left) else 0.0
    if largest <= limits.tolerance:
        return True
    if largest > limits.tolerance + 0.5:
        return False
    return bool((point.left.abs() <= limits.tolerance + limits.errors * point.left_error).all())


def _proposal(point: Point, radius: float) -> tuple[Float[Tensor, " P"], float]:
    """The step with the largest predicted gain within the region, and that gain."""
    factor, unit = point.metric
    inverse = torch.linalg.inv(factor)
    information = point.among_active(point.information).nan_to_num(0.0)
    gradient = point.gradient[point.active]
    values, vectors = eigh_or_diagonal(inverse @ information @ inverse.T)
    inner = vectors.T @ (inverse @ gradient)
    curvature = values.abs().clamp_min(_LEAST_CURVATURE)

    def damped(extra: float) -> Tensor:
        found: Tensor = inverse.T @ (vectors @ (inner / (curvature + extra)))
        return found

    def size(step: Tensor) -> float:
        return float((step.abs() / unit).max()) if len(step) else 0.0

    step = damped(0.0)
    if size(step) > radius:
        low, high = 0.0, 1e-3
        while size(damped(high)) > radius and high < 1e12:
            low, high = high, 4 * high
        for _ in range(12):
            middle = math.sqrt(max(low, 1e-6) * high)
            low, high = (middle, high) if size(damped(middle)) > radius else (low, middle)
        step = damped(high)
    bend = float(step @ information @ step)
    promised = float(gradient @ step) - 0.5 * max(bend, 0.0)
    return torch.zeros_like(point.theta).index_copy(0, point.active, step), max(promised, 0.0)


def _length(point: Point, step: Float[Tensor, " P"]) -> float:
    _, unit = point.metric
    return float((step[point.active].abs() / unit).max()) if len(unit) else 0.0


def _take_step(draw: Draw, point: Point, step: Float[Tensor, " P"]) -> Point | None:
    """The point at the end of a step; None where the likelihood is not known there."""
    if not bool(torch.isfinite(step).all()):
        return None
    theta = point.theta + step
    try:
        with torch.no_grad():
            state = draw(theta, point.state)
    except NoLikelihoodError:
        return None
    found = Point.at(theta, state, point.held)
    return found if found.is_finite else None


def _describe_score(point: Point) -> str:
    if point.left is None:
        return describe_unidentified(point.weakest)
    names = point.labels
    worst = int(point.left.abs().argmax())
    return (
        f"the score still points {float(point.left.abs()[worst]):.2g} standard errors away in {names[worst]} "
        f"(Monte-Carlo SE {float(point.left_error[worst]):.2g})"
    )


def _describe_stall(point: Point) -> str:
    return f"no step increases the likelihood further, but {_describe_score(point)}"
