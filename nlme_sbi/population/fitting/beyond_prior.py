"""Maxima that the training prior rules out: searched for and reported where they are about as high, but not taken.

Absorption and elimination exchanged (flip-flop kinetics), or two exponentials under exchanged names, may explain the
same data about as well, far from where anything was simulated. Such a maximum is taken where its likelihood is higher
by more than the prior density of its typical values is lower; otherwise the prior decides, and a warning says so.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.config.wording import in_words
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.estimators.initialization import likelihood_of
from nlme_sbi.population.fitting.likelihood_starts import SingleFits
from nlme_sbi.population.likelihood.log_joint import find_modes
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.population.objective.interface import Source
from nlme_sbi.population.results.restart import BEYOND, Restart
from nlme_sbi.types import Observations, TractableSimulator

_LEVEL = 0.05  # log-likelihoods this near are equal
_INDIFFERENT = 1.0  # log prior density by which one of two explanations must be preferred for the other to be ruled out
_FARTHER = 0.7  # SDs of the training prior by which a parameter is farther out that speaks against an explanation
_WIDE = 3.0  # times the training prior's SD, in which other explanations of the data are looked for
_DRAWS = 200  # of it
_EXCHANGES = 40  # of parameters that are looked at, at most
_ELSEWHERE = 1.5  # of the training prior's SD, in some parameter, at which a mode is another explanation
_MODE_STARTS = 4  # for each individual
_TRIED = 6  # explanations tried for every individual, at most
_ABOUT_AS_HIGH, _TOO_LOW = 10.0, 20.0  # log density below the single fit at which another one may be right; or may not


@torch.no_grad()
def find_other_explanation(
    simulator: TractableSimulator,
    source: Source,
    observations: Observations,
    fits: SingleFits,
    generator: torch.Generator,
) -> SingleFits | None:
    """Every individual's modes under another explanation of the data, looked for in a prior that is much wider than the
    training prior; None where no individual has one that is about as good as its fit, or not every individual has a
    fit.

    Args:
        simulator: whose likelihood it is.
        source: whose training prior it is.
        observations: of the individuals that were fitted alone, in their order.
        fits: of single individuals.
        generator: of the draws.
    """
    if len(fits.phi) < len(observations):
        return None
    prior = source.prior
    bound = GaussianPopulation().bind(simulator.parameters)
    mean, covariance = prior.mean.double(), prior.covariance.double()
    theta = bound.from_moments(mean, _WIDE**2 * covariance).to(fits.phi)
    wide = likelihood_of(simulator, bound, observations, theta)
    scale = covariance.diagonal().sqrt().to(theta)
    rows = torch.arange(len(fits.phi), device=theta.device)
    at_best = wide.value(rows, fits.phi[:, None])[:, 0]
    centre = mean.to(theta)
    drawn = (centre + _WIDE * (prior.sample(_DRAWS, generator).to(theta) - centre)).expand(len(rows), -1, -1)
    points = torch.cat([drawn, *(fits.phi[:, None, order] for order in _exchanges(simulator.parameters))], 1)
    value, chosen = wide.value(rows, points), fits.phi[:, None]
    for _ in range(_MODE_STARTS):
        near = ((points[:, :, None] - chosen[:, None]) / scale).abs().amax(3).amin(2) < _ELSEWHERE
        value = torch.where(near, -torch.inf, value)
        top = value.argmax(1)[:, None, None].expand(-1, 1, points.shape[2])
        chosen = torch.cat([chosen, points.gather(1, top)], 1)
    owners = rows.repeat_interleave(_MODE_STARTS)
    found = find_modes(wide, owners, chosen[:, 1:].flatten(0, 1))
    apart = ((found.points - fits.phi[owners]) / scale).abs().amax(1)
    below = torch.where(apart > _ELSEWHERE, at_best[owners] - found.at.value, torch.inf).nan_to_num(torch.inf)
    best: tuple[float, Tensor] | None = None
    for other in _choose_distant_points(found.points / scale, below):
        # Every individual's mode reached from there; individuals that end far below keep their own.
        like_it = find_modes(wide, rows, found.points[other].expand(len(rows), -1))
        good = (like_it.at.value > at_best - _TOO_LOW)[:, None]
        moved = torch.where(good, like_it.points, fits.phi)
        if float((((moved - fits.phi) / scale).abs().amax(1) > _ELSEWHERE).double().mean()) < 0.5:
            continue
        total = float(torch.maximum(like_it.at.value.nan_to_num(-torch.inf), at_best - _TOO_LOW).sum())
        if best is None or total > best[0]:
            best = total, moved
    return None if best is None else replace(fits, phi=best[1], other=None)


def _choose_distant_points(points: Float[Tensor, "B D"], below: Float[Tensor, " B"]) -> list[int]:
    """Positions of a few points that are far from each other, those that are least below a fit first."""
    chosen: list[int] = []
    for place in torch.argsort(below).tolist():
        if len(chosen) == _TRIED or not float(below[place]) < _ABOUT_AS_HIGH:
            break
        if all(float((points[place] - points[one]).abs().max()) > _ELSEWHERE for one in chosen):
            chosen.append(place)
    return chosen


def _exchanges(parameters: ParameterSpace) -> list[list[int]]:
    """Orders in which parameters of the same unit and transform have changed places: one pair, or one pair of each
    unit at once, as amplitudes and rates of two exponentials do. No model need say that it has such a symmetry."""
    kinds = [(parameters[name].unit, parameters[name].transform) for name in parameters.names]
    places = range(len(kinds))
    pairs = [(one, other) for one in places for other in places if one < other and kinds[one] == kinds[other]]
    together = [
        (first, second) for first in pairs for second in pairs if first < second and kinds[first[0]] != kinds[second[0]]
    ]
    found = []
    for chosen in [*((pair,) for pair in pairs), *together][:_EXCHANGES]:
        order = list(places)
        for one, other in chosen:
            order[one], order[other] = order[other], order[one]
        found.append(order)
    return found


def find_prior_conflict(
    population: PopulationModel, here: Float[Tensor, " P"], there: Float[Tensor, " P"], gain: float, source: Source
) -> tuple[str, ...]:
    """Parameters whose typical values make the training prior prefer ``here``, although the log-likelihood is higher by
    ``gain`` at ``there``; empty where it does not, or hardly distinguishes the two."""
    prior = source.prior
    mean, covariance = prior.mean.to(here), prior.covariance.to(here)
    precision = torch.linalg.inv(covariance)
    away = torch.stack([population.mean(here) - mean, population.mean(there) - mean])
    heights = -0.5 * torch.einsum("nd,de,ne->n", away, precision, away)
    if not float(heights[0] - heights[1]) > max(gain, _INDIFFERENT):
        return ()
    sds = away.abs() / covariance.diagonal().sqrt()
    farther = (sds[1] - sds[0]).tolist()
    names = population.parameters.names
    farthest = tuple(name for name, more in zip(names, farther, strict=True) if more > _FARTHER)
    return farthest or (names[max(range(len(names)), key=lambda place: farther[place])],)


def warn_beyond_prior(population: PopulationModel, restarts: tuple[Restart, ...]) -> tuple[str, ...]:
    """A warning for each maximum that the training prior rules out: where it is and how high."""
    parameters, warnings = population.parameters, []
    for restart in restarts:
        if restart.verdict != BEYOND:
            continue
        names = population.unknowns.names
        theta = torch.tensor([restart.unknowns.get(name, 0.0) for name in names], dtype=torch.float64)
        natural = parameters.to_natural(population.mean(theta))
        places = ", ".join(
            f"{name} {float(natural[parameters.index(name)]):.3g}{_unit(parameters[name].unit)}"
            for name in restart.differing
        )
        level = f"higher by about {-2 * restart.below:.2g} in -2 log L" if restart.below < -_LEVEL else "about as high"
        warnings.append(
            f"Another maximum of the likelihood, {level}, lies far from the training prior (typical {places}), which "
            f"decides against it. If it may be what is meant, move or widen the prior of {in_words(restart.differing)} "
            "(prior.parameters) and run again from there."
        )
    return tuple(warnings)


def _unit(unit: str) -> str:
    return "" if unit in ("", "1") else f" {unit}"
