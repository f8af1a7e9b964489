"""Markov chains of every individual's varying parameters given the population, all individuals as one tensor.

``points (I, C, V)``: C chains an individual. Kernels (each leaves ``p(v | y_i, theta)`` invariant): independence
proposals from heavy-tailed Laplace approximations, an exchange of parameters that the simulator declares exchangeable,
a random walk in the shape of Laplace's covariance and one along single coordinates, both with steps that adapt to an
acceptance target, individual by individual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.numerics.t_mixtures import Mixtures
from nlme_sbi.population.estimators.initialization import exchanged_columns
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents, mixtures, profile_components
from nlme_sbi.population.likelihood.log_joint import Expansion, JointDensity, interleave, select_rows
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.types import Observations, TractableSimulator

_NUMBERS = {"cpu": 100_000, "cuda": 50_000_000}  # predicted values in a block: a CPU's cache, a GPU's width
_SHARES = 64  # resolution of the shares of proposal components


@dataclass(frozen=True, eq=False)
class CompleteData:
    """Log-likelihood of all data given all individuals' parameters, block by block."""

    simulator: TractableSimulator
    population: PopulationModel
    observations: Observations
    parts: tuple[tuple[slice, Observations], ...]

    @classmethod
    def of(
        cls, simulator: TractableSimulator, population: PopulationModel, observations: Observations, *, chains: int
    ) -> CompleteData:
        """With blocks that hold so many chains an individual."""
        values = observations.values
        width = max(1, _NUMBERS.get(values.device.type, _NUMBERS["cuda"]) // (chains * values[0].numel()))
        ends = [*range(0, len(observations), width), len(observations)]
        every = torch.arange(len(observations), device=values.device)
        parts = tuple((slice(start, end), select_rows(observations, every[start:end])) for start, end in pairwise(ends))
        return cls(simulator, population, observations, parts)

    def log_likelihood(self, points: Float[Tensor, "I C V"], constants: Float[Tensor, "I W"]) -> Float[Tensor, "I C"]:
        """``log p(y_i | v, s)``; ``-inf`` where it is not finite."""

        def of_part(part: tuple[slice, Observations]) -> Tensor:
            with torch.no_grad():
                return self._value(part, points, constants[part[0], None])

        return torch.cat(over_blocks(of_part, self.parts, points.device))

    def with_slopes(
        self, points: Float[Tensor, "I C V"], constants: Float[Tensor, "I W"]
    ) -> tuple[Float[Tensor, "I C"], Float[Tensor, "I C W"]]:
        """Log-likelihood and its gradient in the constants."""

        def of_part(part: tuple[slice, Observations]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = constants[part[0], None].expand(-1, points.shape[1], -1).clone().requires_grad_(True)
                value = self._value(part, points, leaf)
                (slope,) = torch.autograd.grad(value[torch.isfinite(value)].sum(), leaf)
            return value.detach(), slope

        if constants.shape[1] == 0:
            return self.log_likelihood(points, constants), points[..., :0]
        found = over_blocks(of_part, self.parts, points.device)
        return torch.cat([value for value, _ in found]), torch.cat([slope for _, slope in found])

    def _value(self, part: tuple[slice, Observations], points: Tensor, constants: Tensor) -> Tensor:
        rows, observations = part
        varying = points[rows]
        phi = interleave(self.population, varying, constants.expand(*varying.shape[:2], -1))
        found = self.simulator.log_likelihood(observations, phi)
        return torch.where(torch.isfinite(found), found, -torch.inf)


@dataclass(frozen=True, eq=False)
class Chains:
    """States of all chains, with log-likelihood and population density there."""

    points: Float[Tensor, "I C V"]
    likelihood: Float[Tensor, "I C"]
    prior: Float[Tensor, "I C"]


@dataclass(frozen=True, eq=False)
class Kernels:
    """Proposals of every individual.

    Args:
        laplace: heavy-tailed components around modes and along bent profiles, for independence proposals.
        shape: ``(I, V, V)`` factor of Laplace's covariance at the best mode.
        log_joint: ``(I,)`` log step of the walk in that shape.
        log_single: ``(I, V)`` log steps of the walks along coordinates, in SDs of that shape.
        exchanges: orders of the varying columns that exchange declared pairs.
        target: target share of accepted random-walk steps.
    """

    laplace: Mixtures
    shape: Float[Tensor, "I V V"]
    log_joint: Float[Tensor, " I"]
    log_single: Float[Tensor, "I V"]
    exchanges: tuple[tuple[int, ...], ...]
    target: float

    @classmethod
    def around(cls, joint: JointDensity, modes: LaplaceComponents, at: Expansion, *, target: float) -> Kernels:
        """From modes sorted by individual, the best of each first, and the expansions there.

        Where an individual's data say little about a parameter, chains mix badly with Laplace's component alone.
        """
        individuals, size = len(joint.observations), modes.means.shape[1]
        components = profile_components(joint, modes, at)
        mixed = mixtures(components, individuals, _SHARES, freedom=joint.proposal_freedom)
        ones = torch.ones(individuals, dtype=modes.means.dtype, device=modes.means.device)
        return cls(
            laplace=mixed,
            shape=mixtures(modes, individuals, 1).factors[:, 0],
            log_joint=(2.4 / size**0.5 * ones).log(),
            log_single=(2.4 * ones).log()[:, None].expand(-1, size).clone(),
            exchanges=tuple(tuple(order) for order in exchanged_columns(joint.simulator, joint.population)),
            target=target,
        )

    def recentre(self, joint: JointDensity, modes: LaplaceComponents, at: Expansion) -> Kernels:
        """Proposals around other modes, with the adapted step lengths."""
        fresh = Kernels.around(joint, modes, at, target=self.target)
        return replace(fresh, log_joint=self.log_joint, log_single=self.log_single)


@dataclass(frozen=True, eq=False)
class Acceptance:
    """Share of accepted proposals, ``(I,)`` by kernel; exchanges are empty where nothing is exchangeable."""

    independence: Float[Tensor, " I"]
    exchange: Float[Tensor, " I"]
    joint: Float[Tensor, " I"]
    single: Float[Tensor, " I"]

    @property
    def moved(self) -> Float[Tensor, " I"]:
        """Share of any of them."""
        return torch.stack([self.independence, self.joint, self.single]).mean(0)


def start_chains(data: CompleteData, theta: Float[Tensor, " P"], points: Float[Tensor, "I C V"]) -> Chains:
    """Chains at ``points``."""
    constants = data.population.constants(theta, data.observations.design)
    return Chains(points, data.log_likelihood(points, constants), population_density(data, points, theta))


def population_density(data: CompleteData, points: Tensor, theta: Tensor) -> Float[Tensor, "I C"]:
    """Population density of all chains."""
    with torch.no_grad():
        return data.population.log_prob(points, theta, data.observations.design)


def sweep_chains(
    data: CompleteData,
    chains: Chains,
    kernels: Kernels,
    theta: Float[Tensor, " P"],
    generator: torch.Generator,
    *,
    turn: int,
    rate: float,
) -> tuple[Chains, Kernels, Acceptance]:
    """Every kernel once; the walk along coordinates takes coordinate ``turn``, then the next.

    Args:
        data: likelihood of all data.
        chains: their states, with densities that belong to ``theta``.
        kernels: their proposals.
        theta: the population.
        generator: of proposals and acceptances.
        turn: number of the sweep.
        rate: how much steps adapt; 0 leaves them.
    """
    constants = data.population.constants(theta, data.observations.design)
    move = _acceptance_step(data, theta, constants, generator)
    proposed = draw_points(kernels.laplace, chains.points.shape[1], generator)
    log_q = kernels.laplace.log_prob(chains.points) - kernels.laplace.log_prob(proposed)
    chains, independence = move(chains, proposed, log_q)
    exchange = torch.zeros_like(independence[:, 0], dtype=chains.prior.dtype)
    for order in kernels.exchanges:
        # Its own inverse and of unit volume, so likelihood and population alone decide.
        chains, accepted = move(chains, chains.points[..., list(order)], torch.zeros_like(log_q))
        exchange = exchange + accepted.double().mean(1) / len(kernels.exchanges)
    noise = _normal(chains.points.shape, generator, chains.points)
    jump = (kernels.shape[:, None] @ noise[..., None])[..., 0] * kernels.log_joint.exp()[:, None, None]
    chains, joint = move(chains, chains.points + jump, torch.zeros_like(log_q))
    column = turn % chains.points.shape[2]
    sd = kernels.shape[:, column].norm(dim=1) * kernels.log_single[:, column].exp()
    along = torch.zeros_like(chains.points)
    along[..., column] = sd[:, None] * _normal(log_q.shape, generator, log_q)
    chains, single = move(chains, chains.points + along, torch.zeros_like(log_q))
    shares = [accepted.double().mean(1) for accepted in (independence, joint, single)]
    if rate > 0:
        log_single = kernels.log_single.clone()
        log_single[:, column] += rate * (shares[2] - kernels.target)
        log_joint = kernels.log_joint + rate * (shares[1] - kernels.target)
        kernels = replace(kernels, log_joint=log_joint, log_single=log_single)
    return chains, kernels, Acceptance(shares[0], exchange, shares[1], shares[2])


def draw_points(mixed: Mixtures, chains: int, generator: torch.Generator) -> Float[Tensor, "I C V"]:
    """Independent draws of the mixtures, one for each chain."""
    component = torch.multinomial(
        mixed.counts.double().to(generator.device), chains, replacement=True, generator=generator
    ).to(mixed.counts.device)
    individuals, size = mixed.means.shape[0], mixed.means.shape[2]
    standard = mixed.standard((individuals, chains, size), generator)
    every = torch.arange(individuals, device=component.device)[:, None]
    return mixed.means[every, component] + (mixed.factors[every, component] @ standard[..., None])[..., 0]


def _acceptance_step(
    data: CompleteData, theta: Tensor, constants: Tensor, generator: torch.Generator
) -> Callable[[Chains, Tensor, Tensor], tuple[Chains, Bool[Tensor, "I C"]]]:
    """Metropolis-Hastings: proposals and the log ratio of proposal densities (back over forth) -> accepted ones."""

    def move(chains: Chains, proposed: Tensor, log_q: Tensor) -> tuple[Chains, Tensor]:
        likelihood = data.log_likelihood(proposed, constants)
        prior = population_density(data, proposed, theta)
        gain = likelihood + prior - chains.likelihood - chains.prior + log_q
        chance = torch.rand(gain.shape, generator=generator, device=generator.device, dtype=gain.dtype)
        accepted = chance.log().to(gain.device) < gain  # false where the gain is NaN
        return Chains(
            torch.where(accepted[..., None], proposed, chains.points),
            torch.where(accepted, likelihood, chains.likelihood),
            torch.where(accepted, prior, chains.prior),
        ), accepted

    return move


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
