r"""Exact posteriors of a few individuals by long Markov chains, as something to compare a network's draws with.

Several independent ensembles of walkers for every individual, all moved at once. A step is one of two moves: stretches
of each half of the walkers along the other half (Goodman and Weare 2010), which need no tuning because they are affine-
invariant; and, every fifth step, proposals from the network with the Metropolis-Hastings correction, which carry
walkers between modes that the network knows. Where the simulator declares exchangeable parameters, walkers are swapped
too, so that both labellings are visited. Walkers start at network draws that are chosen by their exact weights.

Ensembles that do not agree (rank-normalised split R-hat) are reported and not used.

Source: Goodman and Weare (2010), Comm. Appl. Math. Comput. Sci. 5:65; Vehtari et al. (2021), Bayesian Analysis 16:667.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.diagnostics.network.agreement_with_exact import exact_log_weights
from nlme_sbi.numerics.mcmc_diagnostics import bulk_ess, split_rhat
from nlme_sbi.numerics.weighted_draws import require_densities
from nlme_sbi.posteriors import Posterior
from nlme_sbi.types import Observations, TractableSimulator

LARGEST_RHAT = 1.05
_INDEPENDENT_EVERY = 5
_STRETCH = 2.0
_EFFECTIVE_STARTS = 50.0


@dataclass(frozen=True)
class ChainSettings:
    """Lengths of the chains.

    Args:
        ensembles: independent ones, at least 2, which are compared.
        walkers: in each, even and more than twice the parameters.
        warmup: steps that are thrown away.
        steps: steps that count.
    """

    ensembles: int = 4
    walkers: int = 32
    warmup: int = 600
    steps: int = 600

    def __post_init__(self) -> None:
        if self.ensembles < 2 or self.walkers < 4 or self.walkers % 2 or min(self.warmup, self.steps) < 10:
            raise ValueError("Long chains need 2 ensembles, 4 walkers (an even number), 10 steps and as many before.")


@dataclass(frozen=True, eq=False)
class LongChains:
    """Draws of the chains of ``I`` individuals, with diagnostics.

    Args:
        phi: ``(I, M, D)`` draws, thinned; of all ensembles.
        rhat: ``(I,)`` the largest over parameters and log density; above 1.05 the draws are not to be used.
        ess: ``(I,)`` the smallest bulk effective number of draws over parameters.
        accepted: ``(I,)`` share of stretches that were accepted.
    """

    phi: Float[Tensor, "I M D"]
    rhat: Float[np.ndarray, " I"]
    ess: Float[np.ndarray, " I"]
    accepted: Float[np.ndarray, " I"]

    @property
    def converged(self) -> np.ndarray:
        """``(I,)`` whether ensembles agree."""
        return np.asarray(self.rhat < LARGEST_RHAT)


@torch.no_grad()
def long_chains(
    posterior: Posterior,
    simulator: TractableSimulator,
    observations: Observations,
    *,
    generator: torch.Generator,
    settings: ChainSettings | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> LongChains:
    """Draws from ``p(phi | y)`` under the training prior for a few individuals.

    Args:
        posterior: gives starts and proposals; it decides how fast chains mix, never where they end.
        simulator: with a likelihood.
        observations: of the few, on the device of the generator.
        generator: of everything random.
        settings: lengths.
        advance: called with the number of steps just finished.

    Raises:
        ValueError: for fewer walkers than twice the parameters, or an individual of whose draws none is possible.
    """
    chosen = settings or ChainSettings()
    if chosen.walkers <= 2 * len(posterior.parameters):
        raise ValueError(f"{chosen.walkers} walkers are too few; take more than {2 * len(posterior.parameters)}.")
    target = _Target(posterior, simulator, observations)
    sampler = _Sampler(target, chosen, generator, _pairs(simulator))
    kept, log_densities = [], []
    for step in range(chosen.warmup + chosen.steps):
        sampler.step(step)
        advance(1)
        if step >= chosen.warmup:
            kept.append(sampler.phi.clone())
            log_densities.append(sampler.log_density.clone())
    return _summarise(torch.stack(kept, -2), torch.stack(log_densities, -1), sampler.accepted / sampler.proposed)


def _pairs(simulator: TractableSimulator) -> list[tuple[int, int]]:
    """Columns that may be exchanged."""
    declared: Sequence[tuple[str, str]] = getattr(simulator, "exchangeable", ())
    names = simulator.parameters.names
    return [(names.index(first), names.index(second)) for first, second in declared]


@dataclass(frozen=True, eq=False)
class _Target:
    posterior: Posterior
    simulator: TractableSimulator
    observations: Observations

    def __call__(self, phi: Float[Tensor, "I *batch D"]) -> Float[Tensor, " I *batch"]:
        """Log of likelihood times prior; -inf where either is not a number."""
        flat = phi.flatten(1, -2)
        found = self.simulator.log_likelihood(self.observations, flat) + self.posterior.prior.log_prob(flat)
        return torch.nan_to_num(found, nan=-torch.inf, neginf=-torch.inf).reshape(phi.shape[:-1])

    def log_q(self, phi: Float[Tensor, "I *batch D"]) -> Float[Tensor, " I *batch"]:
        """Log density of the network."""
        return self.posterior.log_prob(phi.flatten(1, -2), self.observations).double().reshape(phi.shape[:-1])


class _Sampler:
    """State ``phi (I, K, W, D)`` of all walkers, float64, and the moves."""

    def __init__(
        self,
        target: _Target,
        settings: ChainSettings,
        generator: torch.Generator,
        pairs: list[tuple[int, int]],
    ) -> None:
        self.target, self.settings, self.generator, self.pairs = target, settings, generator, pairs
        self.phi = self._starts()
        self.log_density = target(self.phi)
        self.log_q = target.log_q(self.phi)
        individuals = self.phi.shape[0]
        self.accepted = torch.zeros(individuals, dtype=torch.float64, device=self.phi.device)
        self.proposed = 0

    def step(self, number: int) -> None:
        """One move of all walkers."""
        if number % _INDEPENDENT_EVERY == 0:
            self._from_the_network()
        else:
            self._stretch()
        for pair in self.pairs:
            self._swap(pair)

    def _starts(self) -> Float[Tensor, "I K W D"]:
        """Network draws chosen by exact weights, flattened until 50 of them count; labels mixed."""
        count = self.settings.ensembles * self.settings.walkers
        drawn = self.target.posterior.sample(self.target.observations, max(2000, 4 * count), self.generator)
        log_weights, _ = exact_log_weights(self.target.simulator, self.target.observations, drawn)
        if bool(torch.isneginf(log_weights).all(1).any()):
            raise ValueError("No draw of an individual has a likelihood above 0, so that chains cannot start.")
        weights = torch.stack([_flatten(row) for row in log_weights])
        chosen = torch.multinomial(weights, count, generator=self.generator)
        starts = drawn.phi.double().gather(1, chosen[..., None].expand(-1, -1, drawn.phi.shape[2]))
        for pair in self.pairs:
            starts = torch.where(self._uniform(starts.shape[:2])[..., None] < 0.5, _exchange(starts, pair), starts)
        return starts.reshape(len(starts), self.settings.ensembles, self.settings.walkers, -1)

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64, device=self.generator.device)

    def _stretch(self) -> None:
        half, dimension = self.settings.walkers // 2, self.phi.shape[-1]
        # Which walkers are the one half changes, so that no two are for ever in the same.
        order = torch.randperm(self.settings.walkers, generator=self.generator, device=self.generator.device)
        for own, other in ((order[:half], order[half:]), (order[half:], order[:half])):
            current, partners = self.phi[:, :, own], self.phi[:, :, other]
            picked = torch.randint(half, current.shape[:3], generator=self.generator, device=current.device)
            partner = partners.gather(2, picked[..., None].expand_as(current))
            factor = ((_STRETCH - 1) * self._uniform(current.shape[:3]) + 1).square() / _STRETCH
            proposal = partner + factor[..., None] * (current - partner)
            log_ratio = (dimension - 1) * factor.log()
            taken = self._accept(own, proposal, log_ratio)
            self.accepted += taken.double().mean((1, 2))
            self.proposed += 1

    def _accept(self, own: Tensor, proposal: Tensor, log_ratio: Tensor) -> Tensor:
        found = self.target(proposal)
        taken = self._uniform(found.shape).log() < found - self.log_density[:, :, own] + log_ratio
        self.phi[:, :, own] = torch.where(taken[..., None], proposal, self.phi[:, :, own])
        self.log_density[:, :, own] = torch.where(taken, found, self.log_density[:, :, own])
        return taken

    def _from_the_network(self) -> None:
        individuals, ensembles, walkers = self.phi.shape[:3]
        drawn = self.target.posterior.sample(self.target.observations, ensembles * walkers, self.generator)
        proposal = drawn.phi.double().reshape(self.phi.shape)
        log_q = require_densities(drawn, "Proposing draws of the posterior").double()
        log_q = log_q.reshape(individuals, ensembles, walkers)
        every = torch.arange(walkers, device=self.phi.device)
        self._accept(every, proposal, self.target.log_q(self.phi) - log_q)

    def _swap(self, pair: tuple[int, int]) -> None:
        """Half of the walkers propose the other labelling; where the prior is the same for both, all accept."""
        proposal = _exchange(self.phi, pair)
        is_proposed = self._uniform(self.log_density.shape) < 0.5
        prior = self.target.posterior.prior
        log_ratio = prior.log_prob(proposal) - prior.log_prob(self.phi)  # the likelihood does not change
        taken = is_proposed & (self._uniform(self.log_density.shape).log() < log_ratio)
        self.phi = torch.where(taken[..., None], proposal, self.phi)
        self.log_density = torch.where(taken, self.log_density + log_ratio, self.log_density)


def _exchange(phi: Float[Tensor, "*batch D"], pair: tuple[int, int]) -> Float[Tensor, "*batch D"]:
    order = list(range(phi.shape[-1]))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    return phi[..., order]


def _flatten(log_weights: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Weights to a power at which 50 of them are effective, at most 1."""
    power = 1.0
    while True:
        weights = torch.softmax(power * log_weights, 0)
        if float(1 / weights.square().sum()) >= _EFFECTIVE_STARTS or power < 1e-3:
            # Without replacement there must be enough that can be chosen at all.
            return weights + 1e-12 / len(weights)
        power /= 1.5


def _summarise(
    phi: Float[Tensor, "I K W T D"], log_density: Float[Tensor, "I K W T"], accepted: Float[Tensor, " I"]
) -> LongChains:
    """R-hat compares ensembles: the walkers of one depend on each other and are joined into one chain."""
    individuals, ensembles, walkers, steps, parameters = phi.shape
    every = torch.cat([phi, log_density[..., None]], -1).cpu().numpy()
    rhat, ess = np.zeros(individuals), np.zeros(individuals)
    for who in range(individuals):
        # Means over walkers differ between ensembles and halves where the ensembles have not converged.
        chains = every[who].transpose(0, 2, 1, 3).reshape(ensembles, steps * walkers, parameters + 1)
        rhat[who] = max(split_rhat(chains[..., column]) for column in range(parameters + 1))
        single = every[who].reshape(ensembles * walkers, steps, parameters + 1)
        ess[who] = min(bulk_ess(single[..., column]) for column in range(parameters))
    thinned = phi.movedim(3, 1).flatten(1, 3)  # time first, so that every stretch of it holds all walkers
    return LongChains(thinned, rhat, ess, accepted.cpu().numpy())
