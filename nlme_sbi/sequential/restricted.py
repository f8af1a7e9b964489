"""The posterior of one individual on the prior's support, and the prior truncated to where that posterior lies.

Sampling is by rejection, with a limit on the number of attempts: a posterior with nearly all of its mass outside the
prior ends in a sentence and not in a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from scipy.stats import chi2
from torch import Tensor

from nlme_sbi.networks.ensembles import PosteriorEnsemble
from nlme_sbi.networks.flows import ConditionalFlow
from nlme_sbi.networks.posterior import AmortizedPosterior
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.posteriors import Posterior, PosteriorSamples
from nlme_sbi.sequential.failures import SuccessProbability
from nlme_sbi.types import Observations, Prior

_BLOCK = 10_000  # attempts at once
_LEAST_ATTEMPTS = 50_000  # before anything is given up
_LEAST_MASS = 1 / 100  # share of a posterior inside the prior's support below which it is refused
_LEAST_RATE = 1 / 1000  # of rejection from the truncated prior
_PILOT, _MASS_PILOT = 10_000, 2_000  # draws that measure a threshold, and a mass
_RARE = 1 / 200  # share of the prior below which it is no longer sampled by rejection


@runtime_checkable
class Trained(Posterior, Protocol):
    """A posterior before it is restricted to the prior's support: a network, an ensemble, a corrected mixture."""

    @property
    def device(self) -> torch.device:
        """Where its draws are."""


