"""Fitting a population model: several starts, EM, exact polish, judged convergence, two kinds of error."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population import checks
from nlme_sbi.population.ascent import Summit, climb, polish
from nlme_sbi.population.auto import Auto, chosen_estimator
from nlme_sbi.population.boundary import variance_tests
from nlme_sbi.population.exploring import Explored, explore
from nlme_sbi.population.individuals import IndividualEstimates, individual_estimates
from nlme_sbi.population.labelling import declared_pairs, in_order, labelling_notes, require_orderable
from nlme_sbi.population.likelihood_search import Task, compare_starts, search_likelihood
from nlme_sbi.population.ratio_check import compare_with_likelihood
from nlme_sbi.population.result import PopulationFit, Restart
from nlme_sbi.population.roles import (
    Estimator,
    FitProgress,
    FollowingEstimator,
    NoDraws,
    PopulationModel,
    PopulationSpecification,
    Redraw,
    Report,
    SearchingEstimator,
    Source,
    WeightedDraws,
    discard,
)
from nlme_sbi.population.trust_region import Point
from nlme_sbi.population.uncertainty import (
    MonteCarloError,
    covariance_from,
    likelihood_error,
    monte_carlo_error,
)
from nlme_sbi.population.vanished import settled
from nlme_sbi.population.verdicts import degenerate, described, doubted, few_individuals
from nlme_sbi.population.verification import Verification, verified
from nlme_sbi.population.weighting import rough_information
from nlme_sbi.tails import heavy_tails
from nlme_sbi.types import Censoring, Observations, Posterior

logger = logging.getLogger(__name__)

_CONVERGED = 0.01  # largest Newton step that may be left, in standard errors
_LABELLINGS = 2  # climbs, the second where the first ended under another labelling than the one asked for
_CONTRADICTED = 0.25  # standard errors between a search's estimate and the maximum of the likelihood there


@dataclass(frozen=True, eq=False)
class _Optimum:
    """The optimum on all draws with both kinds of error; ``covariance`` is over the free unknowns."""

    summit: Summit
    information: Float[Tensor, "free free"]
    covariance: Float[Tensor, "free free"] | None
    error: MonteCarloError

    def worst(self, free: Tensor) -> tuple[float, float]:
        """Largest Monte-Carlo SE and bias in standard errors; infinite where there are none."""
        if self.covariance is None:
            return math.inf, math.inf
        se = torch.ones_like(self.summit.theta).index_copy(0, free, self.covariance.diagonal().sqrt())
        return self.error.worst(se, free)


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What an estimator's way to the estimate ends in, whichever way it is.

    Args:
        state: draws at the estimate.
        optimum: the estimate with both kinds of error.
        restarts: how the starts ended.
        converged: whether the estimate counts as one.
        message: how the fit ended.
        warnings: of the search itself.
        verification: the check on draws that were not climbed on; None where draws are fixed.
        shortage: why the Monte-Carlo error is no smaller.
    """

    state: WeightedDraws
    optimum: _Optimum
    restarts: tuple[Restart, ...]
    converged: bool
    message: str
    warnings: tuple[str, ...] = ()
    verification: Verification | None = None
    shortage: str = ""


def fit_population(
    posterior_or_samples: Source,
    observations: Observations,
    population: PopulationSpecification | PopulationModel,
    *,
    generator: torch.Generator,
    estimator: Estimator | Auto | None = None,
    parameters: ParameterSpace | None = None,
    starts: int = 5,
    accuracy: float = 0.1,
    progress: Report | None = None,
) -> PopulationFit:
    """Maximum-likelihood estimate of a population model from draws of the individuals' posteriors.

    Deterministic for a given generator state. Estimators of a likelihood climb it from several starts in a trust
    region, with draws made anew for every theta (:mod:`nlme_sbi.population.likelihood_search`), and the estimate counts
    as converged only when draws that were not climbed on confirm it (:mod:`nlme_sbi.population.verification`). With the
    prior ratio, whose draws are fixed, starts are compared on at most 1000 individuals with 500 draws, and the best is
    polished on everything until the Newton step that is left is below 0.01 standard errors. While the Monte-Carlo error
    of an unknown exceeds ``accuracy`` standard errors, the estimator is asked for better draws. A variance that runs to
    0 is set to 0 (its parameter becomes constant, which ``variance_tests`` tell) and the rest fitted again.

    Args:
        posterior_or_samples: a posterior to draw from, or draws.
        observations: the individuals' data.
        population: a specification such as :class:`GaussianPopulation`, or a bound model.
        generator: for draws and starts, on the device of the draws.
        estimator: :class:`Auto` when left out: :class:`Exact` where there is a likelihood, else :class:`PriorRatio`.
        parameters: the simulator's parameters; needed only with samples and an unbound specification.
        starts: how many.
        accuracy: wished Monte-Carlo error, in standard errors.
        progress: told how far the fit is.

    Raises:
        ValueError: with the remedy, where names, individuals or draws do not fit, or no start has a finite objective.
    """
    if starts < 1 or accuracy <= 0:
        raise ValueError(f"starts must be at least 1 and accuracy above 0; got {starts} and {accuracy}.")
    fitted = partial(
        _fitted,
        posterior_or_samples,
        observations,
        generator=generator,
        estimator=estimator,
        parameters=parameters,
        starts=starts,
        accuracy=accuracy,
        progress=progress,
    )
    fit = settled(fitted(population), population, lambda smaller, begin: fitted(smaller, begin=begin))
    if not fit.converged:
        logger.warning(fit.message)
    for warning in fit.warnings:
        logger.warning(warning)
    return fit


