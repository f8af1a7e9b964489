"""Starting values of a fit: always from the draws and the training prior, never from a truth.

Posteriors with several modes (exchangeable rates) make the moments of all draws a saddle between the labellings. The
later starts therefore break symmetry: every individual's draws are weighted towards one anchor, a random draw of a
random individual.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import MixtureModel, PopulationModel
from nlme_sbi.types import Prior

_LEAST_SD = 1e-3  # of the pooled SD of the draws: no start is narrower


def starting_points(
    phi: Float[Tensor, "I S D"], prior: Prior, population: PopulationModel, *, count: int, generator: torch.Generator
) -> list[tuple[str, Float[Tensor, " P"]]]:
    """Starting values, each with a name for its source.

    1. moments of all draws; values given in the model's ``start`` take their places,
    2. moments of the draws weighted by 1/prior, so that the training prior's pull is undone,
    3. moments of the individuals' posterior means,
    4. and further: draws weighted towards a random anchor.

    Args:
        phi: draws in any float type.
        prior: density that the draws' posteriors were trained under.
        population: the bound model.
        count: how many, at least 1.
        generator: for the anchors.
    """
    phi = phi.double()
    equal = torch.full(phi.shape[:2], 1 / phi.shape[1], dtype=phi.dtype, device=phi.device)
    pooled = phi.flatten(0, 1).std(0)
    made = [("moments of the draws", _with_given_starts(_moments(phi, equal, population, pooled), population))]
    if count > 1:
        undone = torch.softmax(-prior.log_prob(phi), 1)
        # A few extreme draws must not dominate: no draw weighs more than 20 average ones.
        undone = undone.clamp_max(20 / phi.shape[1])
        weights = undone / undone.sum(1, keepdim=True)
        made.append(("draws freed from the prior", _moments(phi, weights, population, pooled)))
    if count > 2:
        means = phi.mean(1, keepdim=True)
        made.append(("individual means", _moments(means, equal[:, :1] * phi.shape[1], population, pooled)))
    for _ in range(count - 3):
        weights = torch.softmax(-0.5 * _distance(phi, pooled, generator), 1)
        made.append(("draws near a random one", _moments(phi, weights, population, pooled)))
    return made[:count]


def _distance(phi: Tensor, pooled: Tensor, generator: torch.Generator) -> Float[Tensor, "I S"]:
    """Squared distance to a random draw, in units of half the pooled SDs."""
    place = torch.randint(phi.shape[0] * phi.shape[1], (1,), generator=generator, device=generator.device)
    anchor = phi.flatten(0, 1)[place.to(phi.device)]
    return ((phi - anchor) / (0.5 * pooled)).square().sum(-1)


def _moments(phi: Tensor, weights: Tensor, population: PopulationModel, pooled: Tensor) -> Float[Tensor, " P"]:
    """Theta from weighted moments; constants start at the precision-weighted mean of the individuals' draws."""
    individuals = len(phi)
    mean = (weights[..., None] * phi).sum((0, 1)) / individuals
    centred = phi - mean
    covariance = torch.einsum("is,isd,ise->de", weights, centred, centred) / individuals
    # Keeps a start positive definite, whatever the draws are.
    covariance = covariance + torch.diag((_LEAST_SD * pooled).square())
    if population.constant:
        constant = list(population.constant)
        mean = mean.index_copy(
            0,
            torch.tensor(constant, dtype=torch.int64, device=mean.device),
            _precision_weighted_mean(phi[..., constant], weights),
        )
    if isinstance(population, MixtureModel):
        return population.from_points((weights[..., None] * phi).sum(1) / weights.sum(1)[:, None], mean, covariance)
    return population.from_moments(mean, covariance)


def _precision_weighted_mean(phi: Float[Tensor, "I S W"], weights: Float[Tensor, "I S"]) -> Float[Tensor, " W"]:
    """Mean of the individuals' means, each weighted by its precision (per parameter)."""
    means = (weights[..., None] * phi).sum(1)
    variances = (weights[..., None] * (phi - means[:, None]).square()).sum(1)
    if bool((variances <= 0).any()):
        return means.mean(0)
    return (means / variances).sum(0) / (1 / variances).sum(0)


def _with_given_starts(theta: Tensor, population: PopulationModel) -> Tensor:
    given = population.unknowns.starts.to(theta)
    return torch.where(torch.isnan(given), theta, given)
