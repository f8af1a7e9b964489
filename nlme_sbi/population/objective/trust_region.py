r"""Climbing the population likelihood itself: Newton steps in a trust region, each judged on draws made where it led.

A point is a theta with draws made for it, on which the likelihood, its score (Fisher's identity) and the observed
information (Louis' identity) are those of the real likelihood, but for Monte-Carlo error. From there a quadratic model
proposes; draws made at the proposed theta, independent of those at the old one, decide. A step is accepted where the
likelihood rises: by the difference of both values where that is large beside its Monte-Carlo error, otherwise by the
mean of the scores at both ends along the step, whose error is a small share of the gain. What is rejected shrinks the
region.

The region is measured in the complete data's information, the curvature that the likelihood would have if every
individual's parameters were known. One unit is what a single individual's complete data would tell: an SD of the
population for a mean, a factor of two for an SD, and for a constant what an individual's measurements say of it, or a
small share of the training prior's SD where that is more. With a large damping the step is that of EM (Lange 1995),
which rises from anywhere; with none it is Newton's.

Source: Moré and Sorensen (1983), SIAM J. Sci. Stat. Comput. 4:553, for the region; Lange (1995), J. R. Stat. Soc. B
57:425, for the step of EM as a gradient in the complete information.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.numerics.factorizations import eigh_or_diagonal
from nlme_sbi.population.models.labels import unknown_label
from nlme_sbi.population.objective.individuals import posterior_variances
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import (
    complete_information,
    hessian,
    objective_error,
    score_error,
    value_and_gradient,
)
from nlme_sbi.population.objective.standard_errors import covariance_from

_LEAST_CURVATURE = 0.003  # of the likelihood's curvature, as a share of the complete data's, that a step assumes
_SADDLE = 0.05  # least eigenvalue of the scaled complete information
_SHRINK, _GROW, _WIDEST = 0.35, 2.0, 64.0
_GOOD, _POOR = 0.7, 0.2  # gain beside the promised one from which a region grows, and below which it shrinks
_OF_PRIOR = 0.15  # of the training prior's SD: least unit of a constant's value
_NARROWEST = 1e-3
_NEAR = 0.3  # standard errors: such a step gains less than what finitely many draws leave unknown
_LUCKY = 3  # steps rejected in a row after which the present point is drawn again
_CLEAR = 4.0  # Monte-Carlo errors by which values differ clearly
_VANISHED = 0.96  # share of the population's variance that individuals leave open, from which it may be 0
_FLAT = 0.02  # gain that is left on the way of a variance to 0 at which it is not followed any further
_UNTOLD = 2.0  # Monte-Carlo errors within which the slope of a variance is not told
_LEAPING, _LANDING = 0.8, 0.98  # such shares from which an SD on its way to 0 is lowered at once, and to which
_LONGEST_LEAP = 1.5  # logarithm by which it is lowered at most

Draw = Callable[[Tensor, WeightedDraws | None], WeightedDraws]  # theta, draws before -> draws made for theta


class NoLikelihoodError(ValueError):
    """No draw of some individual has a likelihood above 0 at a theta; ``rows`` are their positions."""

    def __init__(self, message: str, rows: Tensor) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True, eq=False)
class Point:
    """A theta with draws made for it, and what they tell there.

    Args:
        theta: ``(P,)``.
        state: the draws.
        value: log-likelihood.
        gradient: ``(P,)`` the score; 0 where fixed.
        held: ``(P,)`` unknowns that do not move: fixed ones, and those of variances on their way to 0.
    """

    theta: Float[Tensor, " P"]
    state: WeightedDraws
    value: float
    gradient: Float[Tensor, " P"]
    held: Bool[Tensor, " P"]

    @classmethod
    def at(cls, theta: Float[Tensor, " P"], state: WeightedDraws, held: Bool[Tensor, " P"]) -> Point:
        """What the draws tell at ``theta``."""
        value, gradient = value_and_gradient(state, theta)
        return cls(theta, state, value, gradient, held)

    @property
    def is_finite(self) -> bool:
        """Whether value and score are numbers."""
        return math.isfinite(self.value) and bool(torch.isfinite(self.gradient).all())

    @property
    def active(self) -> Tensor:
        """Positions of the unknowns that move."""
        return torch.nonzero(~self.held)[:, 0]

    @property
    def labels(self) -> list[str]:
        """What people call the unknowns that move."""
        population = self.state.population
        return [unknown_label(population, population.unknowns.names[place]) for place in self.active.tolist()]

    @cached_property
    def information(self) -> Float[Tensor, "free free"]:
        """Observed information of the free unknowns."""
        return -hessian(self.state, self.theta)

    @cached_property
    def complete(self) -> Float[Tensor, "free free"]:
        """Information that the complete data would have on the free unknowns, at the present guess of them."""
        return complete_information(self.state, self.theta)

    def among_active(self, matrix: Float[Tensor, "free free"]) -> Float[Tensor, "active active"]:
        """Rows and columns of the unknowns that move."""
        free = self.state.population.unknowns.free.to(self.theta.device)
        kept = torch.nonzero(~self.held[free])[:, 0]
        return matrix[kept][:, kept]

    @cached_property
    def covariance(self) -> Float[Tensor, "active active"] | None:
        """Inverse of the observed information of what moves; None where it is not positive definite."""
        return covariance_from(self.among_active(self.information))

    @cached_property
    def left(self) -> Float[Tensor, " active"] | None:
        """Newton step to the maximum, in standard errors; None where there is no maximum nearby."""
        if self.covariance is None:
            return None
        return (self.covariance @ self.gradient[self.active]) / self.covariance.diagonal().sqrt()

    @cached_property
    def left_error(self) -> Float[Tensor, " active"]:
        """Monte-Carlo standard error of :attr:`left`, from how independent draws of every individual differ."""
        if self.covariance is None:
            return torch.full_like(self.gradient[self.active], math.inf)
        spread = self.among_active(score_error(self.state, self.theta))
        variance = (self.covariance @ spread @ self.covariance).diagonal() / self.covariance.diagonal()
        return variance.clamp_min(0).sqrt()

    @cached_property
    def noise(self) -> Float[Tensor, " I"]:
        """Monte-Carlo standard error of every individual's log-likelihood, from independent draws of it."""
        return objective_error(self.state, self.theta)

    @cached_property
    def metric(self) -> tuple[Float[Tensor, "active active"], Float[Tensor, " active"]]:
        """A factor F of the complete information made positive definite, F F' = D, and the unit of every unknown."""
        complete = self.among_active(self.complete)
        scale = complete.diagonal().abs().clamp_min(1e-12).sqrt()
        values, vectors = eigh_or_diagonal(complete / (scale[:, None] * scale))
        root = values.abs().clamp_min(_SADDLE).sqrt()
        factor = scale[:, None] * (vectors * root) @ vectors.T
        return factor, torch.maximum(math.sqrt(self.state.individuals) / scale, _least_units(self))

    @property
    def error(self) -> float:
        """Monte-Carlo standard error of :attr:`value`."""
        return float(self.noise.norm())


