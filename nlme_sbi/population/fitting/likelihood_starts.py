"""Starting values of the population likelihood: from fits of single individuals, not from another objective.

Every individual is fitted alone under the training prior, noise parameters included: its modes, from the network's
draws and from draws of the prior, with Laplace's covariances. What varies starts from their mean and spread, what does
not from their mean weighted by precision, so that constants start at values that the individuals' residuals and modes
suggest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.initialization import choose_mode_starts, likelihood_of
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents, distinct_modes, first_of_each
from nlme_sbi.population.models.interface import MixtureModel, PopulationModel
from nlme_sbi.population.models.specification import GaussianPopulation
from nlme_sbi.population.objective.interface import Source
from nlme_sbi.population.objective.likelihood_point import NoLikelihoodError
from nlme_sbi.types import Observations, TractableSimulator

_PRIOR_DRAWS = 200  # of the training prior, from which single fits may start as well
_NARROW = 0.3  # of the prior's SD: a population about a random individual
_LEAST_SD, _MOST_SD = 0.05, 1.5  # of the prior's SD, of a population to start from
_ABOUT_AS_HIGH = 4.0  # log mass below the highest mode at which another one may be what is right
_LEAST_SPREAD = 0.02  # of the prior's SD that an individual's own uncertainty counts as, at least


@dataclass(frozen=True, eq=False)
class SingleFits:
    """Individuals fitted alone: ``phi (I, D)`` the highest mode, ``variance (I, D)`` about it, unconstrained; and where
    one has another mode that is about as high, every individual's modes that are most like that one (``other``)."""

    phi: Float[Tensor, "I D"]
    variance: Float[Tensor, "I D"]
    other: SingleFits | None = None


@torch.no_grad()
def fit_individuals_alone(
    simulator: TractableSimulator, source: Source, observations: Observations, generator: torch.Generator
) -> SingleFits:
    """The highest mode of every individual under the training prior (its mean and covariance); individuals without any
    are left out.

    Raises:
        NoLikelihoodError: where no individual has a mode, with all positions.
    """
    prior = source.prior
    bound = GaussianPopulation().bind(simulator.parameters)
    theta = bound.from_moments(prior.mean.double(), prior.covariance.double()).to(generator.device)
    joint = likelihood_of(simulator, bound, observations, theta)
    drawn = prior.sample(_PRIOR_DRAWS, generator).to(theta)
    others = drawn.expand(len(observations), -1, -1)
    rows, points = choose_mode_starts(joint, source, observations, generator, others=others)
    found, _ = distinct_modes(joint, rows, points)
    if len(found.rows) == 0:
        raise NoLikelihoodError(
            f"The likelihood of all {len(observations)} individuals is 0 or not finite at every draw of the network "
            "and of the training prior. Check the data's units, and whether the model can produce them (a proportional "
            "error around a prediction of 0 cannot).",
            torch.arange(len(observations)),
        )
    best = found[first_of_each(found.rows)]  # sorted, the best of each individual first
    fits = SingleFits(best.means, best.covariances.diagonal(dim1=1, dim2=2), _other_modes(found, joint.scale))
    for pair in getattr(simulator, "exchangeable", ()):
        fits = _align_labels(fits, *simulator.parameters.indices(pair))
    return fits


def _other_modes(found: LaplaceComponents, scale: Float[Tensor, " D"]) -> SingleFits | None:
    """What a population would be in which the runner-up is right, where that is clearest: two explanations of the same
    data, such as two exponentials under exchanged names, are two maxima of the likelihood to be compared."""
    first = first_of_each(found.rows)
    individuals, place = torch.unique_consecutive(found.rows, return_inverse=True)
    below = (found.log_mass[first][place] - found.log_mass).index_fill(0, first, torch.inf)
    runner_up = int(below.argmin())
    if not float(below[runner_up]) < _ABOUT_AS_HIGH:
        return None
    distance = ((found.means - found.means[runner_up]) / scale).square().sum(1)
    nearest = torch.full((len(individuals),), torch.inf, dtype=distance.dtype, device=distance.device)
    nearest = nearest.scatter_reduce(0, place, distance, "amin")
    chosen = torch.nonzero(distance == nearest[place])[:, 0]
    return SingleFits(found.means[chosen], found.covariances[chosen].diagonal(dim1=1, dim2=2))


