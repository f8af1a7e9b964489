"""Fits in which a variance is estimated at 0: such a parameter is made constant and reported as on the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from nlme_sbi.numerics.pareto_k import UNRELIABLE
from nlme_sbi.population.fitting.beyond_prior import warn_beyond_prior
from nlme_sbi.population.fitting.multistart_summary import describe_starts
from nlme_sbi.population.models.interface import (
    LOG_SD,
    MEAN,
    PopulationModel,
    PopulationSpecification,
    Unknown,
    VariabilitySpecification,
)
from nlme_sbi.population.results.derived_quantities import summarise
from nlme_sbi.population.results.fit_result import PopulationFit

_TINY = 0.02  # of the training prior's SD: below it a variance is examined
_UNSURE = 0.5  # standard error of a log SD from which the SD may be 0
_SHRUNK = 0.7  # shrinkage from which the data say next to nothing on the variability
_HALF_SHRUNK = 0.5  # the same where the draws have degenerated, which makes individual means noisy
_CLEAR = 2.0  # score above which a variance is not at its boundary, whatever the fit did
_LEVEL, _ERRORS = 0.25, 2.0  # score up to which a variance gains next to nothing, and Monte-Carlo errors of it
_TIED = 0.05  # log-likelihoods this near are equal before Monte-Carlo error
_TRACE = 0.1  # of the variance with which one individual's data determine a parameter: a small variance to start from
_FEW = 30  # individuals up to which a second maximum at 0 is looked for
_TRIED = 2  # candidates that are refitted, at most, before a variance counts as inside


@dataclass(frozen=True)
class Refit:
    """How a fit is made again.

    Args:
        specification: of the population, with fewer variances maybe.
        begin: values of the unknowns by name, to go on from.
        kept: parameters whose SD stays in the search however small it becomes.
    """

    specification: PopulationSpecification
    begin: Mapping[str, float]
    kept: tuple[str, ...] = ()


def fix_zero_variances(
    fit: PopulationFit,
    specification: PopulationSpecification | PopulationModel,
    refit: Callable[[Refit], PopulationFit],
) -> PopulationFit:
    """The fit with variances estimated at 0 held fixed at 0: such parameters become constant, all those that the search
    saw go to 0 together, others one at a time. Fits with fewer variances start from the estimates of the one before.

    A variance is examined where its SD is tiny and not precisely estimated, where its log SD is not identified and the
    individuals do not distinguish it from 0, or where the draws have degenerated: as a density narrows, draws that were
    made for a wider one become spikes, on which small numbers look precise. It is 0 when, with the parameter constant,
    the likelihood does not increase with its variance (the score is not positive). Where it does increase, a fit
    continues with a small variance that stays in the search, and 0 is the estimate only if that gains nothing. A
    converged fit must also be no better than the one without the variance; for one that has not converged, a score that
    is not clearly positive is enough.

    Args:
        fit: the first one, with all variances.
        specification: what it was made from; bound models cannot be changed and are left alone.
        refit: fits the same data again.
    """
    kept: tuple[str, ...] = ()
    while isinstance(specification, VariabilitySpecification):
        accepted: tuple[PopulationFit, PopulationSpecification] | None = None
        for names in _candidates(fit):
            try:
                trial = refit(Refit(_without(specification, names), _values(fit), kept))
                while trial.verification is not None and trial.verification.vanishing:
                    names = (*names, *trial.verification.vanishing)
                    trial = refit(Refit(_without(specification, names), _values(trial), kept))
            except ValueError:  # without these variances the likelihood is 0, so they are not 0
                continue
            smaller = _without(specification, names)
            rising = tuple(name for name in names if not _is_at_boundary(trial, fit, name))
            if not rising:
                accepted = (_mark_as_estimated(trial, fit, names), smaller)
                break
            if fit.verification is not None and fit.verification.vanishing:
                held = tuple(name for name in names if name not in rising)
                wider = _without(specification, held)
                begin = {**_values(trial), **_small_variances(trial, rising)}
                followed = refit(Refit(wider, begin, (*kept, *rising)))
                gain, noise = followed.gain_over(trial)
                if gain < (-noise if followed.converged else _TIED + noise):
                    accepted = (_mark_as_estimated(trial, fit, names), smaller)
                else:
                    kept = (*kept, *rising)
                    accepted = (_mark_as_estimated(followed, fit, held), wider)
                break
        if accepted is None:
            break
        fit, specification = accepted
    return fit


def _without(specification: PopulationSpecification, names: tuple[str, ...]) -> PopulationSpecification:
    for name in names:
        if isinstance(specification, VariabilitySpecification):
            specification = specification.without_variability(name)
    return specification


def _values(fit: PopulationFit) -> dict[str, float]:
    return dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))


def _value_variances(fit: PopulationFit) -> dict[str, float]:
    """Squared standard error of every constant's value, times the number of individuals: about the variance with
    which one individual's data determine it."""
    variances = {}
    for column in fit.population.constant:
        parameter = fit.population.parameters.names[column]
        place = fit.population.unknowns.entry(MEAN, parameter)
        if place is not None:
            variances[parameter] = len(fit.ids) * float(fit.covariance[place, place])
    return variances