@dataclass(frozen=True, eq=False)
class Climb:
    """Where a climb ended.

    Args:
        point: the last accepted one.
        passes: how often draws were made.
        arrived: whether the score vanishes there.
        reason: why it ended, where it has not arrived.
        previous: the accepted point before the last one.
    """

    point: Point
    passes: int
    arrived: bool
    reason: str = ""
    previous: Point | None = None


@dataclass(frozen=True)
class Limits:
    """When a climb ends.

    Args:
        tolerance: largest step left, in standard errors, beside Monte-Carlo error.
        errors: Monte-Carlo standard errors of the step left that are allowed beside it.
        passes: how often draws may be made.
        kept: parameters whose SD is followed however small it becomes.
        ends_at_zero: whether to end where an SD is on its way to 0, instead of holding it and climbing on.
        enough: asked before every step, with the number of passes, whether to end there: a reason, or "".
    """

    tolerance: float
    errors: float
    passes: int
    kept: tuple[str, ...] = ()
    ends_at_zero: bool = False
    enough: Callable[[Point, int], str] = lambda *_: ""


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
        watch: told each accepted point and the number of passes.
    """
    point, radius, passes = _held(start, limits.kept), 1.0, 1
    previous: Point | None = None
    rejected = 0
    watch(point, passes)
    while True:
        if _has_arrived(point, limits):
            return Climb(point, passes, arrived=True, previous=previous)
        said = limits.enough(point, passes)
        if limits.ends_at_zero and vanishing(point):
            said = "an SD runs to 0"
        if said or passes >= limits.passes:
            return Climb(point, passes, arrived=False, reason=said or _left_words(point), previous=previous)
        step, promised = _proposal(point, radius)
        step = _leap(point, step, limits.kept)
        length = _length(point, step)
        reached = _reached(draw, point, step)
        passes += 1
        gain = -math.inf if reached is None else gained(point, reached)
        if reached is None or not gain > -_tolerated(point):
            radius = _SHRINK * min(radius, length)
            rejected += 1
            if rejected == _LUCKY:  # draws that were lucky here would let nothing else look better
                previous, point, radius = point, _made_again(draw, point), 1.0
                passes += 1
                continue
            if radius < _NARROWEST:
                return Climb(point, passes, arrived=False, reason=_stuck_words(point), previous=previous)
            continue
        if gain < _POOR * promised:
            radius = max(_SHRINK * min(radius, length), _NARROWEST)
        elif gain > _GOOD * promised and length > 0.8 * radius:
            radius = min(_GROW * radius, _WIDEST)
        rejected = 0
        previous, point = point, _held(reached, limits.kept)
        watch(point, passes)


def _made_again(draw: Draw, point: Point) -> Point:
    """The same theta with other draws."""
    again = _reached(draw, point, torch.zeros_like(point.theta))
    return point if again is None else again


def gained(before: Point, after: Point) -> float:
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


def _tolerated(point: Point) -> float:
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


def _least_units(point: Point) -> Float[Tensor, " active"]:
    """A share of the training prior's SD for values of constants, which many measurements of an individual tell so
    sharply that their own unit is no distance; nothing for the others."""
    population = point.state.population
    if not population.constant:
        return torch.zeros_like(point.theta)[point.active]
    sd = point.state.training_draws()[1].covariance.diagonal().sqrt().to(point.theta)
    least = torch.zeros_like(point.theta)
    for column in population.constant:
        name = f"mean.{population.parameters.names[column]}"
        if name in population.unknowns.names:
            least[population.unknowns.names.index(name)] = _OF_PRIOR * sd[column]
    return least[point.active]


def _proposal(point: Point, radius: float) -> tuple[Float[Tensor, " P"], float]:
    """The step that promises most within the region, and what it promises."""
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


def _reached(draw: Draw, point: Point, step: Float[Tensor, " P"]) -> Point | None:
    """The point at the end of a step; None where no individual's likelihood can be told there."""
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


