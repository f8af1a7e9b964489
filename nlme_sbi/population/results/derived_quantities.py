"""From unknowns to reported quantities: natural values, SDs, correlations, their errors and intervals.

Errors come by the delta method through the population model's ``mean`` and its omega (``dispersion``, of Gaussian
random effects the covariance), so that a new model needs nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.numerics.jacobians import jacobian
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.interface import Moments, dispersion_of

NORMAL_95 = 1.959963984540054  # 97.5% quantile of the standard normal


@dataclass(frozen=True, eq=False)
class Summary:
    """Population quantities, one entry for each of the D parameters; NaN where a quantity does not exist.

    ``mean`` and ``mean_se`` are on the unconstrained scale; ``natural`` with its limits on the natural one; ``sd`` is
    omega, the SD between individuals or another law's scale (0 for constants); ``*_fixed`` marks given values.
    ``correlation`` and its limits are ``(D, D)``.
    """

    mean: Float[Tensor, " D"]
    mean_se: Float[Tensor, " D"]
    mean_fixed: Bool[Tensor, " D"]
    relative_se: Float[Tensor, " D"]
    natural: Float[Tensor, " D"]
    natural_se: Float[Tensor, " D"]
    natural_limits: Float[Tensor, "2 D"]
    sd: Float[Tensor, " D"]
    sd_se: Float[Tensor, " D"]
    sd_limits: Float[Tensor, "2 D"]
    sd_fixed: Bool[Tensor, " D"]
    correlation: Float[Tensor, "D D"]
    correlation_se: Float[Tensor, "D D"]
    correlation_limits: Float[Tensor, "2 D D"]


def summarise(population: Moments, theta: Float[Tensor, " P"], covariance: Float[Tensor, "P P"]) -> Summary:
    """Delta-method errors and transformed Wald intervals.

    Intervals of SDs are Wald on the log scale, of correlations on Fisher's z, of natural values on the unconstrained
    scale. SEs of natural values are |d natural / d unconstrained| times the unconstrained SE, and relative SEs are 100
    times those over the natural values.

    Args:
        population: the bound model, or a class of a mixture.
        theta: estimates.
        covariance: of the estimates, zero rows for fixed unknowns, NaN where it is not known.
    """
    free = population.unknowns.free.to(theta.device)
    uncertain = covariance[free][:, free]
    mean, mean_se, mean_fixed = _propagate(population.mean, theta, uncertain, free)
    varying = torch.tensor(population.varying, dtype=torch.int64, device=theta.device)

    def log_sd(at: Tensor) -> Tensor:
        return 0.5 * dispersion_of(population, at).diagonal()[varying].log()

    value, log_se, fixed = _propagate(log_sd, theta, uncertain, free)
    spread = NORMAL_95 * log_se
    sd_varying = value.exp()
    limits = torch.stack([(value - spread).exp(), (value + spread).exp()])
    shift = NORMAL_95 * mean_se
    natural = population.parameters.to_natural(mean)
    natural_se = _slopes(population.parameters, mean) * mean_se
    nan = torch.full_like(mean, torch.nan)
    return Summary(
        mean=mean,
        mean_se=mean_se,
        mean_fixed=mean_fixed,
        relative_se=100 * natural_se / natural.abs(),
        natural=natural,
        natural_se=natural_se,
        natural_limits=population.parameters.to_natural(torch.stack([mean - shift, mean + shift])),
        sd=torch.zeros_like(mean).index_copy(0, varying, sd_varying),
        sd_se=nan.index_copy(0, varying, sd_varying * log_se),
        sd_limits=nan.expand(2, -1).index_copy(1, varying, limits),
        sd_fixed=torch.zeros_like(mean_fixed).index_copy(0, varying, fixed),
        **_correlations(population, theta, uncertain, varying),
    )


def _propagate(function: object, theta: Tensor, covariance: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, delta-method SE, and whether it depends on no free unknown."""
    if not callable(function):
        raise TypeError("A reader of the population model is a function of theta.")
    slopes = jacobian(function, theta)[..., free]
    untouched = (slopes.abs() < 1e-12).all(-1)  # of quantities of order 1: what rounding leaves
    se = torch.einsum("...p,pq,...q->...", slopes, covariance, slopes).clamp_min(0).sqrt()
    return function(theta).detach(), torch.where(untouched, 0.0, se).detach(), untouched


def _slopes(parameters: ParameterSpace, mean: Tensor) -> Tensor:
    """``|d natural / d unconstrained|`` of each parameter."""
    return jacobian(parameters.to_natural, mean).diagonal().abs()


def _correlations(population: Moments, theta: Tensor, covariance: Tensor, varying: Tensor) -> dict[str, Tensor]:
    free = population.unknowns.free.to(theta.device)
    size = len(population.parameters)
    empty = torch.full((size, size), torch.nan, dtype=theta.dtype, device=theta.device)
    rows, columns = torch.tril_indices(len(varying), len(varying), -1, device=theta.device)
    places = (varying[rows], varying[columns])

    def fisher(at: Tensor) -> Tensor:
        omega = dispersion_of(population, at)
        sd = omega.diagonal().sqrt()
        return torch.atanh(omega[places] / (sd[places[0]] * sd[places[1]]))

    if len(rows) == 0:
        return {"correlation": empty, "correlation_se": empty, "correlation_limits": empty.expand(2, -1, -1)}
    value, se, structural = _propagate(fisher, theta, covariance, free)
    value = torch.where(structural & (value == 0), torch.nan, value)  # not in the model, not an estimate of 0
    shift = NORMAL_95 * se

    def spread(numbers: Tensor) -> Tensor:
        return empty.index_put(places, numbers).index_put((places[1], places[0]), numbers)

    return {
        "correlation": spread(torch.tanh(value)),
        "correlation_se": spread((1 - torch.tanh(value).square()) * se),
        "correlation_limits": torch.stack([spread(torch.tanh(value - shift)), spread(torch.tanh(value + shift))]),
    }
