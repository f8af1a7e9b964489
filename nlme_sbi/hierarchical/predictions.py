"""Parameters and measurements that a fitted hierarchy predicts: of individuals that were measured, and of new ones.

New individuals are drawn from the population, with the groups and covariates that they have; a combination of known
levels needs nothing else, and a level that was never seen (another device, another plate) has an effect that is drawn
from the distribution of those that were. Individuals that were measured are draws of their own posterior, weighed to
the population.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.compute.random_streams import Stream, seeded
from nlme_sbi.hierarchical.model import HierarchicalModel, Individuals
from nlme_sbi.hierarchical.population import AmortizedDraws, FittedPopulation, draw_individuals
from nlme_sbi.hierarchical.posterior.refinement import draw_refined, refine_posteriors
from nlme_sbi.hierarchical.residuals import CorrelatedResiduals
from nlme_sbi.individual_model.noise.correlated import residual_correlation
from nlme_sbi.types import Design

REFINE_STEPS = 60
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class MeasuredParameters:
    """Parameters ``phi (I, K, D)`` of individuals given their series and the population, equally weighted, and how many
    of the draws that they were chosen from were effective, ``(I,)``."""

    phi: Float[Tensor, "I K D"]
    effective_draws: Float[Tensor, " I"]


def log_weights_given(
    population: FittedPopulation, individuals: Individuals, made: AmortizedDraws
) -> Float[Tensor, "I K"]:
    """Log weights of amortised draws under the population, whose mean is ``p(y_i | population)``."""
    placed = population.regressors.place(individuals.observations.design)
    return made.log_ratio + population.log_prob(made.own, placed, made.active)


def log_densities(
    population: FittedPopulation, individuals: Individuals, made: AmortizedDraws
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """``log p(y_i)`` under the priors alone, and ``log p(y_i | population)``, by importance sampling, nats."""
    count = made.own.shape[1]
    vague = torch.where(made.active[:, None], -0.5 * made.own.double().square() - _HALF_LOG_TWO_PI, 0.0).sum(-1)
    given = log_weights_given(population, individuals, made)
    return tuple(torch.logsumexp(one, 1) - math.log(count) for one in (made.log_ratio + vague, given))  # type: ignore[return-value]


def draws_near(
    model: HierarchicalModel,
    population: FittedPopulation | None,
    individuals: Individuals,
    draws: int,
    *seed: int,
    refine_steps: int = REFINE_STEPS,
    priors: bool = False,
) -> AmortizedDraws:
    """Draws of every individual that serve the population: half of them from a posterior that was refined.

    Args:
        model: trained.
        population: of its individuals; None for the priors alone.
        individuals: that were measured, fitted or not.
        draws: of each.
        seed: of the draws.
        refine_steps: of each individual's own posterior; 0 takes the network's alone.
        priors: whether a third part is refined to the priors, where densities under these are wanted, too.
    """
    if refine_steps == 0:
        return draw_individuals(model, individuals, draws, *seed)
    targets = (population, None) if priors else (population,)
    refined = [refine_posteriors(model, target, individuals, refine_steps, *seed) for target in targets]
    return draw_refined(model, individuals, refined, draws, *seed)


def predictive_log_likelihood(
    model: HierarchicalModel,
    population: FittedPopulation,
    individuals: Individuals,
    draws: int,
    *seed: int,
    refine_steps: int = REFINE_STEPS,
) -> Float[Tensor, " I"]:
    """``log p(y_i | population)`` of individuals that may be new, by importance sampling; as :func:`draws_near`."""
    made = draws_near(model, population, individuals, draws, *seed, refine_steps=refine_steps)
    return log_densities(population, individuals, made)[1]


def measured_parameters(
    model: HierarchicalModel,
    population: FittedPopulation,
    individuals: Individuals,
    draws: int,
    *seed: int,
    proposals: int = 1000,
    refine_steps: int = REFINE_STEPS,
) -> MeasuredParameters:
    """Draws of individuals' posteriors given the population, by resampling.

    Args:
        model: trained.
        population: of its individuals.
        individuals: that were measured.
        draws: that are kept of each.
        seed: of the proposals and of who is kept.
        proposals: of each that they are chosen from; at least ``draws``.
        refine_steps: as :func:`draws_near`.
    """
    made = draws_near(model, population, individuals, max(draws, proposals), *seed, refine_steps=refine_steps)
    shares = torch.softmax(log_weights_given(population, individuals, made), 1)
    phi = resampled(made.phi, shares, draws, seeded("cpu", *seed, Stream.HIERARCHICAL_RESAMPLING))
    return MeasuredParameters(phi, 1 / shares.square().sum(1))


def resampled(
    values: Float[Tensor, "I K D"], shares: Float[Tensor, "I K"], count: int, generator: torch.Generator
) -> Float[Tensor, "I n D"]:
    """``count`` of the weighted draws, equally weighted, in an order that means nothing: systematic resampling, by
    which a draw of the share *w* comes the floor or the ceiling of *w* times ``count`` times."""
    individuals = len(values)
    start = torch.rand((individuals, 1), generator=generator, dtype=torch.float64)
    heights = (start + torch.arange(count, dtype=torch.float64)) / count
    cumulative = shares.double().cumsum(1)
    cumulative[:, -1] = 1.0 + 1e-9
    rows = torch.searchsorted(cumulative, heights)
    rows = rows.gather(1, torch.argsort(torch.rand(rows.shape, generator=generator), 1))
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))


@torch.no_grad()
def new_parameters(
    model: HierarchicalModel,
    population: FittedPopulation,
    design: Design,
    draws: int,
    *seed: int,
    typical: bool = False,
) -> Float[Tensor, "I K D"]:
    """Parameters of new individuals with the groups and covariates of this design.

    Every draw has one value of what is shared, of the coefficients and of the effects of new levels, the same for all
    individuals.

    Args:
        model: trained.
        population: of its individuals.
        design: of the new individuals.
        draws: of each.
        seed: of all draws.
        typical: leave out what differs between individuals of equal groups and covariates.

    Raises:
        ValueError: a level that effects of the model belong to was not among the data.
    """
    generator = seeded("cpu", *seed)
    codes = model.hierarchy.codes_of(design.groups, len(design.times))
    own = population.sample(population.regressors.place(design), draws, generator, typical=typical).float()
    shared = torch.zeros((draws, 0))
    if model.shared_posterior is not None:
        noise = torch.randn((1, draws, len(model.hierarchy.shared)), generator=generator)
        shared = model.shared_posterior().draw(noise)[0]
    # Draw k of the shared with draw k of each individual.
    return model.parameters_of(codes, own[:, :, None], shared)[:, :, 0]


@torch.no_grad()
def predict_new(
    model: HierarchicalModel, population: FittedPopulation, individuals: Individuals, draws: int, *seed: int
) -> Float[Tensor, "I K T C"]:
    """Measurements of new individuals with the groups, covariates and times of these, whose values are not used."""
    design = individuals.observations.design
    phi = new_parameters(model, population, design, draws, *seed)
    return draw_measurements(model, phi, design, seeded("cpu", *seed, Stream.HIERARCHICAL_MEASUREMENTS))


def replace_failed(solved: Bool[Tensor, "I K"]) -> Int[Tensor, "I K"]:
    """For every draw of each individual the place of the draw that stands for it: itself where the model was
    ``solved``, else one of the individual's others in turn; itself where none was."""
    order = torch.argsort((~solved).int(), dim=1, stable=True)
    count = solved.sum(1, keepdim=True)
    every = torch.arange(solved.shape[1], device=solved.device).expand_as(solved)
    others = order.gather(1, every % count.clamp_min(1))
    return torch.where(solved | (count == 0), every, others)


