"""Fitting a population model: several starts, EM, exact polish, judged convergence, two kinds of error."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population import checks
from nlme_sbi.population.ascent import Summit, climb, polish
from nlme_sbi.population.boundary import variance_tests
from nlme_sbi.population.exploring import EXPLORED_INDIVIDUALS, Explored, explore
from nlme_sbi.population.individuals import IndividualEstimates, individual_estimates
from nlme_sbi.population.labelling import declared_pairs, in_order, labelling_notes, require_orderable
from nlme_sbi.population.ratio import PriorRatio
from nlme_sbi.population.result import PopulationFit, Restart
from nlme_sbi.population.roles import (
    Estimator,
    FitProgress,
    FollowingEstimator,
    Found,
    PopulationModel,
    PopulationSpecification,
    Redraw,
    Report,
    SearchingEstimator,
    Source,
    WeightedDraws,
)
from nlme_sbi.population.subsets import of_individuals, random_part
from nlme_sbi.population.uncertainty import (
    MonteCarloError,
    covariance_from,
    left_by_expansion,
    likelihood_error,
    monte_carlo_error,
    rough_monte_carlo_error,
)
from nlme_sbi.population.vanished import settled
from nlme_sbi.population.verdicts import degenerate, described, doubted, few_individuals
from nlme_sbi.population.weighting import hessian, rough_information, value_and_gradient
from nlme_sbi.tails import heavy_tails
from nlme_sbi.types import Censoring, Observations, Posterior

logger = logging.getLogger(__name__)

_STANDS_STILL = 0.5  # standard errors between two rounds; Monte-Carlo error is judged apart
_ROUNDS = 10  # of draws that follow the optimum
_PRUDENCE = 1.1  # factor on the rough error of fewer individuals before it sets the draws of all
_LEFT_BY_A_MOVE = 0.05  # standard errors that the expansion in constants may leave in an estimate
_CONVERGED = 0.01  # largest Newton step that may be left, in standard errors
_LABELLINGS = 2  # climbs, the second where the first ended under another labelling than the one asked for
_CONTRADICTED = 0.3  # standard errors between a search's estimate and the summit of the likelihood there


@dataclass(frozen=True, eq=False)
class _Optimum:
    """The optimum on all draws with both kinds of error; ``covariance`` is over the free unknowns."""

    summit: Summit
    information: Float[Tensor, "free free"]
    covariance: Float[Tensor, "free free"] | None
    error: MonteCarloError
    found: Found | None = None  # by an estimator that searches itself

    def worst(self, free: Tensor) -> tuple[float, float]:
        """Largest Monte-Carlo SE and bias in standard errors; infinite where there are none."""
        if self.covariance is None:
            return math.inf, math.inf
        se = torch.ones_like(self.summit.theta).index_copy(0, free, self.covariance.diagonal().sqrt())
        return self.error.worst(se, free)


def fit_population(
    posterior_or_samples: Source,
    observations: Observations,
    population: PopulationSpecification | PopulationModel,
    *,
    generator: torch.Generator,
    estimator: Estimator | None = None,
    parameters: ParameterSpace | None = None,
    starts: int = 5,
    accuracy: float = 0.1,
    progress: Report | None = None,
) -> PopulationFit:
    """Maximum-likelihood estimate of a population model from draws of the individuals' posteriors.

    Deterministic for a given generator state. Starts come from the draws and the training prior alone; they are
    compared on at most 1000 individuals with 500 draws, with at most 30 EM steps and 200 evaluations each. The best is
    polished on everything (at most 200 evaluations and 5 Newton steps) and counts as converged when the Newton step
    that is left is below 0.01 standard errors. While Monte-Carlo SE or bias of an unknown exceed ``accuracy`` standard
    errors, the estimator is asked for better draws. A variance that runs to 0 is set to 0 (its parameter becomes
    constant, which ``variance_tests`` tell) and the rest fitted again.

    Args:
        posterior_or_samples: a posterior to draw from, or draws.
        observations: the individuals' data.
        population: a specification such as :class:`GaussianPopulation`, or a bound model.
        generator: for draws and starts, on the device of the draws.
        estimator: :class:`PriorRatio` with its defaults when left out.
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
    fit = settled(fitted(population), population, fitted)
    for warning in fit.warnings:
        logger.warning(warning)
    return fit


