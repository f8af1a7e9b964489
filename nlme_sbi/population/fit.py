"""Fitting a population model: several starts, EM, exact polish, judged convergence, two kinds of error."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population import checks
from nlme_sbi.population.ascent import Summit, climb, polish, rise
from nlme_sbi.population.individuals import individual_estimates
from nlme_sbi.population.ratio import PriorRatio
from nlme_sbi.population.result import PopulationFit, Restart
from nlme_sbi.population.roles import (
    Estimator,
    FitProgress,
    FollowingEstimator,
    PopulationModel,
    PopulationSpecification,
    Report,
    Source,
    WeightedDraws,
)
from nlme_sbi.population.starts import starting_points
from nlme_sbi.population.uncertainty import (
    MonteCarloError,
    covariance_from,
    monte_carlo_error,
    rough_monte_carlo_error,
)
from nlme_sbi.population.verdicts import compared, described, doubted
from nlme_sbi.population.weighting import contributions, rough_information
from nlme_sbi.types import Censoring, Observations, Posterior, PosteriorSamples

logger = logging.getLogger(__name__)

_EXPLORED_INDIVIDUALS = 1000  # starts are compared on so many individuals
_EXPLORED_DRAWS = 500  # with so many draws
_STANDS_STILL = 0.5  # standard errors between two rounds; Monte-Carlo error is judged apart
_ROUNDS = 10  # of draws that follow the optimum
_PRUDENCE = 1.1  # factor on the rough error of fewer individuals before it sets the draws of all
_LEFT_BY_A_MOVE = 0.05  # standard errors
_CONVERGED = 0.01  # largest Newton step that may be left, in standard errors
_SINGULAR = 0.999  # correlation above which a covariance counts as singular


@dataclass(frozen=True, eq=False)
class _Explored:
    """Where the starts ended; ``information`` is rough, for all individuals."""

    best: Summit
    restarts: tuple[Restart, ...]
    information: Float[Tensor, "free free"]


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
    errors, the estimator is asked for better draws.

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
    model = _bound(population, posterior_or_samples, parameters)
    _require_enough(model, len(observations))
    chosen: Estimator = PriorRatio() if estimator is None else estimator
    say = progress or _silent
    say(FitProgress("draws", 0, 0))
    with torch.no_grad():
        state: WeightedDraws = chosen.prepare(posterior_or_samples, observations, model, generator)
    explored = _explore(state, observations.ids, generator, starts=starts, say=say)
    state, theta, information = _followed(
        chosen, state, explored, (posterior_or_samples, observations, generator), accuracy=accuracy, say=say
    )
    optimum = _optimise(state, theta, information, say)
    shortage = ""
    while not max(optimum.worst(model.unknowns.free)) < accuracy:
        if optimum.covariance is None:
            break
        with torch.no_grad():
            times = _how_many_times(max(optimum.worst(model.unknowns.free)) / accuracy)
            better = chosen.improve(state, optimum.summit.theta, observations, generator, times=times)
        if isinstance(better, str):
            shortage = better
            break
        state = better
        optimum = _optimise(state, optimum.summit.theta, optimum.information, say)
    said = (
        *_few(model, len(observations)),
        *doubted(explored.restarts),
        *_imprecise(model, optimum, accuracy, shortage),
        *_degenerate(model, optimum),
        *checks.low_effective_draws(
            individual_estimates(state, optimum.summit.theta).ess, state.draws, observations.ids
        ),
        *state.warnings(optimum.summit.theta, observations.ids),
    )
    for warning in said:
        logger.warning(warning)
    return _result(state, optimum, explored.restarts, chosen=chosen, observations=observations, said=said)


def _followed(
    chosen: Estimator,
    state: WeightedDraws,
    explored: _Explored,
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
    if individuals > 2 * _EXPLORED_INDIVIDUALS:
        shuffled = torch.randperm(individuals, generator=generator, device=generator.device)
        stages.insert(0, (shuffled[:_EXPLORED_INDIVIDUALS].sort().values.cpu(), 1.0))
    moved, lacking = math.inf, 0.0
    for rows, near in stages:
        some = observations if len(rows) == individuals else observations[rows]
        given = source
        if isinstance(source, PosteriorSamples) and len(rows) < individuals:
            given = replace(source, phi=source.phi[rows], log_q=source.log_q[rows])
        if lacking > 0:  # as many draws as fewer individuals needed: the ratio of the errors is the same
            chosen = chosen.with_draws(math.ceil(state.draws * _times_for(lacking)))
        for done in range(_ROUNDS):
            with torch.no_grad():
                state = chosen.follow(given, some, theta, state, generator)
            information = rough_information(state, theta)
            summit = climb(state, theta, information, tolerance=0.02)
            se = torch.linalg.inv(information).diagonal().sqrt()
            moved = float(((summit.theta - theta)[state.population.unknowns.free].abs() / se).max())
            theta = summit.theta
            say(FitProgress(f"rounds on {len(rows)} individuals", done + 1, 0, summit.objective))
            if moved < near or chosen.serves(state, theta):
                break
        lacking = _PRUDENCE * rough_monte_carlo_error(state, theta, information) / accuracy
    # What draws made for another theta leave in the estimate is of second order in how far that is.
    lacking /= _PRUDENCE  # the errors that count are judged again
    if lacking > 1 or moved**2 / (2 * math.sqrt(individuals)) > _LEFT_BY_A_MOVE:
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
    population: PopulationSpecification | PopulationModel, source: Source, parameters: ParameterSpace | None
) -> PopulationModel:
    if isinstance(population, PopulationModel):
        return population
    if parameters is None and isinstance(source, Posterior):
        parameters = source.parameters
    if parameters is None:
        raise ValueError(
            "Draws alone do not tell the parameters' units and transforms; pass parameters=simulator.parameters."
        )
    return population.bind(parameters)


def _require_enough(model: PopulationModel, individuals: int) -> None:
    """Refuse what has no maximum: variances from one individual, a full covariance from too few."""
    varying = len(model.varying)
    correlated = "partial_correlation" in model.unknowns.transforms
    free_sd = bool((~model.unknowns.fixed).sum() > len(model.parameters) - int(model.unknowns.fixed.sum()))
    needed = varying + 1 if correlated else 2 if free_sd else 1
    if individuals < needed:
        raise ValueError(
            f"{individuals} individuals cannot tell the {'covariance' if correlated else 'variance'} of {varying} "
            f"varying parameters: at least {needed} are needed. Give more data, fix SDs, keep parameters constant"
            + (", or use population.covariance=diagonal." if correlated else ".")
        )


def _few(model: PopulationModel, individuals: int) -> tuple[str, ...]:
    unknowns = len(model.unknowns.free)
    if individuals >= unknowns:
        return ()
    return (
        f"{individuals} individuals for {unknowns} unknowns: estimates of SDs and their errors are not to be trusted. "
        "Use a simpler population model.",
    )


def _explore(
    state: WeightedDraws, ids: tuple[str, ...], generator: torch.Generator, *, starts: int, say: Report
) -> _Explored:
    """Run every start on a part of the data that is large enough to compare them."""
    part = _part(state, generator)
    phi, prior = part.training_draws()
    ends: list[tuple[str, Summit | None]] = []
    points = starting_points(phi, prior, state.population, count=starts, generator=generator)
    for done, (name, theta) in enumerate(points):
        say(FitProgress("starts", done, len(points), _highest(ends)))
        finite = bool(torch.isfinite(contributions(part, theta)).all())
        end = rise(part, theta) if finite else None
        ends.append((name, end if end is not None and math.isfinite(end.objective) else None))
    reached = [end for _, end in ends if end is not None]
    if not reached:
        raise ValueError(_nowhere(part, points[0][1], ids))
    best = max(reached, key=lambda end: end.objective)
    information = rough_information(part, best.theta)
    restarts = compared(ends, best, part, torch.linalg.inv(information))
    return _Explored(best, restarts, information * (state.individuals / part.individuals))


def _part(state: WeightedDraws, generator: torch.Generator) -> WeightedDraws:
    if state.individuals <= _EXPLORED_INDIVIDUALS and state.draws <= _EXPLORED_DRAWS:
        return state
    chosen = torch.arange(state.individuals, device=generator.device)
    if state.individuals > _EXPLORED_INDIVIDUALS:
        shuffled = torch.randperm(state.individuals, generator=generator, device=generator.device)
        chosen = shuffled[:_EXPLORED_INDIVIDUALS].sort().values
    stride = max(1, state.draws // _EXPLORED_DRAWS)
    return state.part(chosen, slice(0, stride * _EXPLORED_DRAWS, stride))


def _highest(ends: list[tuple[str, Summit | None]]) -> float | None:
    return max((end.objective for _, end in ends if end is not None), default=None)


def _nowhere(state: WeightedDraws, theta: Tensor, ids: tuple[str, ...]) -> str:
    broken = torch.nonzero(~torch.isfinite(contributions(state, theta)))[:, 0]
    names = f" First: {checks.named(ids, broken)}." if len(ids) == state.individuals else ""
    return (
        f"The objective is not finite at any start, for {len(broken)} of {state.individuals} individuals.{names} "
        "A fixed or constant value may lie outside the training prior, or the draws are degenerate."
    )


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


def _degenerate(model: PopulationModel, optimum: _Optimum) -> tuple[str, ...]:
    """A sentence on a covariance between individuals that has become singular."""
    varying = list(model.varying)
    omega = model.covariance(optimum.summit.theta)[varying][:, varying]
    sd = omega.diagonal().sqrt()
    correlation = (omega / (sd[:, None] * sd)).abs().tril(-1)
    places = torch.nonzero(correlation > _SINGULAR).tolist()
    if not places:
        return ()
    names = [model.parameters.names[column] for column in varying]
    pairs = ", ".join(f"{names[column]} and {names[row]}" for row, column in places)
    return (
        f"The covariance between individuals is singular: {pairs} are perfectly correlated. Use "
        "population.covariance=diagonal, or keep one of them constant.",
    )


def _result(
    state: WeightedDraws,
    optimum: _Optimum,
    restarts: tuple[Restart, ...],
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
    left = "unknown" if step is None else f"{step:.1g} standard errors"
    outcome = f"Converged (largest step left: {left})." if converged else f"NOT converged (largest step left: {left})."
    return PopulationFit(
        population=state.population,
        ids=observations.ids,
        estimator=chosen.name,
        absolute=chosen.absolute,
        theta=theta,
        covariance=covariance,
        objective=optimum.summit.objective,
        monte_carlo=optimum.error,
        individuals=individual_estimates(state, theta),
        draws=state.draws,
        restarts=restarts,
        converged=converged,
        message=f"{outcome} {described(restarts)}",
        warnings=said,
        measurements=_measurements(observations),
        state=state,
    )


def _measurements(observations: Observations) -> int:
    plain = observations.design.observed
    if observations.censoring is not None:
        plain = plain & (observations.censoring == int(Censoring.NONE))
    return int(plain.sum())


def _silent(progress: FitProgress) -> None:
    """Nobody listens."""
