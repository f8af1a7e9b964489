r"""The prior that the next simulations are drawn from, once a population has been fitted.

.. math:: p_r = (1 - \varepsilon) \, N(\beta, c \, (\Omega + \operatorname{Var} \hat\beta) + F) + \varepsilon \, p_0

on the unconstrained scale. Simulations then lie where the individuals lie, so that the network is sharpest there; the
part :math:`p_0`, the prior before, keeps every weight :math:`p(\phi | \theta) / p_r(\phi)` bounded wherever it was
bounded before, and lets the next fit go elsewhere.

What lies beyond the present prior has hardly been simulated, so that of an estimate that goes there only its direction
is believed: in a round :math:`\beta` moves by two SDs of the present prior and :math:`\Omega` grows to its variance, at
most. Otherwise rounds run away where data leave a tail open: under a prior that is narrower than the population weights
are unbounded, and the fit overshoots.

Floors F keep apart what would be too narrow to learn from: a twentieth of the SD of :math:`p_0`, and, for parameters
that do not vary, 0.3 times the variance that one individual's data leave. A prior that is narrower than that teaches
the network nothing of the parameter, while its small errors add up over individuals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.priors import MixturePrior, UniformPrior
from nlme_sbi.population.models.interface import (
    MEAN,
    ExchangeableModel,
    PopulationModel,
    covariances_of,
    means_of,
)
from nlme_sbi.types import Design, Prior

_FLOOR = 0.05  # of the SD of the broad prior
_OF_ONE_INDIVIDUAL = 0.3  # of the variance that one individual's data leave
_LEAST_WIDTH = 1.5  # factor on the population's variance from which weights stay bounded
_WIDEST = 2.0  # SDs of the broad prior, whatever a poor fit says
_FARTHEST_STEP = 2.0  # SDs of the present prior, of the next centre from its mean
_FARTHEST = 4.0  # SDs of the broad prior, of the centre from its mean
_UNINFORMED = 0.1  # share of its precision that data must add to a prior, else they are taken to say little
_TARGET = "_target_"


@dataclass(frozen=True)
class PriorSettings:
    """How wide the next prior is.

    Args:
        width: factor on the population's variance.
        broad: share of the simulations that the prior before keeps.
    """

    width: float = 3.0
    broad: float = 0.2

    def __post_init__(self) -> None:
        if not _LEAST_WIDTH <= self.width <= 20:
            raise ValueError(
                f"refine.width is a factor on the population's variance, between 1.5 (weights stay bounded) and 20; "
                f"got {self.width:g}."
            )
        if not 0.01 <= self.broad <= 0.9:
            raise ValueError(
                f"refine.broad is the share of simulations from the prior before, between 0.01 and 0.9; got "
                f"{self.broad:g}."
            )


@dataclass(frozen=True, eq=False)
class FittedPopulation:
    """What the next prior is made of.

    Args:
        population: the bound model.
        theta: ``(P,)`` its estimate.
        covariance: ``(P, P)`` of the estimate; NaN where not known.
        design: of the data.
        individual_variance: ``(D,)`` median variance of an individual's posterior under the present prior.
        prior_mean: ``(D,)`` of the present prior about the population.
        prior_variance: ``(D,)`` of it.
    """

    population: PopulationModel
    theta: Float[Tensor, " P"]
    covariance: Float[Tensor, "P P"]
    design: Design
    individual_variance: Float[Tensor, " D"]
    prior_mean: Float[Tensor, " D"]
    prior_variance: Float[Tensor, " D"]


def simulation_prior(
    fitted: FittedPopulation,
    broad: Prior,
    section: Mapping[str, Any],
    settings: PriorSettings,
    *,
    exchanged: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The section of the next prior, in plain numbers.

    Args:
        fitted: the population and what is known of individuals.
        broad: the prior before any refinement.
        section: of the configuration that describes it.
        settings: width and share.
        exchanged: pairs of parameters whose exchanged image is simulated from as well.
    """
    centre, spread = _moments(fitted, broad, settings.width)
    names = fitted.population.parameters.names
    images = [(centre, spread)]
    for pair in exchanged:
        order = _exchange([names.index(name) for name in pair], len(names))
        images += [(mean[order], covariance[order][:, order]) for mean, covariance in images]
    known, shares = _parts_of(section)
    refined = (1 - settings.broad) / len(images)
    return {
        _TARGET: "nlme_sbi.MixturePrior",
        "components": [*(_component(names, mean, covariance, broad) for mean, covariance in images), *known],
        "weights": [*(refined for _ in images), *(settings.broad * share for share in shares)],
    }


