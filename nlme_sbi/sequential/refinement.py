r"""Refinement by the likelihood: a posterior's draws become draws from the exact posterior.

Draws get the weights :math:`p(y \mid \phi)\, p(\phi) / q(\phi \mid y)`, whose largest are smoothed by a Pareto tail,
and are resampled by them. Where the weights are too uneven for that, the draws go through a sequence of densities
between ``q`` and the posterior, each so near the last that half of the weights stay effective. In both cases they are
then moved by Markov chains, all draws as one batch, until four fifths of them count as independent or the steps are
used up. How many independent draws the result is worth is told.

Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, J. Mach. Learn. Res.
25(72); Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers, J. R. Stat. Soc. B 68:411; ter Braak
(2006), Stat. Comput. 16:239, for moves by differences of other draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.vectors import has_likelihood
from nlme_sbi.numerics.pareto_k import UNRELIABLE, pareto_shape, smooth_log_weights
from nlme_sbi.numerics.weighted_draws import require_densities
from nlme_sbi.posteriors import Posterior, PosteriorSamples
from nlme_sbi.types import Observations, Prior, Simulator

_FLAT = 0.5  # share of weights that stays effective from one density to the next
_MOST_DENSITIES = 100
_WORTH = 0.8  # effective share of the draws at which moves end
_FEWEST_MOVES = 5  # which draws that were resampled twice need to differ
_LEAST_WEIGHTED = 100  # effective draws from which resampling alone is a beginning
_ROWS = 20_000  # parameters whose likelihood is evaluated at once


@runtime_checkable
class SimulatorWithLikelihood(Protocol):
    """A simulator whose likelihood can be evaluated, with or without a noise-free prediction."""

    def log_likelihood(self, observations: Observations, phi: Tensor) -> Tensor:
        """``log p(y_i | phi)`` for ``phi (I, ..., D)``, ``(I, ...)``."""


@dataclass(frozen=True)
class Refinement:
    """How draws are refined.

    Args:
        candidates: draws of the posterior that are weighted.
        moves: most moves of every draw at the end.
        stage_moves: moves after each density on the way, where weights are too uneven.
    """

    candidates: int = 50_000
    moves: int = 100
    stage_moves: int = 5

    def __post_init__(self) -> None:
        if self.candidates < 1000 or min(self.moves, self.stage_moves) < 1:
            raise ValueError(
                "refinement.candidates must be at least 1000, moves and stage_moves at least 1; got "
                f"{self.candidates}, {self.moves} and {self.stage_moves}."
            )


@dataclass(frozen=True, eq=False)
class RefinedDraws:
    """Draws from the exact posterior of one individual, and what they are worth.

    Args:
        samples: ``phi (1, S, D)``, all of equal weight.
        effective: number of independent draws that they are worth.
        weighted: effective number of the weighted candidates, before anything was moved.
        shape: Pareto k-hat of the weights.
        densities: how many densities the draws went through, the first and the last included; 1 where resampling was
            enough.
        moves: of every draw under the posterior itself.
        accepted: share of these moves that was accepted.
    """

    samples: PosteriorSamples
    effective: float
    weighted: float
    shape: float
    densities: int
    moves: int
    accepted: float

    @property
    def sentence(self) -> str:
        """What was done and what it is worth, for people."""
        draws = self.samples.phi.shape[1]
        way = (
            f"weights resampled ({self.weighted:.0f} effective)"
            if self.densities == 1
            else f"weights too uneven (k-hat {self.shape:.2f}, {self.weighted:.0f} effective), so draws went through "
            f"{self.densities} densities"
        )
        worth = f"{draws} draws, worth {self.effective:.0f} independent ones"
        doubt = "" if self.is_reliable else " Too few: raise refinement.moves or refinement.candidates."
        return f"{worth}: {way}, then {self.moves} moves each, {self.accepted:.0%} accepted.{doubt}"

    @property
    def is_reliable(self) -> bool:
        """Whether the draws are worth at least 100 independent ones."""
        return self.effective >= _LEAST_WEIGHTED


@torch.no_grad()
def refine_draws(
    posterior: Posterior,
    simulator: Simulator | SimulatorWithLikelihood,
    observation: Observations,
    draws: int,
    generator: torch.Generator,
    *,
    settings: Refinement | None = None,
) -> RefinedDraws:
    """Draws from the exact posterior of one individual, from those of an approximate one.

    Args:
        posterior: gives candidates with a density, such as a network; it decides how well this works, never its result.
        simulator: with a likelihood, or a likelihood that was learned (:class:`nlme_sbi.LearnedLikelihood`).
        observation: of the individual.
        draws: S, that are wanted.
        generator: of everything random.
        settings: ``Refinement()`` when left out.

    Raises:
        ValueError: the simulator has no likelihood, or no candidate has any.
    """
    if not has_likelihood(simulator) or not isinstance(simulator, SimulatorWithLikelihood):
        raise ValueError(
            f"Refinement needs a likelihood, and {type(simulator).__name__} has none; leave it out (refinement=null)."
        )
    chosen = settings or Refinement()
    target = _Target(simulator, posterior, observation)
    drawn = posterior.sample(observation, max(chosen.candidates, draws), generator)
    phi = drawn.phi[0].double()
    log_q = require_densities(drawn, "Refinement")[0].double()
    log_target = target(phi)
    log_weights = log_target - log_q
    if bool(torch.isneginf(log_weights).all()):
        raise ValueError(
            f'No draw of the posterior has any likelihood for individual "{observation.ids[0]}": the network has '
            "missed the data altogether, or the prior does not cover them. Simulate more, or widen the prior."
        )
    shape = float(pareto_shape(log_weights[None])[0])
    smoothed = smooth_log_weights(log_weights[None])[0]
    weighted = _effective(smoothed)
    even = shape <= UNRELIABLE and weighted >= _LEAST_WEIGHTED
    population = _Population(phi, log_q, log_target)
    if even:
        population, densities, known = population.resampled(smoothed, draws, generator), 1, weighted
    else:
        population, densities = _through_densities(population, target, draws, chosen, generator)
        known = _FLAT * draws
    begin = population.phi
    accepted, moves, effective = 0.0, 0, 0.0
    while moves < chosen.moves and (effective < _WORTH * draws or moves < _FEWEST_MOVES):
        population, share = _move(population, target, 1.0, generator)
        accepted, moves = accepted + share, moves + 1
        # The mean of the beginning is known to 1/known of the variance, and a share of it is remembered.
        remembered = _correlation(begin, population.phi)
        effective = min(float(draws), 1 / (remembered**2 / known + (1 - remembered**2) / draws))
    samples = PosteriorSamples(drawn.names, population.phi[None].to(drawn.phi.dtype), None, posterior.prior)
    return RefinedDraws(samples, effective, weighted, shape, densities, moves, accepted / moves)


@dataclass(frozen=True, eq=False)
class _Target:
    """Log of likelihood times prior, and density of the posterior that draws come from."""

    simulator: SimulatorWithLikelihood
    posterior: Posterior
    observation: Observations

    @property
    def prior(self) -> Prior:
        return self.posterior.prior

    def __call__(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        parts = []
        for start in range(0, len(phi), _ROWS):
            some = phi[start : start + _ROWS]
            log_prior = self.prior.log_prob(some)
            found = self.simulator.log_likelihood(self.observation, some[None])[0] + log_prior
            found = torch.where(torch.isneginf(log_prior), -torch.inf, found)
            parts.append(torch.nan_to_num(found, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf))
        return torch.cat(parts)

    def log_q(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Log density under the posterior that draws come from."""
        return self.posterior.log_prob(phi[None], self.observation)[0].double()


