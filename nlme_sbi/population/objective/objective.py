"""Shared by all estimators on weighted draws: objective, derivatives, weights and their Monte-Carlo error.

An individual's objective is ``log mean_j exp(l_ij(theta))``. Everything runs block by block of individuals, so that
memory is bounded, and blocks side by side; derivatives are exact (autograd).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.population.objective.interface import DrawBlock, GivenWeights, SetsOfDraws, WeightedDraws

_ROUGH = 200  # individuals that set the scales of a search


def _mean_log_weight(block: DrawBlock, theta: Tensor) -> Float[Tensor, " I"]:
    log_weights = block.log_weights(theta)
    draws = torch.tensor(log_weights.shape[1], dtype=theta.dtype, device=theta.device)
    return torch.logsumexp(log_weights, 1) - draws.log()


def summed_objective(block: DrawBlock, theta: Tensor) -> Float[Tensor, ""]:
    """Objective of a block's individuals together."""
    return _mean_log_weight(block, theta).sum()


@torch.no_grad()
def contributions(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, " I"]:
    """Objective of every individual."""
    return _in_rows(state, theta, over_blocks(lambda block: _mean_log_weight(block, theta), state.blocks, theta.device))


def value_and_gradient(
    state: WeightedDraws, theta: Float[Tensor, " P"], *, multiplicity: Float[Tensor, " I"] | None = None
) -> tuple[float, Float[Tensor, " P"]]:
    """Objective summed over individuals, each as often as ``multiplicity`` says (once), and its exact gradient."""
    if not state.blocks:
        raise ValueError("The objective does not depend on theta: there are no individuals.")

    def of_block(block: DrawBlock) -> tuple[Tensor, Tensor]:
        leaf = theta.detach().clone().requires_grad_(True)
        each = _mean_log_weight(block, leaf)
        value = each.sum() if multiplicity is None else each @ multiplicity[block.rows]
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    with torch.enable_grad():
        found = over_blocks(of_block, state.blocks, theta.device)
    value = torch.stack([value for value, _ in found]).sum()
    return float(value), torch.stack([gradient for _, gradient in found]).sum(0)


def _in_rows(state: WeightedDraws, theta: Tensor, parts: list[Tensor]) -> Tensor:
    """What blocks gave for their individuals, in the order of the data."""
    result = torch.empty((state.individuals, *parts[0].shape[1:]), dtype=theta.dtype, device=theta.device)
    for block, part in zip(state.blocks, parts, strict=True):
        result[block.rows] = part
    return result


def directional_derivatives(function: Callable[[Tensor], Tensor], theta: Tensor, directions: Tensor) -> Tensor:
    """Derivatives of ``function`` along each row of ``directions``, stacked first.

    By two reverse passes: the first is linear in its cotangent, and the derivative along a direction is the slope of
    that linear map. torch's forward mode has one global level and does not run in threads.
    """
    with torch.enable_grad():
        leaf = theta.detach().clone().requires_grad_(True)
        value = function(leaf)
        cotangent = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad((value * cotangent).sum(), leaf, create_graph=True)
        return torch.stack(
            [torch.autograd.grad(pulled @ direction, cotangent, retain_graph=True)[0] for direction in directions]
        )


def _axes(state: WeightedDraws, theta: Tensor) -> Tensor:
    """Unit vectors of the free unknowns."""
    identity = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    return identity[state.population.unknowns.free.to(theta.device)]


def scores(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "I free"]:
    """Gradient of every individual's objective with respect to the free unknowns."""
    axes = _axes(state, theta)
    with torch.no_grad():
        parts = over_blocks(
            lambda block: directional_derivatives(partial(_mean_log_weight, block), theta, axes).T,
            state.blocks,
            theta.device,
        )
    return _in_rows(state, theta, parts)


