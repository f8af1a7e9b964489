r"""Profile-likelihood intervals: the range of an unknown over which the maximum over the others stays high enough.

The limits solve :math:`2 (\ell(\hat\theta) - \max_{\theta_k = c} \ell(\theta)) = \chi^2_{1, level}`. The signed root of
the left side is nearly linear in c, so a few secant steps find them. All on the fit's own draws: the Monte-Carlo errors
of two points are then mostly the same, and their difference is far more precise than either. Where that no longer
holds (the limit is far from where the draws were made), draws valid at both ends replace them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from nlme_sbi.population.models.interface import MEAN
from nlme_sbi.population.objective.interface import MovableDraws, WeightedDraws
from nlme_sbi.population.objective.objective import contributions, halves, value_and_gradient
from nlme_sbi.population.objective.optimization import NOWHERE, lbfgs
from nlme_sbi.population.results.fit_result import PopulationFit

_TOLERANCE = 0.005  # of the signed root: a limit is known to about so many standard errors
_STEPS = 24  # of one search for a limit
_INTERPOLATED = 4  # steps after which every other one bisects: interpolation may stick to one end
_REACH = 12.0  # standard errors beyond which a limit counts as infinite
_CUBIC = 0.01  # error of an estimate, in standard errors, that an expansion in the constants may leave
_EXPANSIONS = 3
_IMPRECISE = 0.05  # Monte-Carlo error of a limit, in standard errors, above which draws are made anew


@dataclass(frozen=True, eq=False)
class Profile:
    """The profile of one unknown, on the scale of ``theta``.

    Args:
        unknown: its name.
        level: of the interval.
        estimate: where the profile has its maximum.
        limits: lower and upper; infinite where the likelihood never falls so far.
        monte_carlo_se: standard errors of both limits from finitely many draws; apart from the sampling error, which is
            what the interval expresses.
        points: ``(n,)`` visited values, ascending.
        drops: ``(n,)`` twice the log-likelihood lost there.
        redrawn: how many of the two limits needed draws of their own.
        climbed: how much the profile exceeds the fit's maximum; above 0.01 the fit had not converged.
    """

    unknown: str
    level: float
    estimate: float
    limits: tuple[float, float]
    monte_carlo_se: tuple[float, float]
    points: Float[Tensor, " n"]
    drops: Float[Tensor, " n"]
    redrawn: int
    climbed: float


@dataclass(frozen=True, eq=False)
class _Line:
    """What stays the same along a profile: the unknown's place, the others, how they follow to first order."""

    place: int
    others: Tensor
    tangent: Float[Tensor, " P"]
    information: Float[Tensor, "others others"]
    se: Float[Tensor, " P"]

    @property
    def unit(self) -> float:
        """Standard error of the unknown."""
        return float(self.se[self.place])


@dataclass(frozen=True, eq=False)
class _Point:
    """A constrained maximum, ``offset`` standard errors away; ``value`` is its log-likelihood on ``state``."""

    offset: float
    theta: Float[Tensor, " P"]
    value: float
    state: WeightedDraws