def _small_variances(trial: PopulationFit, names: tuple[str, ...]) -> dict[str, float]:
    """Small log SDs that the data can just detect, to continue from; no correlations."""
    variances = _value_variances(trial)
    return {
        Unknown(LOG_SD, name).name: 0.5 * math.log(_TRACE * variances[name])
        for name in names
        if variances.get(name, 0.0) > 0
    }


def _mark_as_estimated(trial: PopulationFit, fit: PopulationFit, names: tuple[str, ...]) -> PopulationFit:
    """The smaller fit, in which these parameters' variances and those that vanished before count as estimated; how the
    starts ended is known from the larger one."""
    before = {test.parameter for test in fit.variance_tests if test.estimated}
    tests = (replace(test, estimated=test.parameter in {*names, *before}) for test in trial.variance_tests)
    if trial.restarts:
        return replace(trial, variance_tests=tuple(tests))
    message = f"{trial.message} {describe_starts(fit.restarts)}".strip()
    warnings = (*warn_beyond_prior(fit.population, fit.restarts), *trial.warnings)
    return replace(trial, variance_tests=tuple(tests), restarts=fit.restarts, message=message, warnings=warnings)


def _candidates(fit: PopulationFit) -> list[tuple[str, ...]]:
    """Parameters whose variance may be 0, the most doubtful first: those that the search saw go to 0, together and
    alone, then those whose estimates suggest it."""
    seen = () if fit.verification is None else fit.verification.vanishing
    alone = [(name,) for name in seen]
    together = [tuple(seen)] if len(seen) > 1 else []
    if fit.verification is not None and fit.converged and not _have_draws_collapsed(fit):
        # A maximum that was verified lies inside; where it is flat there may be a higher one at 0.
        return [*together, *alone, *((name,) for name in _flat_sds(fit) if name not in seen)]
    return [*together, *alone, *((name,) for name in _doubtful_parameters(fit) if name not in seen)]


def _flat_sds(fit: PopulationFit) -> list[str]:
    """Parameters whose SD is poorly determined by few individuals, the least determined first."""
    if len(fit.ids) > _FEW:
        return []
    found = summarise(fit.population, fit.theta, fit.covariance)
    names = fit.population.parameters.names
    open_ones = [
        (float(found.sd_se[column] / found.sd[column]), names[column])
        for column in fit.population.varying
        if not bool(found.sd_fixed[column]) and float(found.sd_se[column]) > _UNSURE * float(found.sd[column])
    ]
    return [name for _, name in sorted(open_ones, reverse=True)][:_TRIED]


def _doubtful_parameters(fit: PopulationFit) -> list[str]:
    """Parameters whose estimates suggest a variance of 0."""
    # Fixed draws carry no information once no parameter varies.
    if len(fit.ids) < 2 or len(fit.population.varying) < (2 if fit.verification is None else 1):
        return []
    found = summarise(fit.population, fit.theta, fit.covariance)
    spread = fit.individuals.mean.std(0)
    names = fit.population.parameters.names
    tiny_ones, collapsed = _tiny_sds(fit), _have_draws_collapsed(fit)
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


def _tiny_sds(fit: PopulationFit) -> list[str]:
    """Parameters whose SD is next to nothing beside the training prior's."""
    _, prior = fit.state.training_draws()
    reference = prior.covariance.diagonal().sqrt().to(fit.theta)
    sd = fit.population.covariance(fit.theta).diagonal().sqrt()
    return [
        fit.population.parameters.names[column]
        for column in fit.population.varying
        if sd[column] < _TINY * reference[column]
    ]


def _have_draws_collapsed(fit: PopulationFit) -> bool:
    """Whether the weights of most individuals rest on single draws."""
    shapes = fit.individuals.pareto_k
    return shapes is not None and float((shapes > UNRELIABLE).double().mean()) > 0.5


def _is_at_boundary(trial: PopulationFit, fit: PopulationFit, name: str) -> bool:
    test = next((test for test in trial.variance_tests if test.parameter == name), None)
    if test is None:
        return False
    if fit.verification is not None and fit.verification.vanishing:
        if test.slope <= 0:
            return True
        # The variance would gain half of the square of its slope in standard errors, as they are where all individuals
        # are equally informative: 0.03 at the level.
        z = test.slope * _value_variances(trial).get(name, math.inf) * math.sqrt(2 / len(trial.ids))
        return z < max(_LEVEL, 0.0 if math.isnan(test.monte_carlo_se) else _ERRORS * test.monte_carlo_se)
    if not fit.converged or _have_draws_collapsed(fit):
        return test.slope <= 0 or test.z < _CLEAR
    lost, noise = fit.gain_over(trial)
    if fit.verification is not None:
        return trial.converged and test.slope <= 0 and lost < 0
    return test.slope <= 0 and (name in _tiny_sds(fit) or lost < _TIED + noise)
