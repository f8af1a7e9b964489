r"""Chains at a fixed theta: whether it is a maximum of the likelihood, and how uncertain a search that ended there is.

With :math:`s_i` the complete-data score of an individual, the mean of :math:`\sum_i s_i` over draws of the parameters
given the data is the score of the observed data (Fisher), and the complete information minus
:math:`\sum_i \mathrm{Cov}(s_i)` their information (Louis 1982, J. R. Stat. Soc. B 44:226). Their quotient is how far
theta is from the maximum; nothing in it comes from importance sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.saem.complete_data import (
    constants_information,
    constants_jacobian,
    population_information,
    population_scores,
)
from nlme_sbi.population.estimators.saem.mcmc import Acceptance, Chains, CompleteData, Kernels, sweep_chains
from nlme_sbi.population.objective.standard_errors import covariance_from

_BATCHES = 10  # of consecutive members of a sequence, whose means give the standard error of its mean
_CURVED = 10  # sweeps between evaluations of the complete information


@dataclass(frozen=True, eq=False)
class StationaryPoint:
    """Results of chains at a fixed theta, over the free unknowns.

    Args:
        se: standard errors of the estimates from Louis' information.
        left: estimate minus the maximum that score and information point to.
        left_se: Monte-Carlo standard error of ``left``.
        sweep_se: Monte-Carlo standard error that the mean over one sweep's scores would have; over n sweeps it is
            smaller by the root of n.
        moved: share of accepted proposals of every individual.
        acceptance: mean shares by kernel.
    """

    se: Float[Tensor, " free"]
    left: Float[Tensor, " free"]
    left_se: Float[Tensor, " free"]
    sweep_se: Float[Tensor, " free"]
    moved: Float[Tensor, " I"]
    acceptance: dict[str, float]


def check_stationarity(
    data: CompleteData,
    chains: Chains,
    kernels: Kernels,
    theta: Float[Tensor, " P"],
    generator: torch.Generator,
    *,
    sweeps: int,
) -> tuple[StationaryPoint, Chains]:
    """``sweeps`` sweeps at ``theta``, at least 20; the chains' densities must belong to it."""
    free = data.population.unknowns.free.to(theta.device)
    constants = data.population.constants(theta, data.observations.design)
    jacobian = constants_jacobian(data, theta, free)
    totals, informations, accepted = [], [], []
    individuals, squares = torch.zeros((len(free), len(constants))).to(theta), torch.zeros((len(free),) * 2).to(theta)
    for turn in range(sweeps):
        chains, kernels, shares = sweep_chains(data, chains, kernels, theta, generator, turn=turn, rate=0.0)
        accepted.append(shares)
        slopes = data.with_slopes(chains.points, constants)[1]
        scores = population_scores(data, chains.points, theta, free) + torch.einsum("eiw,icw->eic", jacobian, slopes)
        totals.append(scores.mean(2).sum(1))
        individuals += scores.mean(2) / sweeps
        squares += torch.einsum("eic,fic->ef", scores, scores) / (sweeps * scores.shape[2])
        if turn % _CURVED == 0:
            informations.append(
                population_information(data, chains.points, theta, free)
                + constants_information(data, chains.points, constants, slopes, jacobian)
            )
    score = torch.stack(totals)
    missing = squares - individuals @ individuals.T
    covariance = _covariance(torch.stack(informations).mean(0), missing, individuals)
    noise = covariance @ mean_covariance(score) @ covariance
    noise_se = noise.diagonal().clamp_min(0).sqrt()
    return StationaryPoint(
        se=covariance.diagonal().sqrt(),
        left=-covariance @ score.mean(0),
        left_se=noise_se,
        sweep_se=noise_se * sweeps**0.5,
        moved=torch.stack([shares.moved for shares in accepted]).mean(0),
        acceptance=_shares(accepted, exchangeable=bool(kernels.exchanges)),
    ), chains


def _covariance(complete: Tensor, missing: Tensor, individuals: Float[Tensor, "free I"]) -> Float[Tensor, "free free"]:
    """Inverse information by Louis; where its Monte-Carlo error leaves no information, from outer products of scores,
    made positive definite."""
    found = covariance_from(complete - missing)
    if found is not None:
        return found
    total = individuals @ individuals.T
    inverse: Tensor = torch.linalg.inv(total + torch.diag(0.05 * total.diagonal().clamp_min(1e-8)))
    return inverse


def _shares(accepted: list[Acceptance], *, exchangeable: bool) -> dict[str, float]:
    names = {"independence": "independence", "joint": "walks", "single": "coordinates"}
    if exchangeable:
        names["exchange"] = "exchanges"
    return {
        label: float(torch.stack([getattr(shares, name) for shares in accepted]).mean())
        for name, label in names.items()
    }


def mean_covariance(sequence: Float[Tensor, "n P"], *, batches: int = _BATCHES) -> Float[Tensor, "P P"]:
    """Covariance of the mean of a stationary, correlated sequence, from the means of consecutive batches."""
    size = len(sequence) // batches
    if size < 1:
        raise ValueError(f"{batches} batches need as many members; the sequence has {len(sequence)}.")
    means = sequence[len(sequence) - size * batches :].reshape(batches, size, -1).mean(1)
    centred = means - means.mean(0)
    return centred.T @ centred / (batches * (batches - 1))


def drift(sequence: Float[Tensor, "n P"]) -> Float[Tensor, " P"]:
    """Difference between the means of both halves in units of its own standard error, from batch means; 0 where the
    sequence does not move at all."""
    half = len(sequence) // 2
    early, late = sequence[:half], sequence[half:]
    variance = (mean_covariance(early) + mean_covariance(late)).diagonal()
    apart = late.mean(0) - early.mean(0)
    return torch.where(apart == 0, 0.0, apart / variance.clamp_min(1e-300).sqrt())
