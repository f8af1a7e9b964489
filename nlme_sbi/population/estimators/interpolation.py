r"""The exact estimator's likelihoods as functions of the constants over their whole range of uncertainty.

A fit needs them near one point, where an expansion to second order serves. A posterior of theta walks several standard
errors away, where that expansion overrates draws that fit badly (their gradients in a noise parameter are large, and
the mean Hessian is not theirs). Here each draw has its own polynomial of degree 4 along each constant, through its
exact log-likelihoods at five points, and its own mixed differences for pairs of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.population.estimators.exact_block import ExactBlock
from nlme_sbi.population.likelihood.log_joint import JointDensity, interleave, select_rows
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.types import Design, Prior

_NODES = (-1.0, -0.5, 0.5, 1.0)  # beside 0, in units of the reach
_MIXED = 0.25  # where mixed differences are taken
_ERRORS = 6.0  # standard errors that the reach covers
_LEAST, _MOST = 1e-3, 1.0  # reach on the unconstrained scale
_IMPOSSIBLE = -1e4  # stands for minus infinity in a polynomial


@runtime_checkable
class ExpandedDraws(WeightedDraws, Protocol):
    """Draws of individuals whose likelihoods were made for one theta."""

    @property
    def joint(self) -> JointDensity:
        """With the simulator, the data, and the theta."""

    @property
    def blocks(self) -> tuple[ExactBlock, ...]:
        """All individuals, each in one block."""

    @property
    def made_for(self) -> Tensor:
        """That theta."""

    def part(self, individuals: Tensor, draws: slice) -> ExpandedDraws:
        """Some individuals with some of their draws."""

    def half(self, which: int) -> ExpandedDraws:
        """Every other draw."""


@dataclass(frozen=True, eq=False)
class InterpolatedBlock:
    """Some individuals' draws: ``coefficients (i, S, W, 4)`` of powers 1 to 4 of the change in each constant, and
    ``mixed (i, S, pairs)`` of products of two, changes being in units of ``reach (W,)``."""

    exact: ExactBlock
    reach: Float[Tensor, " W"]
    coefficients: Float[Tensor, "I S W 4"]
    mixed: Float[Tensor, "I S pairs"]

    @property
    def rows(self) -> Tensor:
        """Positions of the individuals in the data."""
        return self.exact.rows

    @property
    def design(self) -> Design:
        """Their designs."""
        return self.exact.design

    def varying(self) -> Float[Tensor, "I S V"]:
        """Draws of the varying parameters."""
        return self.exact.phi

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        """``log p(y | v, s_theta) + log p(v | theta) - log q(v)``."""
        found = self.exact.log_ratio + self.exact.population.log_prob(self.exact.phi, theta, self.design)
        change = (self.exact.population.constants(theta, self.design) - self.exact.constants) / self.reach
        # Beyond the nodes the polynomial is not valid, and would win over any penalty: it stays as it is at the last.
        inside = change.clamp(-1, 1)
        powers = torch.stack([inside**power for power in range(1, 5)], -1)
        found = found + torch.einsum("iswk,iwk->is", self.coefficients, powers)
        products = [inside[:, first] * inside[:, second] for first, second in _pairs(change.shape[1])]
        if products:
            found = found + torch.einsum("isp,ip->is", self.mixed, torch.stack(products, -1))
        excess = (change.abs() - 1).clamp_min(0).square().sum(1, keepdim=True)
        return found - 1e4 * excess


@dataclass(frozen=True, eq=False)
class InterpolatedDraws:
    """The exact estimator's draws with likelihoods that hold within ``reach (W,)`` of the constants they were made
    for."""

    exact: ExpandedDraws
    reach: Float[Tensor, " W"]
    blocks: tuple[InterpolatedBlock, ...]

    fitted = False

    @property
    def population(self) -> PopulationModel:
        """The model that the weights belong to."""
        return self.exact.population

    @property
    def individuals(self) -> int:
        """Their number."""
        return self.exact.individuals

    @property
    def draws(self) -> int:
        """Draws for each individual."""
        return self.exact.draws

    def part(self, individuals: Tensor, draws: slice) -> InterpolatedDraws:
        """Some individuals with some of their draws."""
        return _interpolate(self.exact.part(individuals, draws), self.reach)

    def half(self, which: int) -> InterpolatedDraws:
        """Every other draw."""
        return _interpolate(self.exact.half(which), self.reach)

    def training_draws(self) -> tuple[Tensor, Prior]:
        """As those of the exact draws."""
        return self.exact.training_draws()

    def warnings(self, theta: Float[Tensor, " P"], ids: tuple[str, ...]) -> tuple[str, ...]:
        """As those of the exact draws."""
        return self.exact.warnings(theta, ids)

    def share_beyond_range(self, thetas: Float[Tensor, "K P"]) -> Float[Tensor, " W"]:
        """Share of these thetas whose constants come near the end of the reach, for each constant."""
        design = self.exact.joint.observations.design
        centre = self.population.constants(self.exact.made_for, design)
        # Of the individuals whose constants change most: covariates may make them each individual's own.
        change = [(self.population.constants(theta, design) - centre).abs().amax(0) for theta in thetas]
        return (torch.stack(change) > 0.9 * self.reach).double().mean(0)


@torch.no_grad()
def interpolate_along_constants(exact: ExpandedDraws, covariance: Float[Tensor, "P P"] | None) -> InterpolatedDraws:
    """Draws whose likelihoods hold within six standard errors of the constants.

    Args:
        exact: made for the estimate; with at least one constant.
        covariance: of the estimates; where it is None or NaN, the reach is 1 on the unconstrained scale.
    """
    return _interpolate(exact, _reach(exact, covariance))


def _reach(exact: ExpandedDraws, covariance: Float[Tensor, "P P"] | None) -> Float[Tensor, " W"]:
    theta, population = exact.made_for, exact.population
    if covariance is None:
        return torch.full((len(population.constant),), _MOST, dtype=theta.dtype, device=theta.device)
    with torch.enable_grad():
        leaf = theta.detach().clone().requires_grad_(True)
        values = population.constants(leaf, exact.joint.observations.design)
        spread = []  # of each constant, on average over individuals: covariates may make it theirs
        for column in range(values.shape[1]):
            (slope,) = torch.autograd.grad(values[:, column].sum() / len(values), leaf, retain_graph=True)
            spread.append((slope @ covariance.nan_to_num(torch.inf) @ slope).sqrt())
    found = torch.stack(spread).nan_to_num(_MOST, posinf=_MOST)
    return (_ERRORS * found).clamp(_LEAST, _MOST)


def _interpolate(exact: ExpandedDraws, reach: Float[Tensor, " W"]) -> InterpolatedDraws:
    blocks = over_blocks(lambda block: _block(exact, block, reach), exact.blocks, reach.device)
    return InterpolatedDraws(exact, reach, tuple(blocks))


@torch.no_grad()
def _block(exact: ExpandedDraws, block: ExactBlock, reach: Float[Tensor, " W"]) -> InterpolatedBlock:
    width = len(reach)
    axes = torch.diag(reach)
    observations = select_rows(exact.joint.observations, block.rows)

    def change(shift: Tensor) -> Float[Tensor, "i S"]:
        constants = (block.constants + shift)[:, None].expand(-1, block.phi.shape[1], -1)
        value = exact.joint.simulator.log_likelihood(observations, interleave(block.population, block.phi, constants))
        return (value - base).nan_to_num(_IMPOSSIBLE, neginf=_IMPOSSIBLE).clamp_min(_IMPOSSIBLE)

    base = torch.zeros((), dtype=reach.dtype, device=reach.device)
    nowhere = torch.zeros_like(reach)
    base = change(nowhere)
    nodes = torch.tensor(_NODES, dtype=reach.dtype, device=reach.device)
    powers = torch.stack([nodes**power for power in range(1, 5)], -1)
    along = [torch.stack([change(node * axes[one]) for node in nodes], -1) for one in range(width)]
    coefficients = torch.stack([values @ torch.linalg.inv(powers).mT for values in along], 2)
    at = torch.tensor([_MIXED**power for power in range(1, 5)], dtype=reach.dtype, device=reach.device)
    alone = coefficients @ at
    mixed = [
        (change(_MIXED * (axes[first] + axes[second])) - alone[..., first] - alone[..., second]) / _MIXED**2
        for first, second in _pairs(width)
    ]
    pairs = torch.stack(mixed, -1) if mixed else block.phi.new_zeros((*block.phi.shape[:2], 0))
    return InterpolatedBlock(block, reach, coefficients, pairs)


def _pairs(width: int) -> list[tuple[int, int]]:
    return list(combinations(range(width), 2))