def rough_information(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    """Information from outer products of individuals' scores, over enough blocks to fix the scales, made positive
    definite: coordinates for a search, not standard errors."""
    axes = _axes(state, theta)
    # Blocks may be ordered by what they hold; strides keep those that are looked at typical.
    stride = max(1, state.individuals // _ROUGH)
    with torch.no_grad():
        parts = over_blocks(
            lambda block: directional_derivatives(partial(_mean_log_weight, block), theta, axes),
            state.blocks[::stride],
            theta.device,
        )
    slopes = torch.cat(parts, 1)
    total = slopes @ slopes.T * (state.individuals / slopes.shape[1])
    # With fewer individuals than unknowns the sum of outer products is singular.
    return total + torch.diag(0.05 * total.diagonal().clamp_min(1e-8))


def hessian(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    """Second derivatives of the objective in the free unknowns, reverse over reverse."""
    free = state.population.unknowns.free.to(theta.device)

    def of_block(block: DrawBlock) -> Tensor:
        with torch.enable_grad():
            leaf = theta.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(summed_objective(block, leaf), leaf, create_graph=True)
            rows = [torch.autograd.grad(slope, leaf, retain_graph=True)[0] for slope in gradient[free]]
            return torch.stack(rows)[:, free]

    total = torch.stack(over_blocks(of_block, state.blocks, theta.device)).sum(0)
    return 0.5 * (total + total.T)


def complete_information(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    r"""Information that the complete data, measurements and individuals' parameters together, would have on the free
    unknowns: second derivatives of :math:`-\sum_{ij} w_{ij} \log p(y_i, v_{ij} \mid \theta)` with the weights held.

    Over enough blocks to know it: it sets the scales of a search.
    """
    free = state.population.unknowns.free.to(theta.device)
    stride = max(1, state.individuals // _ROUGH)
    blocks = state.blocks[::stride]

    def of_block(block: DrawBlock) -> tuple[Tensor, int]:
        with torch.enable_grad():
            leaf = theta.detach().clone().requires_grad_(True)
            log_weights = block.log_weights(leaf)
            weights = torch.softmax(log_weights.detach(), 1)
            there = weights > 0
            value = (weights[there] * log_weights[there]).sum()
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            rows = [torch.autograd.grad(slope, leaf, retain_graph=True)[0] for slope in gradient[free]]
            return torch.stack(rows)[:, free], len(block.rows)

    found = over_blocks(of_block, blocks, theta.device)
    seen = sum(count for _, count in found)
    total = torch.stack([part for part, _ in found]).sum(0) * (state.individuals / seen)
    information: Tensor = -0.5 * (total + total.T)
    return information


def slopes_along(
    state: WeightedDraws, theta: Float[Tensor, " P"], directions: Float[Tensor, "n P"]
) -> Float[Tensor, "I n"]:
    """Derivative of every individual's objective along each of the directions, fixed unknowns included."""
    with torch.no_grad():
        parts = over_blocks(
            lambda block: directional_derivatives(partial(_mean_log_weight, block), theta, directions).T,
            state.blocks,
            theta.device,
        )
    return _in_rows(state, theta, parts)


def halves(state: WeightedDraws) -> tuple[WeightedDraws, WeightedDraws]:
    """Every other draw, nothing refitted."""
    every = torch.arange(state.individuals, device=state.blocks[0].rows.device)
    return state.part(every, slice(0, None, 2)), state.part(every, slice(1, None, 2))


def independent_sets(state: WeightedDraws) -> tuple[WeightedDraws, ...]:
    """Parts of every individual's draws that are independent of each other: those that the draws were made in, else
    halves with everything refitted that was fitted to the draws."""
    if isinstance(state, SetsOfDraws):
        return state.independent()
    return state.half(0), state.half(1)


def objective_error(
    state: WeightedDraws, theta: Float[Tensor, " P"], sets: Sequence[WeightedDraws] | None = None
) -> Float[Tensor, " I"]:
    """Monte-Carlo standard error of every individual's objective, from how independent sets of its draws differ:
    :func:`independent_sets`, or those where they are made already."""
    each = torch.stack([contributions(one, theta) for one in sets or independent_sets(state)])
    error: Tensor = each.std(0) / len(each) ** 0.5
    return error


def score_error(
    state: WeightedDraws, theta: Float[Tensor, " P"], sets: Sequence[WeightedDraws] | None = None
) -> Float[Tensor, "free free"]:
    """Monte-Carlo covariance of the summed score, from how independent sets of every individual's draws differ, as in
    :func:`objective_error`. It rests on as many differences as there are individuals times sets but one."""
    each = torch.stack([scores(one, theta) for one in sets or independent_sets(state)])
    apart = (each - each.mean(0)).flatten(0, 1)
    return apart.T @ apart / (len(each) * (len(each) - 1))


@torch.no_grad()
def effective_draws(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, " I"]:
    """Effective number of draws of every individual, ``(sum w)^2 / sum w^2``."""

    def of_block(block: DrawBlock) -> Tensor:
        return 1 / torch.softmax(block.log_weights(theta), 1).square().sum(1)

    return _in_rows(state, theta, over_blocks(of_block, state.blocks, theta.device))


@torch.no_grad()
def log_mean_error(state: WeightedDraws, theta: Float[Tensor, " P"]) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    r"""Monte-Carlo variance of every individual's objective, and minus twice its bias; by the delta method, for
    independent draws.

    With :math:`p_j` the draws' shares of the mean at theta and :math:`b_j` those that they had before, :math:`1/S`
    unless weights were given,

    .. math:: \mathrm{var} = \sum_j (p_j - b_j)^2, \quad \mathrm{bias} = -\tfrac12 \sum_j (p_j^2 - b_j^2).

    Without given weights variance and minus twice the bias are both :math:`1/\mathrm{ESS} - 1/S`. With them their
    normalisation has an error of its own, so that the effective number of draws at theta alone would mislead, also
    downwards: weights that cancel the ratio leave all draws effective and their mean uncertain.
    """
    plain = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(0)
    variance = excess = plain
    for block in state.blocks:
        given = block.given_weights() if isinstance(block, GivenWeights) else None
        if given is None:
            continue
        shares = torch.softmax(block.log_weights(theta), 1)
        variance = variance.index_copy(0, block.rows, (shares - given).square().sum(1))
        excess = excess.index_copy(0, block.rows, (shares.square() - given.square()).sum(1))
    return variance, excess


@torch.no_grad()
def score_variance(state: WeightedDraws, theta: Float[Tensor, " P"]) -> Float[Tensor, "free free"]:
    r"""Monte-Carlo variance of the summed gradient, by the delta method for self-normalised weights.

    .. math:: \sum_i \sum_j w_{ij}^2 (g_{ij} - \bar g_i)(g_{ij} - \bar g_i)^T, \quad \bar g_i = \sum_j w_{ij} g_{ij}
    """
    axes = _axes(state, theta)

    def of_block(block: DrawBlock) -> Tensor:
        slopes = directional_derivatives(block.log_weights, theta, axes)  # (free, i, S)
        weights = torch.softmax(block.log_weights(theta), 1)
        deviations = weights * (slopes - (weights * slopes).sum(2, keepdim=True))
        flat = deviations.flatten(1)
        return flat @ flat.T

    return torch.stack(over_blocks(of_block, state.blocks, theta.device)).sum(0)


@torch.no_grad()
def expected_statistics(
    state: WeightedDraws, theta: Float[Tensor, " P"]
) -> tuple[float, Float[Tensor, " statistics"] | None]:
    """E-step: the summed objective, and the population model's statistics under the reweighted draws (None where its
    M-step has no closed form)."""

    def of_block(block: DrawBlock) -> tuple[float, Tensor | None]:
        log_weights = block.log_weights(theta)
        level = torch.logsumexp(log_weights, 1, keepdim=True)
        weights = (log_weights - level).exp()
        statistics = state.population.statistics(weights, block.varying(), theta, block.design)
        return float((level - math.log(log_weights.shape[1])).sum()), statistics

    found = over_blocks(of_block, state.blocks, theta.device)
    added = [statistics for _, statistics in found if statistics is not None]
    return sum(value for value, _ in found), torch.stack(added).sum(0) if added else None