def _fitted(
    posterior_or_samples: Source,
    observations: Observations,
    population: PopulationSpecification | PopulationModel,
    *,
    generator: torch.Generator,
    estimator: Estimator | None,
    parameters: ParameterSpace | None,
    starts: int,
    accuracy: float,
    progress: Report | None,
) -> PopulationFit:
    """One fit, with all of its variances."""
    model = _bound(population, posterior_or_samples, parameters, observations)
    checks.require_enough(model, len(observations))
    chosen: Estimator = PriorRatio() if estimator is None else estimator
    declared = declared_pairs(posterior_or_samples, chosen)
    require_orderable(model, declared)
    say = progress or _silent
    say(FitProgress("draws", 0, 0))
    with torch.no_grad():
        first: WeightedDraws = chosen.prepare(posterior_or_samples, observations, model, generator)
    explored = explore(first, observations.ids, generator, starts=starts, say=say)
    inputs = (posterior_or_samples, observations, generator)
    for _ in range(_LABELLINGS):
        state, optimum, shortage = _climbed(chosen, first, explored, inputs, accuracy=accuracy, say=say)
        wished = in_order(model, optimum.summit.theta)
        if wished is optimum.summit.theta:
            break
        explored = replace(
            explored, best=replace(optimum.summit, theta=wished), information=rough_information(first, wished)
        )
    individuals = individual_estimates(state, optimum.summit.theta)
    said = (
        *few_individuals(model, len(observations)),
        *doubted(explored.restarts),
        *_imprecise(model, optimum, accuracy, shortage),
        *degenerate(model, optimum.summit.theta),
        *checks.low_effective_draws(individuals.ess, state.draws, observations.ids),
        *state.warnings(optimum.summit.theta, observations.ids),
        *_second_opinion(optimum),
        *heavy_tails(individuals.pareto_k, observations.ids),
    )
    fit = _result(state, optimum, explored.restarts, individuals, chosen=chosen, observations=observations, said=said)
    return replace(
        fit,
        labelling=labelling_notes(model, declared, optimum.summit.theta),
        redraw=_redraw(chosen, posterior_or_samples, observations),
    )


def _redraw(chosen: Estimator, source: Source, observations: Observations) -> Redraw | None:
    """How draws for another theta are made; None where draws do not depend on it."""
    return _Following(chosen, source, observations) if isinstance(chosen, FollowingEstimator) else None


@dataclass(frozen=True, eq=False)
class _Following:
    """A class and no closure, so that a fit can be pickled."""

    estimator: FollowingEstimator
    source: Source
    observations: Observations

    def __call__(self, theta: Tensor, previous: WeightedDraws, generator: torch.Generator) -> WeightedDraws:
        return self.estimator.follow(self.source, self.observations, theta, previous, generator)


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
    if isinstance(chosen, SearchingEstimator):
        return _searched(chosen, state, explored, inputs, accuracy=accuracy, say=say)
    state, theta, information = _followed(chosen, state, explored, inputs, accuracy=accuracy, say=say)
    optimum = _optimise(state, theta, information, say)
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


def _searched(
    chosen: SearchingEstimator,
    state: WeightedDraws,
    explored: Explored,
    inputs: tuple[Source, Observations, torch.Generator],
    *,
    accuracy: float,
    say: Report,
) -> tuple[WeightedDraws, _Optimum, str]:
    """The estimator's own estimate, as it is, with likelihood and information from its draws there."""
    source, observations, generator = inputs
    start = explored.best.theta
    found = chosen.search(source, observations, start, state, generator, accuracy=accuracy, report=say)
    say(FitProgress("likelihood", 0, 0))
    with torch.no_grad():
        state = chosen.follow(source, observations, found.theta, state, generator)
    objective, gradient = value_and_gradient(state, found.theta)
    say(FitProgress("curvature", 0, 0, objective))
    information = -hessian(state, found.theta)
    covariance = covariance_from(information)
    step = None
    if covariance is not None:  # a second opinion, which the estimate does not follow
        newton = covariance @ gradient[state.population.unknowns.free.to(gradient.device)]
        step = float((newton.abs() / covariance.diagonal().sqrt()).max())
    error = likelihood_error(state, found.theta, se=found.monte_carlo_se, bias=found.left)
    optimum = _Optimum(Summit(found.theta, objective, 1, step), information, covariance, error, found)
    return state, optimum, found.shortage