@dataclass(frozen=True, eq=False)
class _Population:
    """Draws ``(N, D)`` with both densities; ``log_q`` is not followed once the posterior itself is the target."""

    phi: Float[Tensor, "N D"]
    log_q: Float[Tensor, " N"]
    log_target: Float[Tensor, " N"]

    def __getitem__(self, rows: Tensor) -> _Population:
        return _Population(self.phi[rows], self.log_q[rows], self.log_target[rows])

    def resampled(self, log_weights: Float[Tensor, " N"], count: int, generator: torch.Generator) -> _Population:
        """``count`` draws that stand for the weighted ones with equal weights, in random order (systematic)."""
        ends = torch.softmax(log_weights, 0).cumsum(0)
        start = torch.rand((), generator=generator, dtype=ends.dtype, device=ends.device)
        quantiles = (torch.arange(count, dtype=ends.dtype, device=ends.device) + start) / count
        places = torch.searchsorted(ends, quantiles * ends[-1]).clamp_max(len(ends) - 1)
        return self[places[torch.randperm(count, generator=generator, device=places.device)]]


def _effective(log_weights: Float[Tensor, " N"]) -> float:
    weights = torch.softmax(log_weights, 0)
    return float(1 / weights.square().sum())


def _through_densities(
    population: _Population, target: _Target, draws: int, settings: Refinement, generator: torch.Generator
) -> tuple[_Population, int]:
    """From ``q`` to the posterior by powers of their ratio, each as large as half of the weights allow."""
    order = torch.randperm(len(population.phi), generator=generator, device=population.phi.device)[:draws]
    # Draws without any likelihood cannot go on; with none left the last lines of refine_draws would have refused.
    current, power, count = population[order], 0.0, 0
    if bool(torch.isneginf(current.log_target).all()):
        current = population
    while power < 1 and count < _MOST_DENSITIES:
        ratio = current.log_target - current.log_q
        step = _largest_step(ratio, 1 - power)
        power, count = min(1.0, power + step), count + 1
        current = current.resampled(step * ratio, draws, generator)
        for _ in range(settings.stage_moves):
            current, _ = _move(current, target, power, generator)
    if power < 1:
        raise ValueError(
            f"After {count} densities the draws are still far from the posterior (power {power:.2g}): the network is "
            "too far away to start from. Simulate more, or narrow the prior."
        )
    return current, count + 1


