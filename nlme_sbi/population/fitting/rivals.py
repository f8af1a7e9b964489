"""Competing maxima from multistart: each is refined to convergence, and the highest is the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from nlme_sbi.population.fitting.beyond_prior import warn_beyond_prior
from nlme_sbi.population.fitting.multistart_summary import describe_starts, warn_of_lone_maximum
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.population.results.restart import Restart

_TRIED = 2  # competing maxima that are refined, at most
_APART = 1.0  # standard errors between rivals that are two
_SAME = 0.3  # standard errors between ends that are one maximum
_CLEAR = 0.05  # log-likelihood beside Monte-Carlo error that is a difference


def choose_highest(fit: PopulationFit, climb: Callable[[Mapping[str, float]], PopulationFit]) -> PopulationFit:
    """The fit, or a competing one that ends higher; the restarts record how these ended.

    Args:
        fit: with restarts, some of which ended elsewhere with about the same likelihood.
        climb: fits the same from values of the unknowns by name.
    """
    for place in _find_rivals(fit):
        try:
            rival = climb(fit.restarts[place].unknowns)
        except ValueError:  # the likelihood is 0 on the way there
            continue
        gain, noise = rival.gain_over(fit)
        needed = 0.0
        if rival.converged != fit.converged:
            needed = -noise if rival.converged else noise + _CLEAR
        if gain > needed and not (fit.converged and _distance(fit, rival) < _SAME):
            fit = _with_restarts(rival, _compare_with_new_best(fit.restarts, place, gain), fit)
        else:
            judged = _update_verdict(fit.restarts[place], fit, rival, -gain, is_lower=gain < -noise - _CLEAR)
            restarts = tuple(judged if other == place else one for other, one in enumerate(fit.restarts))
            fit = _with_restarts(fit, restarts, fit)
    return fit


def _update_verdict(
    entry: Restart, fit: PopulationFit, rival: PopulationFit, below: float, *, is_lower: bool
) -> Restart:
    """The restart after its end is known."""
    if is_lower:
        return replace(entry, below=below, verdict="lower", differing=())
    distance = _distance(fit, rival)
    if distance < _SAME:
        return replace(entry, below=below, distance=distance, verdict="same", differing=())
    return replace(entry, below=below)


def _distance(fit: PopulationFit, rival: PopulationFit) -> float:
    """Largest difference of an unknown, in standard errors; infinite where other variances are 0."""
    if rival.population.unknowns.names != fit.population.unknowns.names:
        return math.inf
    moved = (rival.theta - fit.theta).abs() / fit.covariance.diagonal().sqrt()
    return float(moved[fit.population.unknowns.free].max())


def _find_rivals(fit: PopulationFit) -> list[int]:
    """Positions of restarts that ended elsewhere on about the same level, each place once."""
    found: list[int] = []
    for place, restart in enumerate(fit.restarts):
        if restart.verdict != "other point" or restart.exchanged or not restart.unknowns:
            continue
        known = [fit.restarts[other] for other in found]
        if any(abs(restart.distance - one.distance) < _APART and restart.differing == one.differing for one in known):
            continue
        found.append(place)
    return found[:_TRIED]


def _compare_with_new_best(restarts: tuple[Restart, ...], place: int, gain: float) -> tuple[Restart, ...]:
    """The restarts against another best one, that of ``place``, which is ``gain`` above the one before."""
    winner = restarts[place]

    def judged(one: Restart) -> Restart:
        if one is winner or (one.verdict == winner.verdict and one.differing == winner.differing):
            return replace(one, below=0.0, distance=0.0, verdict="same", differing=())
        if one.verdict == "same":
            return replace(one, below=gain, verdict="lower", distance=winner.distance)
        return replace(one, below=one.below + gain)

    return tuple(judged(one) for one in restarts)


def _with_restarts(fit: PopulationFit, restarts: tuple[Restart, ...], before: PopulationFit) -> PopulationFit:
    """The fit with these restarts, in its message and warnings, too."""
    message = fit.message.removesuffix(describe_starts(fit.restarts)).strip()
    outdated = [warning for one in (fit, before) for warning in _restart_warnings(one.population, one.restarts)]
    kept = tuple(warning for warning in fit.warnings if warning not in outdated)
    return replace(
        fit,
        restarts=restarts,
        message=f"{message} {describe_starts(restarts)}".strip(),
        warnings=(*_restart_warnings(fit.population, restarts), *kept),
    )


def _restart_warnings(population: PopulationModel, restarts: tuple[Restart, ...]) -> tuple[str, ...]:
    """Warnings that follow from how the starts ended."""
    return *warn_of_lone_maximum(restarts), *warn_beyond_prior(population, restarts)
