r"""Individuals when the population is not known exactly: draws for every draw of theta.

Those that were measured follow :math:`\int p(\phi \mid y_i, \theta)\, p(\theta \mid y)\, d\theta`. For each draw of
theta one of the stored draws of :math:`p(\phi \mid y_i, \hat\theta)` is chosen with weights
:math:`p(v \mid \theta)/p(v \mid \hat\theta)`; where constants differ between the two, among a few candidates so chosen,
with the ratio of the likelihoods at both values (sampling-importance-resampling, Rubin 1988). Nothing is drawn from the
simulator or the network again. New individuals are drawn from the population itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.types import Design

_CANDIDATES = 16  # among which a constant's new value chooses
_NUMBERS = 4_000_000  # weights in a block of individuals

LogLikelihood = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class IndividualsOverTheta:
    """``phi (I, K, D)``, one draw for each of K draws of theta; ``support (I,)``, the share of the stored draws that
    stays effective, on average over theta: near 0 the stored draws do not cover the individuals' posteriors at these
        theta."""

    phi: Float[Tensor, "I K D"]
    support: Float[Tensor, " I"]


@torch.no_grad()
def individuals_over_theta(
    draws: Float[Tensor, "I S D"],
    estimate: Float[Tensor, " P"],
    thetas: Float[Tensor, "K P"],
    population: PopulationModel,
    design: Design,
    *,
    log_likelihood: LogLikelihood,
    generator: torch.Generator,
) -> IndividualsOverTheta:
    """A draw of every measured individual for each draw of theta.

    Args:
        draws: of ``p(phi | y_i, estimate)``.
        estimate: theta that the draws were made for.
        thetas: draws of theta.
        population: the bound model.
        design: of the individuals' data, on the device of the draws.
        log_likelihood: ``(phi (i, n, D), rows (i,)) -> (i, n)``, up to a constant of each individual; asked only where
            constants differ.
        generator: of the choices.
    """
    individuals, stored = draws.shape[:2]
    step = max(1, _NUMBERS // (len(thetas) * stored))
    parts = []
    for rows in torch.split(torch.arange(individuals, device=draws.device), step):
        some = design[rows]
        before, after = population.constants(estimate, some), [population.constants(one, some) for one in thetas]
        weights = _weights(draws[rows], estimate, thetas, population, some)
        support = (1 / weights.square().sum(2)).mean(1) / stored
        moved = any(not torch.equal(before, one) for one in after)
        count = _CANDIDATES if moved else 1
        index = _choose(weights, _stratified_uniforms(len(rows), len(thetas), count, generator).to(draws.device))
        phi = draws[rows].gather(1, index.flatten(1)[..., None].expand(-1, -1, draws.shape[2]))
        phi = phi.reshape(len(rows), len(thetas), count, -1)
        if moved:
            columns = torch.tensor(population.constant, dtype=torch.int64, device=draws.device)
            phi = _with_new_constants(phi, torch.stack(after, 1), columns, rows, log_likelihood, generator)
        parts.append((phi[:, :, 0], support))
    return IndividualsOverTheta(torch.cat([phi for phi, _ in parts]), torch.cat([support for _, support in parts]))


@torch.no_grad()
def new_individuals(
    population: PopulationModel, thetas: Float[Tensor, "K P"], design: Design, generator: torch.Generator
) -> Float[Tensor, "N K D"]:
    """A new individual for each row of the design and each draw of theta."""
    return torch.stack([population.sample(theta, design, generator) for theta in thetas], 1)


def _weights(
    draws: Tensor, estimate: Tensor, thetas: Tensor, population: PopulationModel, design: Design
) -> Float[Tensor, "i K S"]:
    varying = draws[..., list(population.varying)]
    base = population.log_prob(varying, estimate, design)
    log_weights = torch.stack([population.log_prob(varying, theta, design) - base for theta in thetas], 1)
    return torch.softmax(log_weights, 2)


def _stratified_uniforms(
    individuals: int, draws: int, count: int, generator: torch.Generator
) -> Float[Tensor, "i K c"]:
    """Uniform numbers of which one lies in each of equal strata, in random order: so that the stored draws are used
    evenly."""
    shape = (individuals, draws * count)
    order = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).argsort(1)
    jitter = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return ((order + jitter) / shape[1]).reshape(individuals, draws, count)


def _choose(weights: Float[Tensor, "i K S"], uniform: Float[Tensor, "i K c"]) -> Int[Tensor, "i K c"]:
    """Positions of the draws in which the uniform numbers fall."""
    ends = weights.cumsum(2)
    return torch.searchsorted(ends.contiguous(), (uniform * ends[..., -1:]).contiguous()).clamp_max(
        weights.shape[2] - 1
    )


def _with_new_constants(
    phi: Float[Tensor, "i K c D"],
    constants: Float[Tensor, "i K W"],
    columns: Tensor,
    rows: Tensor,
    log_likelihood: LogLikelihood,
    generator: torch.Generator,
) -> Float[Tensor, "i K 1 D"]:
    """One of the candidates, by the ratio of the likelihoods at the new and the old constants."""
    count = phi.shape[2]
    moved = phi.clone()
    moved[..., columns] = constants[:, :, None]
    values = [log_likelihood(one.flatten(1, 2), rows).to(phi).reshape(phi.shape[:3]) for one in (moved, phi)]
    change = (values[0] - values[1]).nan_to_num(-torch.inf, neginf=-torch.inf)
    # Where no candidate has a likelihood above 0, all are equal.
    change = torch.where(torch.isfinite(change).any(2, keepdim=True), change, 0.0)
    uniform = torch.rand((*phi.shape[:2], 1), generator=generator, device=generator.device, dtype=torch.float64)
    index = _choose(torch.softmax(change, 2), uniform.to(phi.device)).clamp_max(count - 1)
    return moved.gather(2, index[..., None].expand(-1, -1, -1, phi.shape[3]))
