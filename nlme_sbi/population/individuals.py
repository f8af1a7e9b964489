"""Individuals given the fit: draws reweighted from the training-prior posterior to ``p(phi | y_i, theta_hat)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.roles import DrawBlock, WeightedDraws, covariances_of, means_of
from nlme_sbi.tails import pareto_shape


@dataclass(frozen=True, eq=False)
class IndividualEstimates:
    """Posterior of every individual's parameters given the population estimate, unconstrained scale.

    ``mean`` and ``sd`` are ``(I, D)``; constants have the population's value and SD 0. ``ess (I,)`` is the effective
    number of draws behind them, ``pareto_k (I,)`` the shape of their weights' tail (None where draws carry no weights).
    """

    mean: Float[Tensor, "I D"]
    sd: Float[Tensor, "I D"]
    ess: Float[Tensor, " I"]
    pareto_k: Float[Tensor, " I"] | None = None


@torch.no_grad()
def individual_estimates(state: WeightedDraws, theta: Float[Tensor, " P"]) -> IndividualEstimates:
    """Means and SDs under the self-normalised weights at ``theta``."""
    size = len(state.population.parameters)
    mean = torch.zeros((state.individuals, size), dtype=theta.dtype, device=theta.device)
    sd = torch.zeros_like(mean)
    effective, shape = torch.zeros_like(mean[:, 0]), torch.zeros_like(mean[:, 0])
    columns = torch.tensor(state.population.varying, dtype=torch.int64, device=theta.device)
    for block in state.blocks:
        log_weights = block.log_weights(theta)
        weights = torch.softmax(log_weights, 1)
        phi = block.varying()
        centre = torch.einsum("is,isv->iv", weights, phi)
        spread = torch.einsum("is,isv->iv", weights, (phi - centre[:, None]).square()).sqrt()
        mean[block.rows[:, None], columns] = centre
        sd[block.rows[:, None], columns] = spread
        effective[block.rows] = 1 / weights.square().sum(1)
        shape[block.rows] = pareto_shape(log_weights)
    mean = _with_constants(state, theta, mean)
    return IndividualEstimates(mean=mean, sd=sd, ess=effective, pareto_k=shape)


@torch.no_grad()
def posterior_variances(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "I V"]:
    """Variance of every individual's varying parameters given data and population, over the population's variance: 1
    where the data say nothing, 0 where they say everything."""
    found = torch.zeros((state.individuals, len(state.population.varying)), dtype=theta.dtype, device=theta.device)
    columns = list(state.population.varying)
    for block in state.blocks:
        weights, phi = torch.softmax(block.log_weights(theta), 1), block.varying()
        centre = torch.einsum("is,isv->iv", weights, phi)
        spread = torch.einsum("is,isv->iv", weights, (phi - centre[:, None]).square())
        population = covariances_of(state.population, theta, block.design).diagonal(dim1=1, dim2=2)[:, columns]
        found[block.rows] = spread / population.clamp_min(1e-300)
    return found


@torch.no_grad()
def individual_typical(
    state: WeightedDraws, theta: Float[Tensor, " P"]
) -> tuple[Float[Tensor, "I D"], Float[Tensor, "I D"]]:
    """Typical values and SDs of individuals with each one's covariates, unconstrained scale; SD 0 for constants."""
    size = len(state.population.parameters)
    mean = torch.zeros((state.individuals, size), dtype=theta.dtype, device=theta.device)
    sd = torch.zeros_like(mean)
    for block in state.blocks:
        mean[block.rows] = means_of(state.population, theta, block.design)
        sd[block.rows] = covariances_of(state.population, theta, block.design).diagonal(dim1=1, dim2=2).sqrt()
    return mean, sd


@torch.no_grad()
def resampled_draws(
    state: WeightedDraws, theta: Float[Tensor, " P"], count: int, generator: torch.Generator
) -> Float[Tensor, "I count D"]:
    """Draws from ``p(phi | y_i, theta)`` by resampling with the weights; constants at the population's value."""
    size = len(state.population.parameters)
    drawn = torch.zeros((state.individuals, count, size), dtype=theta.dtype, device=theta.device)
    columns = torch.tensor(state.population.varying, dtype=torch.int64, device=theta.device)
    for block in state.blocks:
        drawn[block.rows[:, None, None], torch.arange(count, device=theta.device)[:, None], columns] = _resampled(
            block, theta, count, generator
        )
    return _with_constants(state, theta, drawn)


def _resampled(block: DrawBlock, theta: Tensor, count: int, generator: torch.Generator) -> Float[Tensor, "I count V"]:
    weights = torch.softmax(block.log_weights(theta), 1).to(generator.device)
    index = torch.multinomial(weights, count, replacement=True, generator=generator).to(theta.device)
    phi = block.varying()
    return phi.gather(1, index[..., None].expand(-1, -1, phi.shape[2]))


def _with_constants(state: WeightedDraws, theta: Tensor, values: Tensor) -> Tensor:
    if not state.population.constant:
        return values
    columns = torch.tensor(state.population.constant, dtype=torch.int64, device=theta.device)
    for block in state.blocks:
        constants = state.population.constants(theta, block.design)
        rows = block.rows
        if values.dim() == 2:
            values[rows[:, None], columns] = constants
        else:
            every = torch.arange(values.shape[1], device=theta.device)[:, None]
            values[rows[:, None, None], every, columns] = constants[:, None]
    return values