def profile_interval(
    fit: PopulationFit, unknown: str, *, level: float = 0.95, generator: torch.Generator | None = None
) -> Profile:
    """Profile-likelihood interval of one entry of theta.

    Args:
        fit: a converged fit.
        unknown: its name, such as ``mean.ka`` or ``log_sd.ka``; SDs have the exponentials of these limits.
        level: such as 0.95.
        generator: for fresh draws where a limit lies too far for the fit's own; they stay when left out.

    Raises:
        ValueError: for an unknown that does not exist or is fixed, or a fit without standard errors.
    """
    line = _line(fit, unknown)
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval lies between 0 and 1; got {level}.")
    target = float(ndtri(0.5 + level / 2))
    top = value_and_gradient(fit.state, fit.theta)[0]
    visited: list[tuple[float, float]] = [(0.0, 0.0)]
    limits, errors, redrawn, climbed = [], [], 0, 0.0
    for side in (-1.0, 1.0):
        start = _Point(0.0, fit.theta, top, fit.state)
        found, slope = _limit(line, start, side, target)
        error = _error(start, found[-1], slope, target)
        if math.isfinite(slope) and error > _IMPRECISE and generator is not None:
            fresh = _maximum_on_common_draws(fit, line, found[-1], generator)
            if fresh is not None:
                found, slope = _limit(line, fresh, side, target)
                start, error, redrawn = fresh, _error(fresh, found[-1], slope, target), redrawn + 1
        drops = [(point.offset, 2 * (start.value - point.value)) for point in found]
        visited += drops
        climbed = max([climbed, *(-drop / 2 for _, drop in drops)])
        limits.append(side * math.inf if math.isinf(slope) else float(found[-1].theta[line.place]))
        errors.append(error * line.unit)
    offsets, lost = zip(*sorted(visited), strict=True)
    estimate = float(fit.theta[line.place])
    points = estimate + line.unit * torch.tensor(offsets, dtype=fit.theta.dtype)
    return Profile(
        unknown=unknown,
        level=level,
        estimate=estimate,
        limits=(limits[0], limits[1]),
        monte_carlo_se=(errors[0], errors[1]),
        points=points,
        drops=torch.tensor(lost, dtype=fit.theta.dtype),
        redrawn=redrawn,
        climbed=climbed,
    )