def _fitted(
    posterior_or_samples: Source,
    observations: Observations,
    population: PopulationSpecification | PopulationModel,
    *,
    generator: torch.Generator,
    estimator: Estimator | Auto | None,
    parameters: ParameterSpace | None,
    starts: int,
    accuracy: float,
    progress: Report | None,
    begin: Mapping[str, float] | None = None,
) -> PopulationFit:
    """One fit, with all of its variances."""
    model = _bound(population, posterior_or_samples, parameters, observations)
    checks.require_enough(model, len(observations))
    chosen, _ = chosen_estimator(Auto() if estimator is None else estimator, posterior_or_samples)
    declared = declared_pairs(posterior_or_samples, chosen)
    require_orderable(model, declared)
    say = progress or discard
    if isinstance(chosen, FollowingEstimator):
        task = Task(chosen, posterior_or_samples, observations, model, generator, say)
        outcome = _by_likelihood(task, starts=starts, accuracy=accuracy, begin=_named(begin, model))
    else:
        inputs = (posterior_or_samples, observations, generator)
        outcome = _on_fixed_draws(chosen, model, inputs, starts=starts, accuracy=accuracy, say=say)
        theta = outcome.optimum.summit.theta
        likelihood = compare_with_likelihood(posterior_or_samples, observations, model, theta, generator)
        outcome = replace(outcome, warnings=(*outcome.warnings, *likelihood))
    state, theta = outcome.state, outcome.optimum.summit.theta
    individuals = individual_estimates(state, theta)
    said = (
        *few_individuals(model, len(observations)),
        *doubted(outcome.restarts),
        *_imprecise(model, outcome.optimum, accuracy, outcome.shortage),
        *degenerate(model, theta),
        *checks.low_effective_draws(individuals.ess, state.draws, observations.ids),
        *state.warnings(theta, observations.ids),
        *outcome.warnings,
        *heavy_tails(individuals.pareto_k, observations.ids),
    )
    fit = _result(outcome, individuals, chosen=chosen, observations=observations, said=said)
    redraw = Redraw(chosen, posterior_or_samples, observations) if isinstance(chosen, FollowingEstimator) else None
    return replace(fit, labelling=labelling_notes(model, declared, theta), redraw=redraw)


def _named(begin: Mapping[str, float] | None, model: PopulationModel) -> Tensor | None:
    """Theta from values by name; None where one of the free unknowns has none."""
    names, table = model.unknowns.names, model.unknowns
    if begin is None or any(names[place] not in begin for place in table.free.tolist()):
        return None
    given = torch.tensor([begin.get(name, math.nan) for name in names], dtype=torch.float64)
    return torch.where(table.fixed, table.starts, given)


def _by_likelihood(task: Task, *, starts: int, accuracy: float, begin: Tensor | None) -> _Outcome:
    """The maximum of a likelihood, checked on draws that it was not climbed on."""
    begin = None if begin is None else begin.to(task.generator.device)
    if isinstance(task.estimator, SearchingEstimator):
        return _searched(task, task.estimator, starts=starts, accuracy=accuracy, begin=begin)
    found = search_likelihood(task, starts=starts, accuracy=accuracy, begin=begin)
    restarts = found.restarts
    wished = in_order(task.population, found.point.theta)
    if wished is not found.point.theta:  # the climb crossed over to the labelling that was not asked for
        found = search_likelihood(task, starts=starts, accuracy=accuracy, begin=wished)
    point, state = found.point, found.point.state
    covariance = _covariance(point)
    task.report(FitProgress("Monte-Carlo error", 0, 0, point.value))
    error = monte_carlo_error(state, point.theta, covariance, point.value)
    optimum = _Optimum(
        Summit(point.theta, point.value, 1, found.verification.score), point.information, covariance, error
    )
    return _Outcome(
        state=state,
        optimum=optimum,
        restarts=restarts,
        converged=found.verification.passed,
        message=found.verification.message(_likelihood_name(task.estimator)),
        verification=found.verification,
        shortage=found.shortage,
    )


