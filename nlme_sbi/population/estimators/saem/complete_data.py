"""Scores and information of the complete data, which are the chains' parameters together with the measurements.

Letters: ``E`` chosen entries of theta. Scores add up over individuals; their conditional expectation is the score of
the observed data (Fisher's identity).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.population.estimators.saem.mcmc import CompleteData
from nlme_sbi.population.objective.objective import directional_derivatives

_STEP = 1e-4  # of finite differences of exact slopes in the constants


def constants_jacobian(
    data: CompleteData, theta: Float[Tensor, " P"], entries: Int[Tensor, " E"]
) -> Float[Tensor, "E I W"]:
    """How every individual's constants depend on the entries."""
    design = data.observations.design
    if len(entries) == 0 or not data.population.constant:
        return torch.zeros((len(entries), len(design), len(data.population.constant))).to(theta)
    axes = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[entries]
    return directional_derivatives(lambda at: data.population.constants(at, design), theta, axes)


def population_scores(
    data: CompleteData, points: Float[Tensor, "I C V"], theta: Float[Tensor, " P"], entries: Int[Tensor, " E"]
) -> Float[Tensor, "E I C"]:
    """Slopes of every chain's population density."""
    axes = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)[entries]
    return directional_derivatives(
        lambda at: data.population.log_prob(points, at, data.observations.design), theta, axes
    )


def population_information(
    data: CompleteData, points: Float[Tensor, "I C V"], theta: Float[Tensor, " P"], entries: Int[Tensor, " E"]
) -> Float[Tensor, "E E"]:
    """Negative second derivatives of the population density, summed over individuals, mean over chains."""
    with torch.enable_grad():
        leaf = theta.detach().clone().requires_grad_(True)
        value = data.population.log_prob(points, leaf, data.observations.design).mean(1).sum()
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        rows = [torch.autograd.grad(slope, leaf, retain_graph=True)[0] for slope in gradient[entries]]
    return -torch.stack(rows)[:, entries]


def constants_information(
    data: CompleteData,
    points: Float[Tensor, "I C V"],
    constants: Float[Tensor, "I W"],
    slopes: Float[Tensor, "I C W"],
    jacobian: Float[Tensor, "E I W"],
) -> Float[Tensor, "E E"]:
    """Negative second derivatives of the likelihood through the constants; ``slopes`` are those at ``constants``."""
    columns = []
    for way in _STEP * torch.eye(constants.shape[1], dtype=constants.dtype, device=constants.device):
        shifted = data.with_slopes(points, constants + way)[1]
        columns.append(((shifted - slopes) / _STEP).mean(1))
    if not columns:
        return torch.zeros((len(jacobian), len(jacobian))).to(constants)
    bend = torch.stack(columns, 1)
    found = -torch.einsum("eiw,iwu,fiu->ef", jacobian, bend, jacobian)
    return 0.5 * (found + found.T)
