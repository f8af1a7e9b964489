"""Fits in which a variance has run to 0: such a parameter is made constant, and told as being at its boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from nlme_sbi.population.result import PopulationFit
from nlme_sbi.population.roles import PopulationModel, PopulationSpecification, VariabilitySpecification
from nlme_sbi.population.summary import summarise

_UNSURE = 0.5  # standard error of a log SD from which it may be running to minus infinity
_SHRUNK = 0.7  # shrinkage from which the individuals say next to nothing on their variability
_CLEAR = 2.0  # score above which a variance is not at its boundary, whatever the fit did
_TIED = 0.05  # log-likelihoods this near are equal before Monte-Carlo error


def settled(
    fit: PopulationFit,
    specification: PopulationSpecification | PopulationModel,
    refit: Callable[[PopulationSpecification], PopulationFit],
) -> PopulationFit:
    """The fit with variances that ran to 0 set to 0: such parameters become constant, one after the other.

    A variance has vanished when its log SD is not determined (a standard error above 0.5, or none), the individuals do
    not tell it apart from 0, and, with the parameter constant, the likelihood rises neither with its variance (the
    score is not positive) nor lies below the present one.

    Args:
        fit: as it came.
        specification: what it was made from; bound models cannot be changed and are left alone.
        refit: fits another specification to the same data.
    """
    while isinstance(specification, VariabilitySpecification):
        accepted = None
        for name in _candidates(fit):
            smaller = specification.without_variability(name)
            trial = refit(smaller)
            if _at_boundary(trial, fit, name):
                accepted = (_marked(trial, fit, name), smaller)
                break
        if accepted is None:
            break
        fit, specification = accepted
    return fit


def _marked(trial: PopulationFit, fit: PopulationFit, name: str) -> PopulationFit:
    """The smaller fit, in which this parameter's variance and those that vanished before count as estimated."""
    before = {test.parameter for test in fit.variance_tests if test.estimated}
    tests = (replace(test, estimated=test.parameter in {name, *before}) for test in trial.variance_tests)
    return replace(trial, variance_tests=tuple(tests))


def _candidates(fit: PopulationFit) -> list[str]:
    """Parameters whose variance seems to vanish, the most shrunk first."""
    if len(fit.ids) < 2 or len(fit.population.varying) < 2:
        return []
    found = summarise(fit.population, fit.theta, fit.covariance)
    spread = fit.individuals.mean.std(0)
    names = fit.population.parameters.names
    candidates = []
    for column in fit.population.varying:
        unsure = not float(found.sd_se[column] / found.sd[column]) < _UNSURE
        shrinkage = 1 - float(spread[column] / found.sd[column])
        if not bool(found.sd_fixed[column]) and unsure and not shrinkage < _SHRUNK:
            candidates.append((shrinkage if math.isfinite(shrinkage) else math.inf, names[column]))
    return [name for _, name in sorted(candidates, reverse=True)]


def _at_boundary(trial: PopulationFit, fit: PopulationFit, name: str) -> bool:
    test = next((test for test in trial.variance_tests if test.parameter == name), None)
    if test is None:
        return False
    noise = math.hypot(trial.monte_carlo.objective_se, fit.monte_carlo.objective_se)
    lost = _corrected(fit) - _corrected(trial)
    if lost > _TIED + 3 * noise:
        return False
    # A fit that has not arrived at an inner maximum says nothing against one at the edge; a clear score does.
    return test.slope <= 0 or not (fit.converged or test.z > _CLEAR)


def _corrected(fit: PopulationFit) -> float:
    return fit.objective - fit.monte_carlo.objective_bias