def _followed(
    chosen: Estimator,
    state: WeightedDraws,
    explored: Explored,
    inputs: tuple[Source, Observations, torch.Generator],
    *,
    accuracy: float,
    say: Report,
) -> tuple[WeightedDraws, Tensor, Tensor]:
    """For estimators whose draws are made for one theta: draws, optimum on them, draws there, until it stands still.

    On a random part of many individuals first: most of the way does not need them all.
    """
    source, observations, generator = inputs
    theta, information = explored.best.theta, explored.information
    if not isinstance(chosen, FollowingEstimator):
        return state, theta, information
    individuals = len(observations)
    stages = [(torch.arange(individuals), _STANDS_STILL)]
    if individuals > 2 * EXPLORED_INDIVIDUALS:
        stages.insert(0, (random_part(individuals, EXPLORED_INDIVIDUALS, generator), 1.0))
    made_for, lacking = theta, 0.0
    for rows, near in stages:
        some, given = observations, source
        if len(rows) < individuals:
            some, given = observations[rows], of_individuals(source, rows)
        if lacking > 0:  # as many draws as fewer individuals needed: the ratio of the errors is the same
            chosen = chosen.with_draws(math.ceil(state.draws * _times_for(_PRUDENCE * lacking)))
        for done in range(_ROUNDS):
            with torch.no_grad():
                state = chosen.follow(given, some, theta, state, generator)
            information = rough_information(state, theta)
            summit = climb(state, theta, information, tolerance=0.02)
            se = torch.linalg.inv(information).diagonal().sqrt()
            moved = float(((summit.theta - theta)[state.population.unknowns.free].abs() / se).max())
            made_for, theta = theta, summit.theta
            say(FitProgress(f"rounds on {len(rows)} individuals", done + 1, 0, summit.objective))
            if moved < near or chosen.serves(state, theta):
                break
        lacking = rough_monte_carlo_error(state, theta, information) / accuracy
    if lacking > 1 or left_by_expansion(state, made_for, theta, information) > _LEFT_BY_A_MOVE:
        with torch.no_grad():
            better: WeightedDraws | str = ""
            if lacking > 1:
                better = chosen.improve(state, theta, observations, generator, times=max(2, round(_times_for(lacking))))
            state = chosen.follow(source, observations, theta, state, generator) if isinstance(better, str) else better
    return state, theta, rough_information(state, theta)


def _times_for(lacking: float) -> float:
    """How many times as many evenly spread draws would help, whose error falls faster than that of random ones."""
    return min(16.0, math.pow(lacking, 1.6))


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


def _second_opinion(optimum: _Optimum) -> tuple[str, ...]:
    """What a search says of itself, and a sentence where the likelihood at its estimate contradicts it."""
    if optimum.found is None:
        return ()
    step = optimum.summit.step
    if step is None or step < _CONTRADICTED:
        return optimum.found.warnings
    return (
        *optimum.found.warnings,
        f"The likelihood of the draws made at the estimate is highest {step:.2g} standard errors away: the search may "
        "have ended too early. Wish for a smaller fit.accuracy, or compare with estimator=exact.",
    )


def _result(
    state: WeightedDraws,
    optimum: _Optimum,
    restarts: tuple[Restart, ...],
    individuals: IndividualEstimates,
    *,
    chosen: Estimator,
    observations: Observations,
    said: tuple[str, ...],
) -> PopulationFit:
    theta, free = optimum.summit.theta, state.population.unknowns.free.to(optimum.summit.theta.device)
    covariance = torch.zeros((len(theta), len(theta)), dtype=theta.dtype, device=theta.device)
    known = optimum.covariance if optimum.covariance is not None else torch.full((len(free), len(free)), math.nan)
    covariance[free[:, None], free] = known.to(covariance)
    step = optimum.summit.step
    converged = step is not None and step < _CONVERGED and optimum.covariance is not None
    left = "unknown" if step is None else f"{step:.2g} standard errors"
    outcome = f"Converged (largest step left: {left})." if converged else f"NOT converged (largest step left: {left})."
    if optimum.found is not None:
        converged = optimum.found.converged and optimum.covariance is not None
        outcome = f"{optimum.found.message} The likelihood of the draws made there is highest {left} away."
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
        restarts=restarts,
        converged=converged,
        message=f"{outcome} {described(restarts)}",
        warnings=said,
        measurements=_measurements(observations),
        state=state,
        approximation=chosen.approximation,
        variance_tests=variance_tests(state, theta),
    )


def _measurements(observations: Observations) -> int:
    plain = observations.design.observed
    if observations.censoring is not None:
        plain = plain & (observations.censoring == int(Censoring.NONE))
    return int(plain.sum())


def _silent(progress: FitProgress) -> None:
    """Nobody listens."""
