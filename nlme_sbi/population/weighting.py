"""What every estimator on weighted draws shares: objective, derivatives, weights and their Monte-Carlo error.

An individual's objective is ``log mean_j exp(l_ij(theta))``. Everything runs block by block of individuals, so that
memory is bounded; derivatives are exact (autograd), second ones forward over reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.roles import DrawBlock, WeightedDraws

_ROUGH = 200  # individuals that tell the scales of a search
_DIRECTIONS = 8  # derivatives taken at once: bounds memory


def _mean_log_weight(block: DrawBlock, theta: Tensor) -> Float[Tensor, " I"]:
    log_weights = block.log_weights(theta)
    draws = torch.tensor(log_weights.shape[1], dtype=theta.dtype, device=theta.device)
    return torch.logsumexp(log_weights, 1) - draws.log()


def _summed_mean_log_weight(block: DrawBlock, theta: Tensor) -> Float[Tensor, ""]:
    return _mean_log_weight(block, theta).sum()


@torch.no_grad()
def contributions(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, " I"]:
    """Objective of every individual."""
    result = torch.empty(state.individuals, dtype=theta.dtype, device=theta.device)
    for block in state.blocks:
        result[block.rows] = _mean_log_weight(block, theta)
    return result


def value_and_gradient(state: WeightedDraws, theta: Float[Tensor, " P"]) -> tuple[float, Float[Tensor, " P"]]:
    """Objective summed over individuals, and its exact gradient."""
    leaf = theta.detach().clone().requires_grad_(True)
    total = torch.zeros((), dtype=theta.dtype, device=theta.device)
    for block in state.blocks:
        value = _mean_log_weight(block, leaf).sum()
        value.backward()  # type: ignore[no-untyped-call]
        total += value.detach()
    if leaf.grad is None:
        raise ValueError("The objective does not depend on theta: there are no individuals.")
    return float(total), leaf.grad


def _along(function: Callable[[Tensor], Tensor], theta: Tensor, directions: Tensor) -> Tensor:
    """Derivatives of ``function`` along each row of ``directions``, stacked first."""

    def derivative(direction: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(function, (theta,), (direction,))[1]
        return tangent

    return torch.func.vmap(derivative, chunk_size=_DIRECTIONS)(directions)


def _axes(state: WeightedDraws, theta: Tensor) -> Tensor:
    """Unit vectors of the free unknowns."""
    identity = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    return identity[state.population.unknowns.free.to(theta.device)]


def scores(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "I free"]:
    """Gradient of every individual's objective with respect to the free unknowns."""
    axes = _axes(state, theta)
    result = torch.empty((state.individuals, len(axes)), dtype=theta.dtype, device=theta.device)
    with torch.no_grad():
        for block in state.blocks:
            result[block.rows] = _along(partial(_mean_log_weight, block), theta, axes).T
    return result


def rough_information(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    """Information from outer products of individuals' scores, over enough blocks to know the scales, made positive
    definite: coordinates for a search, not standard errors."""
    axes = _axes(state, theta)
    total = torch.zeros((len(axes), len(axes)), dtype=theta.dtype, device=theta.device)
    seen = 0
    # Blocks may be ordered by what they hold; strides keep those that are looked at typical.
    stride = max(1, state.individuals // _ROUGH)
    with torch.no_grad():
        for block in state.blocks[::stride]:
            slopes = _along(partial(_mean_log_weight, block), theta, axes)
            total += slopes @ slopes.T
            seen += slopes.shape[1]
    total *= state.individuals / seen
    # With fewer individuals than unknowns the sum of outer products is singular.
    return total + torch.diag(0.05 * total.diagonal().clamp_min(1e-8))


def hessian(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    """Second derivatives of the objective in the free unknowns, forward over reverse."""
    axes = _axes(state, theta)
    free = state.population.unknowns.free.to(theta.device)
    total = torch.zeros((len(axes), len(axes)), dtype=theta.dtype, device=theta.device)
    for block in state.blocks:
        gradient = torch.func.grad(partial(_summed_mean_log_weight, block))
        total += _along(gradient, theta, axes)[:, free].detach()
    return 0.5 * (total + total.T)


@torch.no_grad()
def effective_draws(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, " I"]:
    """Effective number of draws of every individual, ``(sum w)^2 / sum w^2``."""
    result = torch.empty(state.individuals, dtype=theta.dtype, device=theta.device)
    for block in state.blocks:
        result[block.rows] = 1 / torch.softmax(block.log_weights(theta), 1).square().sum(1)
    return result


@torch.no_grad()
def score_variance(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    r"""Monte-Carlo variance of the summed gradient, by the delta method for self-normalised weights.

    .. math:: \sum_i \sum_j w_{ij}^2 (g_{ij} - \bar g_i)(g_{ij} - \bar g_i)^T, \quad \bar g_i = \sum_j w_{ij} g_{ij}
    """
    axes = _axes(state, theta)
    total = torch.zeros((len(axes), len(axes)), dtype=theta.dtype, device=theta.device)
    for block in state.blocks:
        slopes = _along(block.log_weights, theta, axes)  # (free, i, S)
        weights = torch.softmax(block.log_weights(theta), 1)
        deviations = weights * (slopes - (weights * slopes).sum(2, keepdim=True))
        flat = deviations.flatten(1)
        total += flat @ flat.T
    return total


@torch.no_grad()
def expected_statistics(
    state: WeightedDraws, theta: Float[Tensor, " P"]
) -> tuple[float, Float[Tensor, " statistics"] | None]:
    """E-step: the summed objective, and the population model's statistics under the reweighted draws (None where its
    M-step has no closed form)."""
    objective, total = 0.0, None
    for block in state.blocks:
        log_weights = block.log_weights(theta)
        level = torch.logsumexp(log_weights, 1, keepdim=True)
        objective += float((level - math.log(log_weights.shape[1])).sum())
        weights = (log_weights - level).exp()
        statistics = state.population.statistics(weights, block.varying(), theta, block.design)
        if statistics is not None:
            total = statistics if total is None else total + statistics
    return objective, total