@torch.no_grad()
def draw_measurements(
    model: HierarchicalModel, phi: Float[Tensor, "I K D"], design: Design, generator: torch.Generator
) -> Float[Tensor, "I K T C"]:
    """New measurements at these parameters, with residuals that are correlated in time where the model's are.

    Draws at which the model cannot be solved are replaced as :func:`replace_failed` does.
    """
    return solve_and_measure(model, phi, design, generator)[0]


@torch.no_grad()
def solve_and_measure(
    model: HierarchicalModel, phi: Float[Tensor, "I K D"], design: Design, generator: torch.Generator
) -> tuple[Float[Tensor, "I K T C"], Bool[Tensor, "I K"]]:
    """:func:`draw_measurements`, and at which of the draws the model was solved."""
    prediction = model.simulator.predict(phi, design)
    solved = torch.isfinite(prediction).flatten(2).all(2)
    place = replace_failed(solved)
    prediction = prediction.gather(1, place[..., None, None].expand_as(prediction))
    phi = phi.gather(1, place[..., None].expand_as(phi))
    noise, parameters = model.simulator.noise, model.simulator.noise_parameters(phi, design)
    if not isinstance(model.residuals, CorrelatedResiduals):
        return noise.sample(prediction, parameters, generator=generator), solved
    # The noise's own draws, with their order in time: standard normals of the wanted correlation in their place.
    sd = noise.standard_deviation(prediction, parameters)
    standard = torch.randn(prediction.shape, generator=generator, dtype=torch.float64)
    correlated = torch.empty_like(standard)
    times = design.times.double()
    time, nugget = model.residuals.correlation_time.double(), model.residuals.nugget.double()
    shared = bool((times == times[:1]).all())
    for row in range(1 if shared else len(times)):
        rows = slice(None) if shared else slice(row, row + 1)
        # Repeated times (padding, replicates) share all but the nugget.
        factor = torch.linalg.cholesky(residual_correlation(times[row], time, nugget))
        correlated[rows] = torch.einsum("cts,iksc->iktc", factor, standard[rows])
    return noise.inverse(noise.transform(prediction) + sd * correlated.to(sd)), solved
