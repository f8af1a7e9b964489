"""Fits in which a variance has run to 0: such a parameter is made constant, and told as being at its boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from nlme_sbi.population.result import PopulationFit
from nlme_sbi.population.roles import PopulationModel, PopulationSpecification, VariabilitySpecification
from nlme_sbi.population.summary import summarise
from nlme_sbi.population.verdicts import described
from nlme_sbi.tails import UNRELIABLE

_TINY = 0.02  # of the training prior's SD: below it a variance is looked at
_UNSURE = 0.5  # standard error of a log SD from which it may be running to minus infinity
_SHRUNK = 0.7  # shrinkage from which the individuals say next to nothing on their variability
_HALF_SHRUNK = 0.5  # the same where the draws have collapsed, which makes individual means noisy
_CLEAR = 2.0  # score above which a variance is not at its boundary, whatever the fit did
_UNCLEAR = 0.5  # score, where the climb itself went to 0, up to which it did so rightly: Monte-Carlo error
_TIED = 0.05  # log-likelihoods this near are equal before Monte-Carlo error
_TRIED = 2  # candidates that are refitted, at most, before a variance counts as inside


def settled(
    fit: PopulationFit,
    specification: PopulationSpecification | PopulationModel,
    refit: Callable[[PopulationSpecification, Mapping[str, float]], PopulationFit],
) -> PopulationFit:
    """The fit with variances that ran to 0 set to 0: such parameters become constant, all that the search saw run to 0
    together, others one after the other. Fits with fewer variances go on from the estimates of the one before.

    A variance is looked at where its SD is tiny and not sharply told, where
    its log SD is not determined and the individuals do not tell it
    apart from 0, or where the draws have collapsed: as a density narrows, the draws that were made for a wider one
    become spikes, on which small numbers look precise. It has vanished when, with the parameter constant, the
    likelihood does not rise with its variance (the score is not positive). A fit that can be trusted must also be no
    better than the one without; for one that cannot, a score that is not clearly positive is enough.

    Args:
        fit: as it came.
        specification: what it was made from; bound models cannot be changed and are left alone.
        refit: fits another specification to the same data, from values of the unknowns by name.
    """
    while isinstance(specification, VariabilitySpecification):
        accepted = None
        for names in _candidates(fit):
            smaller: PopulationSpecification = specification
            for name in names:
                if isinstance(smaller, VariabilitySpecification):
                    smaller = smaller.without_variability(name)
            begin = dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))
            try:
                trial = refit(smaller, begin)
            except ValueError:  # without these variances the data have no likelihood: they are there
                continue
            if all(_at_boundary(trial, fit, name) for name in names):
                accepted = (_marked(trial, fit, names), smaller)
                break
        if accepted is None:
            break
        fit, specification = accepted
    return fit


def _marked(trial: PopulationFit, fit: PopulationFit, names: tuple[str, ...]) -> PopulationFit:
    """The smaller fit, in which these parameters' variances and those that vanished before count as estimated; how the
    starts ended is known from the larger one."""
    before = {test.parameter for test in fit.variance_tests if test.estimated}
    tests = (replace(test, estimated=test.parameter in {*names, *before}) for test in trial.variance_tests)
    if trial.restarts:
        return replace(trial, variance_tests=tuple(tests))
    message = f"{trial.message} {described(fit.restarts)}".strip()
    return replace(trial, variance_tests=tuple(tests), restarts=fit.restarts, message=message)


def _candidates(fit: PopulationFit) -> list[tuple[str, ...]]:
    """Parameters whose variance seems to vanish, the most doubtful first: those that the search saw run to 0, together
    and alone, then those whose numbers look like it."""
    seen = () if fit.verification is None else fit.verification.vanishing
    alone = [(name,) for name in seen]
    together = [tuple(seen)] if len(seen) > 1 else []
    if fit.verification is not None and fit.converged and not _collapsed(fit):
        return [*together, *alone]  # a maximum that was verified lies inside
    return [*together, *alone, *((name,) for name in _doubtful(fit) if name not in seen)]


def _doubtful(fit: PopulationFit) -> list[str]:
    """Parameters whose variance looks as if it had run to 0."""
    # Fixed draws say nothing once none of their parameters varies.
    if len(fit.ids) < 2 or len(fit.population.varying) < (2 if fit.verification is None else 1):
        return []
    found = summarise(fit.population, fit.theta, fit.covariance)
    spread = fit.individuals.mean.std(0)
    names = fit.population.parameters.names
    tiny_ones, collapsed = _tiny(fit), _collapsed(fit)
    candidates = []
    for column in fit.population.varying:
        if bool(found.sd_fixed[column]):
            continue
        sd = float(found.sd[column])
        shrinkage = 1 - float(spread[column]) / sd if sd > 0 else 1.0
        unsure = not float(found.sd_se[column]) < _UNSURE * sd
        tiny = names[column] in tiny_ones
        shrunk = not shrinkage < (_HALF_SHRUNK if collapsed else _SHRUNK)
        doubtful = unsure or collapsed
        # Small against the training prior is no reason by itself: a sharply estimated small variance is one.
        if tiny + shrunk + doubtful >= 2:
            candidates.append((tiny, shrinkage if math.isfinite(shrinkage) else 1.0, names[column]))
    return [name for _, _, name in sorted(candidates, reverse=True)][:_TRIED]


def _tiny(fit: PopulationFit) -> list[str]:
    """Parameters whose SD is next to nothing beside the training prior's."""
    _, prior = fit.state.training_draws()
    reference = prior.covariance.diagonal().sqrt().to(fit.theta)
    sd = fit.population.covariance(fit.theta).diagonal().sqrt()
    return [
        fit.population.parameters.names[column]
        for column in fit.population.varying
        if sd[column] < _TINY * reference[column]
    ]


def _collapsed(fit: PopulationFit) -> bool:
    """Whether the weights of most individuals rest on single draws."""
    shapes = fit.individuals.pareto_k
    return shapes is not None and float((shapes > UNRELIABLE).double().mean()) > 0.5


def _at_boundary(trial: PopulationFit, fit: PopulationFit, name: str) -> bool:
    test = next((test for test in trial.variance_tests if test.parameter == name), None)
    if test is None:
        return False
    if fit.verification is not None and name in fit.verification.vanishing:
        # The likelihood was still rising on the way to 0, where its derivative in the variance may be told anew.
        return test.slope <= 0 or test.z < _UNCLEAR
    if not fit.converged or _collapsed(fit):
        return test.slope <= 0 or test.z < _CLEAR
    noise = math.hypot(trial.monte_carlo.objective_se, fit.monte_carlo.objective_se)
    lost = _corrected(fit) - _corrected(trial)
    return test.slope <= 0 and (name in _tiny(fit) or lost < _TIED + 3 * noise)


def _corrected(fit: PopulationFit) -> float:
    return fit.objective - fit.monte_carlo.objective_bias