def _align_labels(fits: SingleFits, one: int, two: int) -> SingleFits:
    """The same fits with the larger value of two exchangeable parameters first: which of an individual's mirror images
    was found is chance, and a mixture of both labels is no population to start from."""
    swap = (fits.phi[:, one] < fits.phi[:, two])[:, None]
    order = list(range(fits.phi.shape[1]))
    order[one], order[two] = two, one
    return SingleFits(
        torch.where(swap, fits.phi[:, order], fits.phi),
        torch.where(swap, fits.variance[:, order], fits.variance),
        None if fits.other is None else _align_labels(fits.other, one, two),
    )


def likelihood_starts(
    fits: SingleFits,
    source: Source,
    population: PopulationModel,
    *,
    count: int,
    generator: torch.Generator,
) -> list[tuple[str, Float[Tensor, " P"]]]:
    """So many starts, each with a name; values that the user gave are those of the first.

    Args:
        fits: of single individuals.
        source: whose training prior sets the scale.
        population: the bound model.
        count: at least 1.
        generator: chooses individuals.
    """
    prior_mean, prior_sd = source.prior.mean.to(fits.phi), source.prior.covariance.diagonal().sqrt().to(fits.phi)
    mean, sd = _pool(fits, population, prior_sd)
    given = population.unknowns.starts.to(fits.phi)
    base = _from_fits(fits, mean, sd, population)
    is_given = not bool(torch.isnan(given[population.unknowns.free.to(given.device)]).all())
    made = [("the values given" if is_given else "single fits", torch.where(torch.isnan(given), base, given))]
    wide = torch.where(_varies(population, mean), prior_mean, mean)
    made.append(("training prior", population.from_moments(wide, torch.diag((0.5 * prior_sd).square()))))
    narrow = torch.diag((_NARROW * prior_sd).square())
    median = torch.where(_varies(population, mean), fits.phi.quantile(0.5, dim=0), mean)
    made.append(("median of single fits", population.from_moments(median, narrow)))
    if fits.other is not None:
        made.append(("other modes of single fits", start_from(fits.other, source, population)))
    order = torch.randperm(len(fits.phi), generator=generator, device=generator.device).tolist()
    for turn in range(max(0, count - len(made))):
        place = order[turn % len(order)]
        if turn < len(order):
            # What does not vary is common to all: a few measurements of one individual may leave no residual at all.
            alone = torch.where(_varies(population, mean), fits.phi[place], mean)
            made.append(("one individual's fit", population.from_moments(alone, narrow)))
            continue
        drawn = source.prior.sample(1, generator)[0].to(fits.phi)  # individuals are used up
        made.append(("a draw of the training prior", population.from_moments(drawn, narrow)))
    return made[:count]


def start_from(fits: SingleFits, source: Source, population: PopulationModel) -> Float[Tensor, " P"]:
    """Theta with the mean and the spread of single fits."""
    mean, sd = _pool(fits, population, source.prior.covariance.diagonal().sqrt().to(fits.phi))
    return _from_fits(fits, mean, sd, population)


def _from_fits(fits: SingleFits, mean: Tensor, sd: Tensor, population: PopulationModel) -> Float[Tensor, " P"]:
    """Theta with this mean and spread; classes of individuals where single fits cluster."""
    covariance = torch.diag(sd.square())
    if isinstance(population, MixtureModel):
        return population.from_points(fits.phi, mean, covariance)
    return population.from_moments(mean, covariance)


def _pool(
    fits: SingleFits, population: PopulationModel, prior_sd: Float[Tensor, " D"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and SD of the population as single fits have them; constants by precision."""
    variance = fits.variance.clamp_min((_LEAST_SPREAD * prior_sd).square())
    spread = fits.phi.var(0, unbiased=False) + fits.variance.mean(0)
    sd = spread.sqrt().clamp(min=_LEAST_SD * prior_sd, max=_MOST_SD * prior_sd)
    common = (fits.phi / variance).sum(0) / (1 / variance).sum(0)
    return torch.where(_varies(population, common), fits.phi.mean(0), common), sd


def _varies(population: PopulationModel, like: Tensor) -> Tensor:
    varies = torch.zeros(len(population.parameters), dtype=torch.bool, device=like.device)
    varies[list(population.varying)] = True
    return varies