def profile_intervals(
    fit: PopulationFit,
    unknowns: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> tuple[Profile, ...]:
    """:func:`profile_interval` of several unknowns; of all that are free when left out."""
    table = fit.population.unknowns
    chosen = [table.names[int(place)] for place in table.free] if unknowns is None else list(unknowns)
    return tuple(profile_interval(fit, name, level=level, generator=generator) for name in chosen)


def _line(fit: PopulationFit, unknown: str) -> _Line:
    table = fit.population.unknowns
    if unknown not in table.names:
        raise ValueError(f'There is no unknown "{unknown}" in this fit; it has {", ".join(table.names)}.')
    place = table.names.index(unknown)
    if bool(table.fixed[place]):
        raise ValueError(f'"{unknown}" is fixed in this fit: it has no interval.')
    free = table.free.to(fit.theta.device)
    covariance = fit.covariance
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("This fit has no standard errors, which set the steps of a profile; see its warnings.")
    others = free[free != place]
    information = torch.linalg.inv(covariance[free][:, free])
    kept = torch.nonzero(free != place)[:, 0]
    return _Line(
        place=place,
        others=others,
        tangent=covariance[:, place] / covariance[place, place],
        information=information[kept][:, kept],
        se=fit.standard_errors,
    )


def _limit(line: _Line, start: _Point, side: float, target: float) -> tuple[list[_Point], float]:
    """Points on the way to the limit, which is the last, and the slope of the root there (infinite: no limit)."""
    points, roots = [start], [0.0]
    offset, slope = target, 1.0
    for done in range(_STEPS):
        near = min(points, key=lambda point: abs(abs(point.offset) - offset))
        guess = near.theta + (side * offset - near.offset) * line.unit * line.tangent
        found = _constrained(line, replace(near, theta=guess, offset=side * offset))
        root = math.sqrt(max(0.0, 2 * (start.value - found.value)))
        points.append(found)
        roots.append(root)
        slope = _slope(points, roots, target)
        if abs(root - target) < _TOLERANCE:
            return points[1:], slope
        halve = done >= _INTERPOLATED and done % 2 == 0
        offset = _next_offset(points, roots, target, halve=halve)
        if offset > _REACH:
            return points[1:], math.inf
    return points[1:], math.inf if roots[-1] < target - 0.1 else slope


def _sort_points(points: list[_Point], roots: list[float]) -> list[tuple[float, float]]:
    return sorted((abs(point.offset), root) for point, root in zip(points, roots, strict=True))


def _slope(points: list[_Point], roots: list[float], target: float) -> float:
    """Of the root, between the two points whose roots are nearest to the target."""
    near = sorted(_sort_points(points, roots), key=lambda pair: abs(pair[1] - target))[:2]
    (first, low), (second, high) = sorted(near)
    return max((high - low) / max(second - first, 1e-12), 1e-3)


def _next_offset(points: list[_Point], roots: list[float], target: float, *, halve: bool) -> float:
    """Linear interpolation between the nearest points on both sides of the target (or halfway), or further out."""
    below = max((pair for pair in _sort_points(points, roots) if pair[1] < target), default=(0.0, 0.0))
    above = [pair for pair in _sort_points(points, roots) if pair[1] >= target and pair[0] > below[0]]
    if above:
        beyond = above[0]
        share = 0.5 if halve else (target - below[1]) / (beyond[1] - below[1])
        return below[0] + min(max(share, 0.02), 0.98) * (beyond[0] - below[0])
    slope = _slope(points, roots, target)
    return below[0] + min(1.02 * (target - below[1]) / slope, max(below[0], 1.0))


def _constrained(line: _Line, guess: _Point) -> _Point:
    """The maximum over the other unknowns, with likelihoods expanded anew where constants have moved."""
    theta, state = guess.theta, guess.state
    for _ in range(_EXPANSIONS):
        value = value_and_gradient(state, theta)[0]
        if not math.isfinite(value):
            return _Point(guess.offset, theta, -NOWHERE, state)
        if len(line.others) > 0:
            maximum = lbfgs(state, theta, line.information, tolerance=0.01, free=line.others)
            theta, value = maximum.theta, maximum.objective
        moved = expand_constants(state, theta, line.se)
        if moved is None:
            break
        state = moved
    return _Point(guess.offset, theta, value, state)


def expand_constants(state: WeightedDraws, theta: Float[Tensor, " P"], se: Float[Tensor, " P"]) -> WeightedDraws | None:
    """The draws with likelihoods expanded about the constants at ``theta``; None where they were already near enough,
    or nothing was expanded.

    What an expansion to second order leaves out moves an estimate by the square of the distance, where third
    derivatives are about as large as second ones: on logarithmic scales they are. That must stay small beside the
    standard error.
    """
    if not isinstance(state, MovableDraws) or not state.population.constant or state.is_direct:
        return None
    design = state.blocks[0].design
    shift = (state.population.constants(theta, design) - state.population.constants(state.made_for, design)).abs()
    names = [state.population.parameters.names[column] for column in state.population.constant]
    places = [state.population.unknowns.entry(MEAN, name) for name in names]
    errors = torch.stack([torch.zeros_like(se[0]) if place is None else se[place] for place in places])
    allowed = torch.minimum((_CUBIC * errors).sqrt(), errors)
    return None if bool((shift.amax(0) <= allowed).all()) else state.expand_about(theta)


def _error(start: _Point, end: _Point, slope: float, target: float) -> float:
    """Monte-Carlo error of a limit, in standard errors: of the difference of two log-likelihoods on common draws, its
    bias included, over the profile's slope. From how every individual's halves of draws differ."""
    if math.isinf(slope) or start.state.draws < 2:
        return 0.0
    pairs = zip(halves(start.state), halves(end.state), strict=True)
    first, second = (contributions(far, end.theta) - contributions(near, start.theta) for near, far in pairs)
    noise = 0.5 * float((first - second).square().sum().sqrt())
    bias = 0.5 * float((first + second).sum()) - (end.value - start.value)
    return math.hypot(noise, bias) / (target * slope)


def _maximum_on_common_draws(fit: PopulationFit, line: _Line, end: _Point, generator: torch.Generator) -> _Point | None:
    """The fit's maximum on draws valid both there and at the far end; None where such draws cannot be made."""
    if fit.redraw is None or not isinstance(fit.state, MovableDraws):
        return None
    with torch.no_grad():
        far = fit.redraw(end.theta, end.state, generator)
        state = fit.state.joint_draws(far, generator)
    free = fit.population.unknowns.free.to(fit.theta.device)
    information = torch.linalg.inv(fit.covariance[free][:, free])
    maximum = lbfgs(state, fit.theta, information, tolerance=0.01)
    return _Point(float((maximum.theta - fit.theta)[line.place]) / line.unit, maximum.theta, maximum.objective, state)