def _covariance(point: Point) -> Tensor | None:
    """Of the free unknowns; None where one of them is held or the information is not positive definite."""
    if len(point.active) < len(point.state.population.unknowns.free):
        return None
    return point.covariance


def _likelihood_name(estimator: Estimator) -> str:
    return f"-2 log L ({estimator.approximation})" if estimator.approximation else "-2 log L"


def _searched(
    task: Task, chosen: SearchingEstimator, *, starts: int, accuracy: float, begin: Tensor | None
) -> _Outcome:
    """The estimator's own estimate, as it is, with likelihood, information and check from draws made for it."""
    restarts: tuple[Restart, ...] = ()
    if begin is None:
        begin, restarts = compare_starts(task, starts=starts)
    found = chosen.search(
        task.source,
        task.observations,
        begin,
        NoDraws(task.population),
        task.generator,
        accuracy=accuracy,
        report=task.report,
    )
    task.report(FitProgress("likelihood", 0, 0))
    point = task.point(found.theta)
    individuals = individual_estimates(point.state, point.theta)
    checked = verified(
        point,
        None,
        individuals,
        draws=point.state.draws,
        ids=task.observations.ids,
        reason="" if found.converged else "by the search's own judgement",
        tolerance=_CONTRADICTED,
    )
    covariance = _covariance(point)
    error = likelihood_error(point.state, found.theta, se=found.monte_carlo_se, bias=found.left)
    summit = Summit(found.theta, point.value, 1, checked.score)
    own = f"{found.message} " if checked.passed or not found.converged else ""
    return _Outcome(
        state=point.state,
        optimum=_Optimum(summit, point.information, covariance, error),
        restarts=restarts,
        converged=checked.passed,
        message=f"{own}{_second_opinion(checked, point)}".strip(),
        warnings=found.warnings,
        verification=checked,
        shortage=found.shortage,
    )


def _second_opinion(checked: Verification, point: Point) -> str:
    """What the likelihood of draws made at a search's estimate says of it."""
    if not checked.passed:
        return checked.message()
    return (
        f"The likelihood of draws made there is highest {checked.score:.2g} standard errors away (Monte-Carlo SE "
        f"{float(point.left_error.max()) if len(point.active) else 0.0:.1g})."
    )


def _on_fixed_draws(
    chosen: Estimator,
    model: PopulationModel,
    inputs: tuple[Source, Observations, torch.Generator],
    *,
    starts: int,
    accuracy: float,
    say: Report,
) -> _Outcome:
    """For estimators whose draws do not depend on theta: starts, the best polished on draws that are good enough."""
    source, observations, generator = inputs
    say(FitProgress("draws", 0, 0))
    with torch.no_grad():
        first = chosen.prepare(source, observations, model, generator)
    if isinstance(first, NoDraws):
        raise TypeError(f"estimator {chosen.name} neither prepares draws nor makes them for a theta.")
    explored = explore(first, observations.ids, generator, starts=starts, say=say)
    for _ in range(_LABELLINGS):
        state, optimum, shortage = _climbed(chosen, first, explored, inputs, accuracy=accuracy, say=say)
        wished = in_order(model, optimum.summit.theta)
        if wished is optimum.summit.theta:
            break
        explored = replace(
            explored, best=replace(optimum.summit, theta=wished), information=rough_information(first, wished)
        )
    step = optimum.summit.step
    left = "unknown" if step is None else f"{step:.2g} standard errors"
    converged = step is not None and step < _CONVERGED and optimum.covariance is not None
    return _Outcome(
        state=state,
        optimum=optimum,
        restarts=explored.restarts,
        converged=converged,
        message=f"{'Converged' if converged else 'NOT converged'} (largest step left: {left}).",
        shortage=shortage,
    )


def _climbed(
    chosen: Estimator,
    state: WeightedDraws,
    explored: Explored,
    inputs: tuple[Source, Observations, torch.Generator],
    *,
    accuracy: float,
    say: Report,
) -> tuple[WeightedDraws, _Optimum, str]:
    """The optimum on draws that are good enough, or as good as they get and why they are no better."""
    optimum = _optimise(state, explored.best.theta, explored.information, say)
    free = state.population.unknowns.free
    while not max(optimum.worst(free)) < accuracy:
        if optimum.covariance is None:
            break
        with torch.no_grad():
            times = _how_many_times(max(optimum.worst(free)) / accuracy)
            better = chosen.improve(state, optimum.summit.theta, inputs[1], inputs[2], times=times)
        if isinstance(better, str):
            return state, optimum, better
        state = better
        optimum = _optimise(state, optimum.summit.theta, optimum.information, say)
    return state, optimum, ""