def refined_moments(prior: Prior, broad: Prior) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and variance of the present prior about the population: of its first part where it was refined."""
    about = prior.components[0] if isinstance(prior, MixturePrior) and prior is not broad else prior
    return about.mean.double(), about.covariance.diagonal().double()


def _moments(fitted: FittedPopulation, broad: Prior, width: float) -> tuple[Tensor, Tensor]:
    """Centre and covariance of the part about the population."""
    population, theta = fitted.population, fitted.theta
    means = means_of(population, theta, fitted.design)
    between = means.T.cov(correction=0).reshape(means.shape[1], -1) if len(means) > 1 else 0.0
    spread = covariances_of(population, theta, fitted.design).mean(0) + between
    present = fitted.prior_variance.to(theta)
    spread = width * (_no_wider(spread, present) + _error_of_means(fitted))
    variance = broad.covariance.diagonal().to(theta)
    floor = _FLOOR**2 * variance
    constant = list(population.constant)
    told = _variance_of_data(fitted)[constant]
    floor[constant] = torch.minimum(floor[constant] + _OF_ONE_INDIVIDUAL * told, variance[constant])
    spread = spread + torch.diag(floor)
    centre = _between(means.mean(0), fitted.prior_mean.to(theta), _FARTHEST_STEP * present.sqrt())
    centre = _between(centre, broad.mean.to(theta), _FARTHEST * variance.sqrt())
    return centre.detach(), _no_wider(spread, _WIDEST**2 * variance).detach()


def _between(centre: Float[Tensor, " D"], middle: Float[Tensor, " D"], limit: Float[Tensor, " D"]) -> Tensor:
    return torch.minimum(torch.maximum(centre, middle - limit), middle + limit)


def _no_wider(covariance: Float[Tensor, "D D"], most: Float[Tensor, " D"]) -> Float[Tensor, "D D"]:
    """The covariance with variances of at most ``most`` and the same correlations."""
    shrink = torch.clamp((most / covariance.diagonal().clamp_min(1e-300)).sqrt(), max=1.0)
    return shrink[:, None] * covariance * shrink


def _variance_of_data(fitted: FittedPopulation) -> Float[Tensor, " D"]:
    """Variance that one individual's data leave, the present prior taken off."""
    prior = 1 / fitted.prior_variance.to(fitted.theta)
    return 1 / torch.maximum(1 / fitted.individual_variance.to(fitted.theta) - prior, _UNINFORMED * prior)


def _error_of_means(fitted: FittedPopulation) -> Float[Tensor, "D D"]:
    """Covariance of the estimated means; 0 where it is not known."""
    table, size = fitted.population.unknowns, len(fitted.population.parameters)
    found = torch.zeros((size, size), dtype=fitted.theta.dtype, device=fitted.theta.device)
    places = [(fitted.population.parameters.index(table.rows[place].parameter), place) for place in table.entries(MEAN)]
    columns, entries = (torch.tensor(part, device=found.device) for part in zip(*places, strict=True))
    known = fitted.covariance[entries[:, None], entries].to(found)
    if not bool(torch.isfinite(known).all()):
        return found
    found[columns[:, None], columns] = known
    return found


def _component(names: Sequence[str], mean: Tensor, covariance: Tensor, broad: Prior) -> dict[str, Any]:
    """The section of a normal; inside the bounds of a broad prior that has some, where parameters are independent."""
    sds = covariance.diagonal().sqrt()
    entries = {
        name: {"mean": float(centre), "sd": float(sd)} for name, centre, sd in zip(names, mean, sds, strict=True)
    }
    if isinstance(broad, UniformPrior):
        for name, low, high in zip(names, broad.lower.tolist(), broad.upper.tolist(), strict=True):
            entries[name] |= {"lower": low, "upper": high}
            entries[name]["mean"] = min(max(entries[name]["mean"], low), high)
        return {_TARGET: "nlme_sbi.TruncatedGaussianPrior", "parameters": entries}
    correlation = covariance / (sds[:, None] * sds)
    section: dict[str, Any] = {_TARGET: "nlme_sbi.GaussianPrior", "parameters": entries}
    if float((correlation - torch.diag(correlation.diagonal())).abs().max()) > 1e-12:
        even = 0.5 * (correlation + correlation.T)
        section["correlation"] = even.fill_diagonal_(1.0).tolist()
    return section


def _parts_of(section: Mapping[str, Any]) -> tuple[list[Any], list[float]]:
    """The prior before as components with weights: a mixture's own, so that mixtures do not nest."""
    if str(section.get(_TARGET, "")).endswith("MixturePrior"):
        return list(section["components"]), [float(weight) for weight in section["weights"]]
    return [dict(section)], [1.0]


def _exchange(pair: list[int], size: int) -> list[int]:
    order = list(range(size))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    return order


def images_needed(population: PopulationModel, declared: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Exchangeable pairs whose image the next prior must hold, too.

    A population model that distinguishes the two has two maxima of different heights, and a blunt network may have
    found the lower one; where the model distinguishes nothing, both are the same population.
    """
    if not isinstance(population, ExchangeableModel):
        return tuple(declared)
    return tuple(pair for pair in declared if population.why_not_exchangeable(*pair))
