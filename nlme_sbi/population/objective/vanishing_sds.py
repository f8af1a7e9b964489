"""SDs between individuals on their way to 0, where the likelihood is flat on the logarithmic scale."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import LOG_SD, PARTIAL_CORRELATION
from nlme_sbi.population.objective.individuals import posterior_variances
from nlme_sbi.population.objective.likelihood_point import Point
from nlme_sbi.population.objective.objective import score_error

_VANISHED = 0.96  # share of the population's variance that individuals leave open, from which it may be 0
_FLAT = 0.02  # remaining gain on the way of a variance to 0 at which it is held
_WITHIN_NOISE = 2.0  # Monte-Carlo errors within which the slope of a variance is not known
_LEAPING, _LANDING = 0.8, 0.98  # such shares from which an SD on its way to 0 is lowered at once, and to which
_LONGEST_LEAP = 1.5  # logarithm by which it is lowered at most


def _log_sds(point: Point) -> list[tuple[int, int, str]]:
    """Place of every varying parameter among the varying ones, that of its log SD in theta where it moves, its name."""
    population = point.state.population
    found = []
    for place, column in enumerate(population.varying):
        parameter = population.parameters.names[column]
        entry = population.unknowns.entry(LOG_SD, parameter)
        if entry is not None and not bool(point.held[entry]):
            found.append((place, entry, parameter))
    return found


def _shrinkages(point: Point) -> Float[Tensor, " V"]:
    """Share of the population's variance that individuals leave open, of every varying parameter."""
    open_share: Tensor = posterior_variances(point.state, point.theta).mean(0)
    return open_share


def extend_step(point: Point, step: Float[Tensor, " P"], kept: tuple[str, ...]) -> Float[Tensor, " P"]:
    """The step with SDs that go to 0 lowered faster: near 0 the likelihood is flat on the logarithmic scale, and Newton
    steps there never end. Not further than where the data can still detect them: beyond that nothing is gained, and
    only Monte-Carlo error remains."""
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


def hold_at_zero(point: Point, kept: tuple[str, ...]) -> Point:
    """The point with SDs held that are practically 0: the data say next to nothing about them, and the likelihood would
    gain next to nothing on the way to 0, within Monte-Carlo error. Whether they are 0 is decided afterwards, by a fit
    in which they are fixed at 0."""
    suspects = [(place, entry, name) for place, entry, name in _log_sds(point) if name not in kept]
    if not suspects:
        return point
    shrinkage = _shrinkages(point)
    suspects = [one for one in suspects if float(shrinkage[one[0]]) > _VANISHED]
    if not suspects:
        return point
    table = point.state.population.unknowns
    free = table.free.tolist()
    noise = score_error(point.state, point.theta).diagonal().sqrt()
    held = point.held.clone()
    for _, entry, parameter in suspects:
        slope, error = float(point.gradient[entry]), _WITHIN_NOISE * float(noise[free.index(entry)])
        # Linear in the variance: what is left is half of the slope in the logarithm of the SD.
        if slope < error and -0.5 * slope < _FLAT + 0.5 * error:
            held[entry] = True
            for place in table.entries(PARTIAL_CORRELATION):
                if parameter in (table.rows[place].parameter, table.rows[place].other):
                    held[place] = True
    return point if bool((held == point.held).all()) else replace(point, held=held)


def vanishing_parameters(point: Point) -> tuple[str, ...]:
    """Parameters whose SD is held on its way to 0."""
    table = point.state.population.unknowns
    return tuple(
        table.rows[place].parameter
        for place in table.entries(LOG_SD)
        if bool(point.held[place]) and not bool(table.fixed[place])
    )