def _log_sds(point: Point) -> list[tuple[int, int, str]]:
    """Place of every varying parameter among the varying ones, that of its log SD in theta where it moves, its name."""
    population = point.state.population
    names = population.unknowns.names
    found = []
    for place, column in enumerate(population.varying):
        parameter = population.parameters.names[column]
        name = f"log_sd.{parameter}"
        if name in names and not bool(point.held[names.index(name)]):
            found.append((place, names.index(name), parameter))
    return found


def _shrinkages(point: Point) -> Float[Tensor, " V"]:
    """Share of the population's variance that individuals leave open, of every varying parameter."""
    open_share: Tensor = posterior_variances(point.state, point.theta).mean(0)
    return open_share


def _leap(point: Point, step: Float[Tensor, " P"], kept: tuple[str, ...]) -> Float[Tensor, " P"]:
    """The step with SDs that run to 0 lowered faster: near 0 the likelihood is flat on the logarithmic scale, and
    Newton's steps there never end. Not further than to where the individuals still tell a trace of them: beyond that
    nothing is gained, and Monte-Carlo error is all that is left."""
    falling = [one for one in _log_sds(point) if float(step[one[1]]) < -0.2 and one[2] not in kept]
    if not falling:
        return step
    shrinkage = _shrinkages(point)
    step = step.clone()
    for place, entry, _ in falling:
        left_open = float(shrinkage[place])
        if left_open > _LEAPING:
            landing = 0.5 * math.log((1 - _LANDING) / max(1 - left_open, 1e-9))
            furthest = -max(0.0, min(_LONGEST_LEAP, -landing))
            step[entry] = furthest if float(point.gradient[entry]) < 0 else max(float(step[entry]), furthest)
    return step


def _held(point: Point, kept: tuple[str, ...]) -> Point:
    """The point with those SDs held that are as good as 0: individuals tell next to nothing of them, and the likelihood
    would gain next to nothing on the way to 0, as far as the draws can tell. Whether they are 0 is decided afterwards,
    by a fit in which they are."""
    suspects = [(place, entry, name) for place, entry, name in _log_sds(point) if name not in kept]
    if not suspects:
        return point
    shrinkage = _shrinkages(point)
    suspects = [one for one in suspects if float(shrinkage[one[0]]) > _VANISHED]
    if not suspects:
        return point
    names, free = point.state.population.unknowns.names, point.state.population.unknowns.free.tolist()
    noise = score_error(point.state, point.theta).diagonal().sqrt()
    held = point.held.clone()
    for _, entry, parameter in suspects:
        slope, error = float(point.gradient[entry]), _UNTOLD * float(noise[free.index(entry)])
        # Linear in the variance: what is left is half of the slope in the logarithm of the SD.
        if slope < error and -0.5 * slope < _FLAT + 0.5 * error:
            for other, name in enumerate(names):
                if name == names[entry] or (
                    name.startswith("partial_correlation.") and parameter in name.split(".")[1:]
                ):
                    held[other] = True
    return point if bool((held == point.held).all()) else replace(point, held=held)


def vanishing(point: Point) -> tuple[str, ...]:
    """Parameters whose SD is held on its way to 0."""
    table = point.state.population.unknowns
    return tuple(
        name.removeprefix("log_sd.")
        for place, name in enumerate(table.names)
        if name.startswith("log_sd.") and bool(point.held[place]) and not bool(table.fixed[place])
    )


def _left_words(point: Point) -> str:
    if point.left is None:
        return "the observed information is not positive definite: some unknown is not identified by these data"
    names = point.labels
    worst = int(point.left.abs().argmax())
    return (
        f"the score still points {float(point.left.abs()[worst]):.2g} standard errors away in {names[worst]} "
        f"(Monte-Carlo SE {float(point.left_error[worst]):.2g})"
    )


def _stuck_words(point: Point) -> str:
    return f"no step raises the likelihood any more, but {_left_words(point)}"
