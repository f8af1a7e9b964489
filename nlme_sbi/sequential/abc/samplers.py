"""Rejection, Markov chains, and sequential Monte Carlo, each with all its simulations in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.sequential.abc.problem import AbcDraws, AbcProblem, DistanceName, Metric, abc_draws
from nlme_sbi.sequential.abc.regression import adjust_by_regression

KernelName = Literal["multivariate", "componentwise"]
_FEWEST = 20  # accepted draws
_ROWS = 500  # whose kernel density is computed at once


@runtime_checkable
class AbcSampler(Protocol):
    """A way to draw parameters whose data lie near those of the observation."""

    @property
    def simulations(self) -> int:
        """Simulations that are spent at most."""

    def infer(self, problem: AbcProblem, generator: torch.Generator) -> AbcDraws:
        """Draws, with weights where they have any."""


@dataclass(frozen=True)
class _Abc:
    """What all samplers have: a budget, a distance, and whether draws are adjusted."""

    simulations: int = 10_000
    distance: DistanceName = "euclidean"
    regression: bool = False

    def __post_init__(self) -> None:
        if self.simulations < 10 * _FEWEST:
            raise ValueError(f"method.simulations must be at least {10 * _FEWEST}; got {self.simulations}.")

    def _finished(self, draws: AbcDraws, metric: Metric) -> AbcDraws:
        return adjust_by_regression(draws, metric) if self.regression else draws


@dataclass(frozen=True)
class AbcRejection(_Abc):
    """Draws from the prior whose data are the nearest ones, or nearer than a distance.

    Args:
        simulations: from the prior.
        distance: euclidean, manhattan or maximum, of statistics in units of their spread.
        regression: whether draws are adjusted by a local linear regression.
        quantile: share of the draws that is accepted.
        epsilon: distance up to which draws are accepted, in place of the share.
    """

    quantile: float = 0.01
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.quantile <= 1 or (self.epsilon is not None and not 0 < self.epsilon < math.inf):
            raise ValueError(
                "method.quantile must lie above 0 and up to 1, method.epsilon be positive or null; got "
                f"{self.quantile} and {self.epsilon}."
            )

    def infer(self, problem: AbcProblem, generator: torch.Generator) -> AbcDraws:
        """Accepted draws; raises ``ValueError`` where fewer than 20 are."""
        metric = problem.metric(self.distance, generator)
        phi = problem.prior.sample(self.simulations, generator)
        statistics = problem.simulate(phi, generator)
        distances = metric(statistics)
        count = math.ceil(self.quantile * self.simulations)
        accepted = (
            distances.topk(count, largest=False).indices
            if self.epsilon is None
            else torch.nonzero(distances <= self.epsilon)[:, 0]
        )
        accepted = accepted[torch.isfinite(distances[accepted])]
        _refuse_few(len(accepted), distances)
        draws = abc_draws(
            problem,
            phi[accepted],
            log_weights=None,
            distances=distances[accepted],
            statistics=statistics[accepted],
            simulations=self.simulations,
            epsilons=(float(distances[accepted].max()),),
        )
        return self._finished(draws, metric)


def _refuse_few(accepted: int, distances: Float[Tensor, " N"]) -> None:
    if accepted < _FEWEST:
        nearest = float(distances.kthvalue(min(_FEWEST, len(distances))).values)
        raise ValueError(
            f"{accepted} of {len(distances)} simulations are near enough, and {_FEWEST} are needed; take "
            f"method.epsilon={nearest:.3g}, or raise method.simulations or method.quantile."
        )


@dataclass(frozen=True)
class AbcMcmc(_Abc):
    """Markov chains whose proposals are accepted where their data are near enough; many chains side by side.

    A tenth of the simulations are drawn from the prior; the nearest start the chains, whose distance is the largest of
    theirs. Steps are normal with the covariance of the starts times ``2.38^2 / D``.

    Args:
        simulations: of all chains together.
        distance: euclidean, manhattan or maximum, of statistics in units of their spread.
        regression: whether draws are adjusted by a local linear regression.
        chains: number of chains.
        warmup: share of each chain that is left out.

    Source: Marjoram, Molitor, Plagnol and Tavaré (2003), PNAS 100:15324.
    """

    chains: int = 100
    warmup: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chains < _FEWEST or not 0 <= self.warmup < 1 or self.simulations < 20 * self.chains:
            raise ValueError(
                f"method.chains must be at least {_FEWEST}, with 20 simulations each, and method.warmup lie from 0 to "
                f"below 1; got {self.chains}, {self.simulations} simulations and {self.warmup}."
            )

    def infer(self, problem: AbcProblem, generator: torch.Generator) -> AbcDraws:
        """States of all chains after the warm-up."""
        metric = problem.metric(self.distance, generator)
        first = max(2 * self.chains, self.simulations // 10)
        phi = problem.prior.sample(first, generator)
        statistics = problem.simulate(phi, generator)
        distances = metric(statistics)
        nearest = distances.topk(self.chains, largest=False).indices
        epsilon = float(distances[nearest].max())
        if not math.isfinite(epsilon):
            _refuse_few(int(torch.isfinite(distances).sum()), distances)
        phi, statistics, distances = phi[nearest].double(), statistics[nearest], distances[nearest]
        factor = _root(torch.cov(phi.T).reshape(phi.shape[1], -1)) * 2.38 / math.sqrt(phi.shape[1])
        log_prior = problem.prior.log_prob(phi)
        steps = (self.simulations - first) // self.chains
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for step in range(steps):
            noise = torch.randn(phi.shape, generator=generator, dtype=phi.dtype, device=phi.device)
            proposal = phi + noise @ factor.T
            proposed_prior = problem.prior.log_prob(proposal)
            inside = torch.isfinite(proposed_prior)
            # What lies outside the prior is never accepted; the simulator sees the old place instead.
            made = problem.simulate(torch.where(inside[:, None], proposal, phi).float(), generator)
            away = metric(made)
            uniform = torch.rand(len(phi), generator=generator, dtype=phi.dtype, device=phi.device)
            taken = inside & (away <= epsilon) & (uniform.log() < proposed_prior - log_prior)
            phi = torch.where(taken[:, None], proposal, phi)
            statistics = torch.where(taken[:, None], made, statistics)
            distances, log_prior = (
                torch.where(taken, new, old) for new, old in ((away, distances), (proposed_prior, log_prior))
            )
            if step >= self.warmup * steps:
                kept.append((phi, statistics, distances))
        every = [torch.cat(parts) for parts in zip(*kept, strict=True)]
        draws = abc_draws(
            problem,
            every[0],
            log_weights=None,
            distances=every[2],
            statistics=every[1],
            simulations=first + steps * self.chains,
            epsilons=(epsilon,),
        )
        return self._finished(draws, metric)


@dataclass(frozen=True)
class AbcSmc(_Abc):
    """Populations of weighted draws at ever smaller distances, each a quantile of the last population's.

    Args:
        simulations: of all populations together; the last one that it completes is the result.
        distance: euclidean, manhattan or maximum, of statistics in units of their spread.
        regression: whether draws are adjusted by a local linear regression.
        particles: draws in a population.
        quantile: of the distances of one population that the next one must stay below.
        kernel: draws move by a normal with twice their covariance, ``multivariate``, or twice their variances,
            ``componentwise``.

    Source: Toni, Welch, Strelkowa, Ipsen and Stumpf (2009), J. R. Soc. Interface 6:187; Beaumont, Cornuet, Marin and
    Robert (2009), Biometrika 96:983, for weights and kernel.
    """

    particles: int = 500
    quantile: float = 0.5
    kernel: KernelName = "multivariate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.particles < _FEWEST or self.simulations < 2 * self.particles:
            raise ValueError(
                f"method.particles must be at least {_FEWEST}, and method.simulations at least twice as many; got "
                f"{self.particles} and {self.simulations}."
            )
        if not 0 < self.quantile < 1 or self.kernel not in ("multivariate", "componentwise"):
            raise ValueError(
                "method.quantile must lie between 0 and 1, method.kernel be multivariate or componentwise; got "
                f"{self.quantile} and {self.kernel}."
            )

    def infer(self, problem: AbcProblem, generator: torch.Generator) -> AbcDraws:
        """The last population with its weights."""
        metric = problem.metric(self.distance, generator)
        phi = problem.prior.sample(self.particles, generator).double()
        statistics = problem.simulate(phi.float(), generator)
        distances = metric(statistics)
        if int(torch.isfinite(distances).sum()) < _FEWEST:
            _refuse_few(int(torch.isfinite(distances).sum()), distances)
        finite = torch.isfinite(distances)
        phi, statistics, distances = phi[finite], statistics[finite], distances[finite]
        log_weights = torch.zeros_like(distances)
        epsilons, spent = [float(distances.max())], self.particles
        while spent < self.simulations:
            wanted = float(torch.quantile(distances, self.quantile))
            found = self._population(
                problem, metric, phi, log_weights, epsilon=wanted, left=self.simulations - spent, generator=generator
            )
            spent += found.simulations
            if found.phi is None:
                break
            phi, log_weights = found.phi, found.log_weights
            statistics, distances = found.statistics, found.distances
            epsilons.append(wanted)
        draws = abc_draws(
            problem,
            phi,
            log_weights=log_weights,
            distances=distances,
            statistics=statistics,
            simulations=spent,
            epsilons=tuple(epsilons),
        )
        return self._finished(draws, metric)

    def _population(
        self,
        problem: AbcProblem,
        metric: Metric,
        phi: Float[Tensor, "S D"],
        log_weights: Float[Tensor, " S"],
        *,
        epsilon: float,
        left: int,
        generator: torch.Generator,
    ) -> _NextPopulation:
        """Move draws of the last population until enough lie within ``epsilon``, or the simulations are used up."""
        weights = log_weights.softmax(0)
        centred = phi - (weights[:, None] * phi).sum(0)
        covariance = 2 * centred.T @ (weights[:, None] * centred)
        if self.kernel == "componentwise":
            covariance = torch.diag(covariance.diagonal())
        factor = _root(covariance)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        accepted = spent = 0
        while accepted < self.particles and spent < left:
            rate = max(0.02, accepted / spent) if spent else 1.0
            size = min(left - spent, max(50, math.ceil((self.particles - accepted) / rate)))
            chosen = torch.multinomial(weights, size, replacement=True, generator=generator)
            noise = torch.randn((size, phi.shape[1]), generator=generator, dtype=phi.dtype, device=phi.device)
            proposal = phi[chosen] + noise @ factor.T
            # What lies outside the prior needs no simulation.
            proposal = proposal[torch.isfinite(problem.prior.log_prob(proposal))]
            spent += max(1, len(proposal))
            if not len(proposal):
                continue
            made = problem.simulate(proposal.float(), generator)
            away = metric(made)
            near = away <= epsilon
            parts.append((proposal[near], made[near], away[near]))
            accepted += int(near.sum())
        if accepted < self.particles:
            return _NextPopulation(None, log_weights, phi, log_weights, spent)
        moved, statistics, distances = (torch.cat(column)[: self.particles] for column in zip(*parts, strict=True))
        log_density = log_weights.log_softmax(0)
        mixtures = []
        for start in range(0, len(moved), _ROWS):
            some = moved[start : start + _ROWS]
            whitened = torch.linalg.solve_triangular(factor, (some[:, None] - phi).mT, upper=False)
            mixtures.append(torch.logsumexp(log_density - 0.5 * whitened.square().sum(1), 1))
        found = problem.prior.log_prob(moved) - torch.cat(mixtures)
        return _NextPopulation(moved, found, statistics, distances, spent)


@dataclass(frozen=True, eq=False)
class _NextPopulation:
    """A population, or None in ``phi`` where the simulations were used up before it was whole."""

    phi: Float[Tensor, "S D"] | None
    log_weights: Float[Tensor, " S"]
    statistics: Tensor
    distances: Tensor
    simulations: int


def _root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Lower Cholesky factor, of a covariance that may be singular."""
    jitter = 1e-12 * covariance.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor: Tensor = torch.linalg.cholesky(covariance + jitter * eye)
    return factor