@dataclass(frozen=True, eq=False)
class Region:
    """Where a posterior's density for one individual lies above a threshold: its highest-density region."""

    posterior: Posterior
    observation: Observations
    log_threshold: float

    def contains(self, phi: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
        """Which points lie in it."""
        return self.posterior.log_prob(phi[None], self.observation)[0] >= self.log_threshold


Regions = tuple[Region | SuccessProbability, ...]


@dataclass(frozen=True, eq=False)
class FailureCorrection:
    """Division of a density by the probability that simulations succeed.

    Args:
        success: that probability, by parameters.
        least: smallest value of it that is divided by, which bounds the rejection of draws.
        normalizer: mean of the inverse over the density as it was learned, inside and outside the regions.
    """

    success: SuccessProbability
    least: float
    normalizer: float

    def log_probability(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Log probability of success, as it is divided by."""
        return self.success.log_probability(phi).clamp_min(math.log(self.least))


def contained(phi: Float[Tensor, "N D"], prior: Prior, regions: Regions) -> Bool[Tensor, " N"]:
    """Which points have a prior density and lie in every region."""
    inside = torch.isfinite(prior.log_prob(phi))
    for region in regions:
        rows = torch.nonzero(inside)[:, 0]
        if len(rows):
            inside[rows] = region.contains(phi[rows])
    return inside


def collect(
    draw: Callable[[int], tuple[Tensor, ...]], count: int, *, least_rate: float, complaint: Callable[[int, int], str]
) -> tuple[tuple[Tensor, ...], float]:
    """Call ``draw`` until it has given ``count`` rows, or too few attempts succeed.

    Args:
        draw: called with a number of attempts; tensors with one row for each attempt that succeeded.
        count: rows that are wanted.
        least_rate: share of attempts that must succeed, judged once there were 50,000.
        complaint: the refusal, from how many of how many attempts succeeded.

    Returns:
        The first ``count`` rows of every tensor, and the share of attempts that succeeded.

    Raises:
        ValueError: too few attempts succeed.
    """
    parts: list[tuple[Tensor, ...]] = []
    found = attempts = 0
    while found < count:
        # Enough for what is missing at the rate so far, so that few are made in vain.
        wanted = (count - found) * max(1.0, attempts / max(1, found)) * 1.1 + 100
        size = int(min(_BLOCK, max(1000, wanted)))
        parts.append(draw(size))
        attempts += size
        found += len(parts[-1][0])
        if attempts >= _LEAST_ATTEMPTS and found < least_rate * attempts:
            raise ValueError(complaint(found, attempts))
    joined = tuple(torch.cat(columns)[:count] for columns in zip(*parts, strict=True))
    return joined, found / attempts


@dataclass(frozen=True, eq=False)
class IndividualPosterior:
    """The posterior of one individual, a :class:`nlme_sbi.posteriors.Posterior` of that individual alone.

    Draws outside the prior's support, or outside the regions that were simulated, are rejected, and the density is
    that of what remains.

    Args:
        trained: network or ensemble.
        observation: of the individual.
        regions: outside which nothing was simulated in the last round.
        mass: share of the trained density that lies inside; 1 minus this is the leakage.
        correction: for simulations that failed, where there is one.
    """

    trained: Trained
    observation: Observations
    regions: Regions = ()
    mass: float = 1.0
    correction: FailureCorrection | None = None

    @property
    def parameters(self) -> ParameterSpace:
        return self.trained.parameters

    @property
    def prior(self) -> Prior:
        return self.trained.prior

    @property
    def device(self) -> torch.device:
        return self.trained.device

    @property
    def leakage(self) -> float:
        """Share of the trained density outside the prior's support or the simulated regions."""
        return 1 - self.mass

    def check(self, observations: Observations) -> None:
        """Refuse any other individual; raises ``ValueError``."""
        same = observations.values.shape == self.observation.values.shape
        if not same or not torch.equal(observations.values.cpu(), self.observation.values.cpu()):
            raise ValueError(
                f'This posterior is of individual "{self.observation.ids[0]}" alone, for whom the simulations were '
                "made; infer others by their own rounds (individual=ID), or train an amortized network."
            )

    @torch.no_grad()
    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        """``draws`` independent draws, ``phi (1, S, D)``.

        Raises:
            ValueError: another individual, or next to none of the trained density lies inside.
        """
        self.check(observations)
        (phi, log_q), _ = _draw_inside(self.trained, self.observation, self.regions, draws, generator, self.correction)
        log_density = self._normalized(log_q, phi)
        return PosteriorSamples(self.parameters.names, phi[None], log_density[None], self.prior)

    @torch.no_grad()
    def log_prob(self, phi: Float[Tensor, "I S D"], observations: Observations) -> Float[Tensor, "I S"]:
        """Normalised log density, ``(1, S)``; -inf outside."""
        self.check(observations)
        inside = contained(phi[0].to(self.device).float(), self.prior, self.regions)
        found = self._normalized(self.trained.log_prob(phi, self.observation)[0], phi[0])
        return torch.where(inside, found, -torch.inf)[None]

    def _normalized(self, log_q: Float[Tensor, " S"], phi: Float[Tensor, "S D"]) -> Float[Tensor, " S"]:
        """The density of what remains inside, from that as it was learned."""
        if self.correction is None:
            return log_q - math.log(self.mass)
        return log_q - self.correction.log_probability(phi).to(log_q) - math.log(self.correction.normalizer)


def restrict(
    trained: Trained, observation: Observations, regions: Regions, generator: torch.Generator
) -> IndividualPosterior:
    """The posterior of one individual on the prior's support and the regions, its mass there measured.

    Raises:
        ValueError: next to nothing of it lies there.
    """
    _, mass = _draw_inside(trained, observation, regions, _MASS_PILOT, generator)
    return IndividualPosterior(trained, observation, regions, mass)


@torch.no_grad()
def correct_failures(
    posterior: IndividualPosterior, success: SuccessProbability, generator: torch.Generator
) -> IndividualPosterior:
    """The posterior of all simulations, from the one that was learned from those that succeeded.

    It is silent where next to nothing succeeds: such parameters become a region that it lies outside of.

    Raises:
        ValueError: next to nothing of it lies elsewhere.
    """
    regions = (*posterior.regions, success)
    (phi, _), mass = _draw_inside(posterior.trained, posterior.observation, regions, _MASS_PILOT, generator)
    probability = success.log_probability(phi).double().exp()
    least = max(success.floor, float(probability.min()))
    correction = FailureCorrection(success, least, mass * float((1 / probability.clamp_min(least)).mean()))
    return IndividualPosterior(posterior.trained, posterior.observation, regions, mass, correction)


def _draw_inside(
    trained: Trained,
    observation: Observations,
    regions: Regions,
    count: int,
    generator: torch.Generator,
    correction: FailureCorrection | None = None,
) -> tuple[tuple[Tensor, ...], float]:
    def draw(attempts: int) -> tuple[Tensor, Tensor]:
        drawn = trained.sample(observation, attempts, generator)
        inside = contained(drawn.phi[0], trained.prior, regions)
        if correction is not None:
            uniform = torch.rand(attempts, generator=generator, device=inside.device)
            log_least = math.log(correction.least)
            inside = inside & (uniform.log() < log_least - correction.log_probability(drawn.phi[0]))
        log_q = trained.log_prob(drawn.phi, observation) if drawn.log_q is None else drawn.log_q
        return drawn.phi[0][inside], log_q[0][inside]

    least_rate = _LEAST_MASS * (1.0 if correction is None else correction.least)
    return collect(draw, count, least_rate=least_rate, complaint=_outside_the_prior)


def _outside_the_prior(found: int, attempts: int) -> str:
    return (
        f"Only {found} of {attempts} draws of the posterior lie where the prior has a density and where simulations "
        "were made, so it cannot be sampled. The data lie outside what the prior can explain, or the rounds have lost "
        "them: widen the prior, or use fewer rounds or more simulations (method.rounds, method.simulations)."
    )


@dataclass(frozen=True, eq=False)
class TruncatedPrior:
    """The prior on the intersection of regions: what truncated proposals draw from.

    Within the innermost of nested regions the density of all rounds together is the prior times a constant, so that
    maximum likelihood on all pairs gives the posterior there without any correction.
    """

    prior: Prior
    regions: Regions

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> tuple[Float[Tensor, "N D"], float]:
        """Independent draws ``(N, D)`` and the share of the prior that is left.

        By rejection from the prior as long as a share of it is left; beyond, by rejection from the last posterior with
        its noise widened to the size of the region, over which its density is nearly flat.

        Raises:
            ValueError: nothing is found in the regions.
        """
        trial = self.prior.sample(_BLOCK, generator)
        share = float(contained(trial, self.prior, self.regions).double().mean())
        if share >= _RARE:

            def draw(attempts: int) -> tuple[Tensor]:
                phi = self.prior.sample(attempts, generator)
                return (phi[contained(phi, self.prior, self.regions)],)

            (phi,), share = collect(draw, count, least_rate=_LEAST_RATE, complaint=_nothing_left)
            return phi, share
        last = next(region for region in reversed(self.regions) if isinstance(region, Region))
        sampler = _WidenedRejection(last.posterior, last.observation, self.prior, self.regions)
        return sampler.sample(count, generator), share


def _nothing_left(found: int, attempts: int) -> str:
    return (
        f"Only {found} of {attempts} attempts found parameters that the last posterior allows. Its region has nearly "
        "vanished: use fewer rounds (method.rounds), or more simulations in each."
    )


@dataclass(frozen=True, eq=False)
class _WidenedRejection:
    """Draws from the truncated prior by rejection from a posterior whose noise is widened."""

    posterior: Posterior
    observation: Observations
    prior: Prior
    regions: Regions

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
        """``count`` draws; the bound of the ratio is the largest seen, and earlier draws are thinned when it rises."""
        trial, log_ratio = self._candidates(_BLOCK, generator)
        if not len(trial):
            raise ValueError(_nothing_left(0, _BLOCK))
        bound = float(log_ratio.max())

        def draw(attempts: int) -> tuple[Tensor]:
            phi, log_ratio = self._candidates(attempts, generator)
            uniform = torch.rand(len(phi), generator=generator, device=phi.device)
            return (phi[uniform.log() < log_ratio - bound],)

        return collect(draw, count, least_rate=_LEAST_RATE, complaint=_nothing_left)[0][0]

    def _candidates(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points of the regions and the log of prior over their density, up to a constant."""
        phi, log_density = widened_draws(self.posterior, self.observation, count, generator)
        inside = contained(phi, self.prior, self.regions)
        return phi[inside], self.prior.log_prob(phi[inside]) - log_density[inside]


@torch.no_grad()
def widened_draws(
    posterior: Posterior, observation: Observations, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
    """Draws of flows with their normal noise multiplied so that it fills the ball of 99.99% of it, and log densities.

    Over that ball the density varies by ``exp(D/2)`` or so, whatever the tail of the posterior itself. Each member of
    an ensemble gives its share of the draws, with its own density. Densities other than flows are not widened.
    """
    members = posterior.members if isinstance(posterior, PosteriorEnsemble) else (posterior,)
    parts = []
    for place, member in enumerate(members):
        share = count // len(members) + (place < count % len(members))
        flow = member.network.flow if isinstance(member, AmortizedPosterior) else None
        if not isinstance(member, AmortizedPosterior) or not isinstance(flow, ConditionalFlow):
            drawn = member.sample(observation, share, generator)
            log_q = member.log_prob(drawn.phi, observation) if drawn.log_q is None else drawn.log_q
            parts.append((drawn.phi[0], log_q[0]))
            continue
        width = flow.noise_width
        scale = math.sqrt(float(chi2.ppf(0.9999, width)) / width)
        noise = torch.randn((share, width), generator=generator, device=generator.device)
        phi, log_density = member.network.sample(scale * noise, member.summarize(observation))
        # What was drawn is the noise of scale 1: take its normal density in place of that of the scaled noise.
        square = noise.square().sum(1)
        parts.append((phi, log_density + 0.5 * (scale**2 - 1) * square - width * math.log(scale)))
    return torch.cat([phi for phi, _ in parts]), torch.cat([density for _, density in parts])


@torch.no_grad()
def highest_density_region(posterior: IndividualPosterior, excluded: float, generator: torch.Generator) -> Region:
    """The region of highest density of a posterior that leaves out a share ``excluded`` of its draws."""
    drawn = posterior.sample(posterior.observation, _PILOT, generator)
    log_q = posterior.trained.log_prob(drawn.phi, posterior.observation)[0]
    return Region(posterior.trained, posterior.observation, float(torch.quantile(log_q.double(), excluded)))
