"""Fitting a population model: estimation, variances at 0, and warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nlme_sbi.compute.progress import Report, discard
from nlme_sbi.individual_model.noise import NoiseModel
from nlme_sbi.numerics.jacobians import jacobian
from nlme_sbi.numerics.pareto_k import heavy_tails
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.estimators.auto import Auto, choose_estimator
from nlme_sbi.population.estimators.interface import (
    Estimator,
    EstimatorChoice,
    Redraw,
    SelfOptimizingEstimator,
    ThetaDependentEstimator,
)
from nlme_sbi.population.fitting.beyond_prior import warn_beyond_prior
from nlme_sbi.population.fitting.fixed_draws_fit import fit_fixed_draws
from nlme_sbi.population.fitting.label_switching import declared_pairs, labelling_notes, require_orderable
from nlme_sbi.population.fitting.likelihood_fit import fit_likelihood
from nlme_sbi.population.fitting.likelihood_search import STARTS_ON, Task
from nlme_sbi.population.fitting.multistart_summary import (
    describe_starts,
    warn_of_few_individuals,
    warn_of_lone_maximum,
    warn_of_singular_covariance,
)
from nlme_sbi.population.fitting.outcome import Optimum, Outcome
from nlme_sbi.population.fitting.ratio.ratio_check import compare_with_likelihood
from nlme_sbi.population.fitting.ratio.self_check import check_by_simulation
from nlme_sbi.population.fitting.rivals import choose_highest
from nlme_sbi.population.fitting.zero_variances import fix_zero_variances
from nlme_sbi.population.models.interface import MixtureModel, PopulationModel, PopulationSpecification, ShapedModel
from nlme_sbi.population.objective import draw_checks as checks
from nlme_sbi.population.objective.individuals import IndividualEstimates, individual_estimates
from nlme_sbi.population.objective.interface import Source
from nlme_sbi.population.objective.standard_errors import describe_unidentified, name_weakest
from nlme_sbi.population.objective.variance_tests import variance_tests
from nlme_sbi.population.results.fit_result import PopulationFit
from nlme_sbi.posteriors import Posterior
from nlme_sbi.types import Observations

logger = logging.getLogger(__name__)


def fit_population(
    posterior_or_samples: Source,
    observations: Observations,
    population: PopulationSpecification | PopulationModel,
    *,
    generator: torch.Generator,
    estimator: Estimator | EstimatorChoice | None = None,
    parameters: ParameterSpace | None = None,
    starts: int = 5,
    accuracy: float = 0.1,
    self_check: int = 0,
    progress: Report | None = None,
) -> PopulationFit:
    """Maximum-likelihood estimate of a population model from draws of the individuals' posteriors.

    Deterministic for a given generator state. Estimators of a likelihood maximise it from several starting values in a
    trust region, with draws made anew for every theta (:mod:`nlme_sbi.population.fitting.likelihood_search`), and the
    estimate counts as converged only when draws that the search did not use confirm it
    (:mod:`nlme_sbi.population.objective.verification`). With the prior ratio, whose draws are fixed, starts are
    compared on at most 1000 individuals with 500 draws, and the best is refined on all data until the remaining Newton
    step is below 0.01 standard errors. While the Monte-Carlo error of an unknown exceeds ``accuracy`` standard
    errors, the estimator is asked for better draws. A variance estimated at 0 is held fixed at 0 (its parameter
    becomes constant, which ``variance_tests`` report) and the rest is fitted again.

    Args:
        posterior_or_samples: a posterior to draw from, or draws.
        observations: the individuals' data.
        population: a specification such as :class:`GaussianPopulation`, or a bound model.
        generator: for draws and starts, on the device of the draws.
        estimator: :class:`Auto` when left out: :class:`Exact` where there is a likelihood, else :class:`PriorRatio`.
        parameters: the simulator's parameters; needed only with samples and an unbound specification.
        starts: how many.
        accuracy: target Monte-Carlo error, in standard errors.
        self_check: individuals, at most, that are simulated from the estimate, by which an estimator without a
            likelihood measures its bias and takes it off (:mod:`nlme_sbi.population.fitting.ratio.self_check`); 0 for
            none.
        progress: called with how far the fit is.

    Raises:
        ValueError: with the remedy, where names, individuals or draws do not fit, or no start has a finite objective.
    """
    if starts < 1 or accuracy <= 0:
        raise ValueError(f"starts must be at least 1 and accuracy above 0; got {starts} and {accuracy}.")
    fitted = partial(
        _fit_once,
        posterior_or_samples,
        observations,
        generator=generator,
        estimator=estimator,
        parameters=parameters,
        starts=starts,
        accuracy=accuracy,
        progress=progress,
    )

    def settle(found: PopulationFit) -> PopulationFit:
        return fix_zero_variances(
            found, population, lambda again: fitted(again.specification, begin=again.begin, kept=again.kept)
        )

    fit = settle(fitted(population))
    were_all_there = len(observations) <= STARTS_ON  # otherwise starts are compared on some individuals only
    if fit.verification is not None and were_all_there and not isinstance(estimator, SelfOptimizingEstimator):
        fit = choose_highest(fit, lambda begin: settle(fitted(population, begin=begin)))
    if self_check:
        chosen, _ = choose_estimator(Auto() if estimator is None else estimator, posterior_or_samples)
        if fit.redraw is not None:
            raise ValueError(
                f"fit.self_check measures the bias of an estimator without a likelihood, and {chosen.name} maximises "
                "the likelihood itself. Pass fit.self_check=0, or estimator=prior_ratio."
            )
        fit = check_by_simulation(
            fit,
            posterior_or_samples,
            observations,
            chosen,
            most=self_check,
            generator=generator,
            report=progress or discard,
        )
    if not fit.converged:
        logger.warning(fit.message)
    for warning in fit.warnings:
        logger.warning(warning)
    return fit


def _fit_once(
    posterior_or_samples: Source,
    observations: Observations,
    population: PopulationSpecification | PopulationModel,
    *,
    generator: torch.Generator,
    estimator: Estimator | EstimatorChoice | None,
    parameters: ParameterSpace | None,
    starts: int,
    accuracy: float,
    progress: Report | None,
    begin: Mapping[str, float] | None = None,
    kept: tuple[str, ...] = (),
) -> PopulationFit:
    """One fit, with all of its variances; SDs of the parameters in ``kept`` stay in the search however small they
    become."""
    model = _bind(population, posterior_or_samples, parameters, observations)
    require_enough_individuals(model, len(observations))
    chosen, _ = choose_estimator(Auto() if estimator is None else estimator, posterior_or_samples)
    _require_suitable(chosen, model)
    declared = declared_pairs(posterior_or_samples, chosen)
    require_orderable(model, declared)
    report = progress or discard
    if isinstance(chosen, ThetaDependentEstimator):
        task = Task(chosen, posterior_or_samples, observations, model, generator, report, kept)
        outcome = fit_likelihood(task, starts=starts, accuracy=accuracy, begin=_theta_from_values(begin, model))
    else:
        inputs = (posterior_or_samples, observations, generator)
        outcome = fit_fixed_draws(chosen, model, inputs, starts=starts, accuracy=accuracy, report=report)
        theta = outcome.optimum.maximum.theta
        likelihood = compare_with_likelihood(posterior_or_samples, observations, model, theta, generator)
        outcome = replace(outcome, warnings=(*outcome.warnings, *likelihood))
    state, theta = outcome.state, outcome.optimum.maximum.theta
    individuals = individual_estimates(state, theta)
    warnings = (
        *warn_of_few_individuals(model, len(observations)),
        *warn_of_lone_maximum(outcome.restarts),
        *warn_beyond_prior(model, outcome.restarts),
        *_imprecision_warnings(model, outcome.optimum, accuracy, outcome.shortage),
        *warn_of_singular_covariance(model, theta),
        *(model.warn(theta, outcome.optimum.covariance, len(observations)) if isinstance(model, ShapedModel) else ()),
        *checks.warn_of_few_effective_draws(individuals.ess, state.draws, observations.ids),
        *state.warnings(theta, observations.ids),
        *outcome.warnings,
        *heavy_tails(individuals.pareto_k, observations.ids),
    )
    with_constant = _gaussian_measurements(chosen, posterior_or_samples, observations)
    fit = _result(outcome, individuals, with_constant, chosen=chosen, observations=observations, warnings=warnings)
    redraw = Redraw(chosen, posterior_or_samples, observations) if isinstance(chosen, ThetaDependentEstimator) else None
    return replace(fit, labelling=labelling_notes(model, declared, theta), redraw=redraw)


def _theta_from_values(begin: Mapping[str, float] | None, model: PopulationModel) -> Tensor | None:
    """Theta from values by name; None where one of the free unknowns has none."""
    names, table = model.unknowns.names, model.unknowns
    if begin is None or any(names[place] not in begin for place in table.free.tolist()):
        return None
    given = torch.tensor([begin.get(name, math.nan) for name in names], dtype=torch.float64)
    return torch.where(table.fixed, table.starts, given)


def _bind(
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
            "Draws alone do not carry the parameters' units and transforms; pass parameters=simulator.parameters."
        )
    return population.bind(parameters, observations)


def _require_suitable(chosen: Estimator, model: PopulationModel) -> None:
    """Refuse to approximate individuals of a mixture by their modes: between two classes there is neither one mode nor
    two, and the approximation has no smooth maximum (measured: information that is not positive definite).

    Raises:
        ValueError: with the estimators that fit it.
    """
    if chosen.approximation and isinstance(model, MixtureModel):
        raise ValueError(
            f"estimator {chosen.name} does not fit a mixture: individuals between two classes are not described by "
            "modes. Use estimator=exact or estimator=saem."
        )


def _imprecision_warnings(model: PopulationModel, optimum: Optimum, accuracy: float, shortage: str) -> tuple[str, ...]:
    """Warnings about Monte-Carlo error above the target, and about missing standard errors."""
    free = model.unknowns.free
    if optimum.covariance is None:
        names = name_weakest(optimum.information, [model.unknowns.labels[place] for place in free.tolist()])
        found = describe_unidentified(names)
        return (
            f"{found[0].upper()}{found[1:]}, or this is not a maximum. There are no standard errors. Fix or drop a "
            "parameter (population.fixed, population.constant; of a correlation, population.covariance), or use more "
            "draws.",
        )
    largest, bias = optimum.worst(free)
    if max(largest, bias) < accuracy:
        return ()
    se = optimum.covariance.diagonal().sqrt()
    relative = torch.maximum(optimum.error.se[free], optimum.error.bias[free].abs()).nan_to_num(math.inf) / se
    name = model.unknowns.labels[int(free[int(relative.argmax())])]
    # Draws are added for the SE; the bias, from halves of the draws, is known no better than the SE.
    remedy = f"No more draws: {shortage}." if shortage else f"Make it smaller with fit.accuracy={accuracy / 2:g}."
    return (
        f"Monte-Carlo error is above {accuracy:g} standard errors: SE up to {largest:.2g}, bias up to {bias:.2g} "
        f"(worst: {name}). {remedy}",
    )


def _result(
    outcome: Outcome,
    individuals: IndividualEstimates,
    gaussian_measurements: int,
    *,
    chosen: Estimator,
    observations: Observations,
    warnings: tuple[str, ...],
) -> PopulationFit:
    state, optimum = outcome.state, outcome.optimum
    theta, free = optimum.maximum.theta, state.population.unknowns.free.to(optimum.maximum.theta.device)
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
        objective=optimum.maximum.objective,
        monte_carlo=optimum.error,
        individuals=individuals,
        draws=state.draws,
        restarts=outcome.restarts,
        converged=outcome.converged,
        message=f"{outcome.message} {describe_starts(outcome.restarts)}".strip(),
        warnings=warnings,
        measurements=int(observations.uncensored.sum()),
        gaussian_measurements=gaussian_measurements,
        state=state,
        approximation=chosen.approximation,
        variance_tests=variance_tests(state, theta),
        verification=outcome.verification,
    )


def _gaussian_measurements(chosen: Estimator, source: Source, observations: Observations) -> int:
    """Number of measurements with a normal density, whose constant the OFV leaves out (not counts, not Student's t)."""
    simulator = getattr(chosen, "simulator", None) or getattr(source, "simulator", None)
    noise, numbers = getattr(simulator, "noise", None), observations.uncensored.sum((0, 1)).tolist()
    if not isinstance(noise, NoiseModel):  # a simulator's own likelihood says nothing of it
        return sum(numbers)
    return sum(number for signal, number in enumerate(numbers) if noise.of_signal(signal).has_normal_constant)


def require_enough_individuals(model: PopulationModel, individuals: int) -> None:
    """Refuse models without a maximum: variances from one individual, a full covariance from too few."""
    varying, block = len(model.varying), _largest_block(model)
    correlated = block > 1
    needed = block + 1 if correlated else 2 if _estimates_variances(model) else 1
    if individuals < needed:
        raise ValueError(
            f"{individuals} individuals cannot determine the {'covariance' if correlated else 'variance'} of {varying} "
            f"varying parameters: at least {needed} are needed. Give more data, fix SDs, or keep parameters constant "
            f"(all of them: 'population.constant=[{','.join(model.parameters.names)}]', a plain regression)"
            + (", or use population.covariance=diagonal." if correlated else ".")
        )


def _largest_block(model: PopulationModel) -> int:
    """The most parameters that one is correlated with, itself included, read off the model at an arbitrary theta."""
    return int((model.covariance(_arbitrary_theta(model)) != 0).sum(1).max())


def _estimates_variances(model: PopulationModel) -> bool:
    """Whether a variance between individuals moves with an unknown that is estimated, by the model's derivatives."""
    slopes = jacobian(lambda theta: model.covariance(theta).diagonal(), _arbitrary_theta(model))
    return bool((slopes[:, model.unknowns.free] != 0).any())


def _arbitrary_theta(model: PopulationModel) -> Tensor:
    """A theta at which nothing is 0 by chance."""
    return torch.full((len(model.unknowns),), 0.1, dtype=torch.float64)