def _largest_step(ratio: Float[Tensor, " N"], most: float) -> float:
    """The largest power at which half of the weights of the draws with any likelihood stay effective."""
    possible = ratio[~torch.isneginf(ratio)]
    wanted = _FLAT * len(possible)
    if _effective(most * possible) >= wanted:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _effective(middle * possible) >= wanted else (low, middle)
    return max(low, 1e-6)


def _move(current: _Population, target: _Target, power: float, generator: torch.Generator) -> tuple[_Population, float]:
    """Move both halves in turn, each by differences of draws of the other; and the share that was accepted."""
    count, dimension = current.phi.shape
    order = torch.randperm(count, generator=generator, device=current.phi.device)
    halves = order[: count // 2], order[count // 2 :]
    phi, log_q, log_target = (part.clone() for part in (current.phi, current.log_q, current.log_target))
    taken_in_all = 0
    for own, other in (halves, halves[::-1]):
        size = len(own)
        pairs = torch.randint(len(other), (2, size), generator=generator, device=phi.device)
        difference = phi[other[pairs[0]]] - phi[other[pairs[1]]]
        # Mostly the size that suits a normal, sometimes the whole way from mode to mode, sometimes small steps.
        kind = torch.rand(size, generator=generator, dtype=phi.dtype, device=phi.device)
        scale = torch.full_like(kind, 2.38 / math.sqrt(2 * dimension))
        scale = torch.where(kind < 0.1, 1.0, torch.where(kind > 0.6, 0.3 * scale, scale))
        jitter = torch.randn((size, dimension), generator=generator, dtype=phi.dtype, device=phi.device)
        proposal = phi[own] + scale[:, None] * difference + 1e-4 * difference.abs() * jitter
        proposed_target = target(proposal)
        change = power * (proposed_target - log_target[own])
        proposed_q = log_q[own]
        if power < 1:
            proposed_q = target.log_q(proposal)
            change = change + (1 - power) * (proposed_q - log_q[own])
        uniform = torch.rand(size, generator=generator, dtype=phi.dtype, device=phi.device)
        taken = (uniform.log() < change) & ~torch.isneginf(proposed_target)
        rows = own[taken]
        phi[rows], log_q[rows], log_target[rows] = proposal[taken], proposed_q[taken], proposed_target[taken]
        taken_in_all += int(taken.sum())
    return _Population(phi, log_q, log_target), taken_in_all / count


def _correlation(begin: Float[Tensor, "N D"], end: Float[Tensor, "N D"]) -> float:
    """The largest correlation of a parameter, or of its distance from the middle, with its beginning."""
    worst = 0.0
    for fold in (False, True):
        first, last = begin - begin.mean(0), end - end.mean(0)
        if fold:
            first, last = first.abs() - first.abs().mean(0), last.abs() - last.abs().mean(0)
        spread = first.square().mean(0).sqrt() * last.square().mean(0).sqrt()
        worst = max(worst, float(((first * last).mean(0) / spread.clamp_min(1e-300)).max()))
    return min(1.0, worst)