def _how_many_times(ratio: float) -> int:
    """How many times as many draws would bring an error down by ``ratio``: a power of 2, at most 16 at once."""
    return 2 ** min(4, max(1, math.ceil(2 * math.log2(ratio)))) if math.isfinite(ratio) else 2


def _bound(
    population: PopulationSpecification | PopulationModel,
    source: Source,
    parameters: ParameterSpace | None,
    observations: Observations,
) -> PopulationModel:
    if isinstance(population, PopulationModel):
        return population
    if parameters is None and isinstance(source, Posterior):
        parameters = source.parameters
    if parameters is None:
        raise ValueError(
            "Draws alone do not tell the parameters' units and transforms; pass parameters=simulator.parameters."
        )
    return population.bind(parameters, observations)


def _optimise(state: WeightedDraws, theta: Tensor, information: Tensor, say: Report) -> _Optimum:
    """L-BFGS and Newton steps on all draws, then both kinds of error."""
    _, info = torch.linalg.cholesky_ex(information)
    if int(info) != 0:
        information = rough_information(state, theta)
    evaluations = 0

    def watch(objective: float) -> None:
        nonlocal evaluations
        evaluations += 1
        say(FitProgress("polish", evaluations, 0, objective))

    summit = climb(state, theta, information, tolerance=0.02, watch=watch)
    say(FitProgress("curvature", 0, 0, summit.objective))
    summit, information = polish(state, summit.theta)
    covariance = covariance_from(information)
    say(FitProgress("Monte-Carlo error", 0, 0, summit.objective))
    error = monte_carlo_error(state, summit.theta, covariance, summit.objective)
    return _Optimum(summit, information, covariance, error)


def _imprecise(model: PopulationModel, optimum: _Optimum, accuracy: float, shortage: str) -> tuple[str, ...]:
    """Sentences on Monte-Carlo error above what was wished, and on missing standard errors."""
    free = model.unknowns.free
    if optimum.covariance is None:
        return (
            "The observed information is not positive definite: there are no standard errors, and some unknown is not "
            "identified by these data or this is not a maximum. Fix or drop a parameter, or use more draws.",
        )
    largest, bias = optimum.worst(free)
    if max(largest, bias) < accuracy:
        return ()
    se = optimum.covariance.diagonal().sqrt()
    relative = torch.maximum(optimum.error.se[free], optimum.error.bias[free].abs()).nan_to_num(math.inf) / se
    name = model.unknowns.names[int(free[int(relative.argmax())])]
    return (
        f"Monte-Carlo error is above {accuracy:g} standard errors: SE up to {largest:.2g}, bias up to {bias:.2g} "
        f"(worst: {name}). No more draws: {shortage}.",
    )


def _result(
    outcome: _Outcome,
    individuals: IndividualEstimates,
    *,
    chosen: Estimator,
    observations: Observations,
    said: tuple[str, ...],
) -> PopulationFit:
    state, optimum = outcome.state, outcome.optimum
    theta, free = optimum.summit.theta, state.population.unknowns.free.to(optimum.summit.theta.device)
    covariance = torch.zeros((len(theta), len(theta)), dtype=theta.dtype, device=theta.device)
    known = optimum.covariance if optimum.covariance is not None else torch.full((len(free), len(free)), math.nan)
    covariance[free[:, None], free] = known.to(covariance)
    return PopulationFit(
        population=state.population,
        ids=observations.ids,
        estimator=chosen.name,
        absolute=chosen.absolute,
        theta=theta,
        covariance=covariance,
        objective=optimum.summit.objective,
        monte_carlo=optimum.error,
        individuals=individuals,
        draws=state.draws,
        restarts=outcome.restarts,
        converged=outcome.converged,
        message=f"{outcome.message} {described(outcome.restarts)}".strip(),
        warnings=said,
        measurements=_measurements(observations),
        state=state,
        approximation=chosen.approximation,
        variance_tests=variance_tests(state, theta),
        verification=outcome.verification,
    )


def _measurements(observations: Observations) -> int:
    plain = observations.design.observed
    if observations.censoring is not None:
        plain = plain & (observations.censoring == int(Censoring.NONE))
    return int(plain.sum())
