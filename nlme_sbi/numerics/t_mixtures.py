"""Mixtures of multivariate t distributions, many at once, and draws from them that are spread evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

FREEDOM = 6  # degrees of freedom of every component, where the target's tails are not heavier,
HEAVIEST = 2  # and where they may be; for both the chi-square quantile has a closed distribution function
_SETS, _MANY_DRAWS = 8, 2048  # independent sets of draws, and the number of draws that allows them


@dataclass(frozen=True, eq=False)
class Mixtures:
    """Mixtures of multivariate t components, one for each individual, padded; ``counts (I, K)`` draws from each, and
    ``freedom`` degrees of freedom of all, :data:`FREEDOM` or :data:`HEAVIEST`."""

    counts: Int[Tensor, "I K"]
    means: Float[Tensor, "I K V"]
    factors: Float[Tensor, "I K V V"]
    freedom: int = FREEDOM

    def __post_init__(self) -> None:
        if self.freedom not in (FREEDOM, HEAVIEST):
            raise ValueError(f"Components have {FREEDOM} or {HEAVIEST} degrees of freedom; got {self.freedom}.")

    def __getitem__(self, rows: Tensor) -> Mixtures:
        used = max(1, int((self.counts[rows] > 0).sum(1).max()))
        return replace(
            self,
            counts=self.counts[rows, :used],
            means=self.means[rows, :used],
            factors=self.factors[rows, :used],
        )

    def with_draws(self, draws: int) -> Mixtures:
        """The same components in about the same proportions with another number of draws, at least one each while
        there are enough; the largest component takes what rounding leaves."""
        there = self.counts > 0
        share = self.counts / self.counts.sum(1, keepdim=True)
        counts = ((draws - there.sum(1, keepdim=True)).clamp_min(0) * share).floor().to(torch.int64) + there
        counts = torch.where(counts.cumsum(1) <= draws, counts, 0)
        largest = counts.argmax(1, keepdim=True)
        return replace(self, counts=counts.scatter_add(1, largest, draws - counts.sum(1, keepdim=True)))

    def replace_rows(self, rows: Tensor, others: Mixtures) -> Mixtures:
        """With the mixtures at ``rows`` replaced."""
        most = max(self.counts.shape[1], others.counts.shape[1])
        mine, theirs = self._padded(most), others._padded(most)
        return Mixtures(
            mine.counts.index_copy(0, rows, theirs.counts),
            mine.means.index_copy(0, rows, theirs.means),
            mine.factors.index_copy(0, rows, theirs.factors),
            self.freedom,
        )

    def beside(self, other: Mixtures) -> Mixtures:
        """All components of both, each with its draws; those without draws last."""
        counts, order = torch.cat([self.counts, other.counts], 1).sort(dim=1, descending=True)
        every = torch.arange(len(order), device=order.device)[:, None]
        means, factors = torch.cat([self.means, other.means], 1), torch.cat([self.factors, other.factors], 1)
        return Mixtures(counts, means[every, order], factors[every, order], self.freedom)

    def _padded(self, most: int) -> Mixtures:
        more = most - self.counts.shape[1]
        size = self.means.shape[2]
        identity = torch.eye(size, dtype=self.means.dtype, device=self.means.device)
        return Mixtures(
            torch.nn.functional.pad(self.counts, (0, more)),
            torch.nn.functional.pad(self.means, (0, 0, 0, more)),
            torch.cat([self.factors, identity.expand(len(self.factors), more, -1, -1)], 1),
            self.freedom,
        )

    def sample(self, generator: torch.Generator) -> tuple[Float[Tensor, "I S V"], Float[Tensor, "I S"]]:
        """Draws, stratified over components and spread evenly within them, and the log density of the mixture with the
        drawn proportions."""
        return self.draws_at(self.shifts(generator))

    def shifts(self, generator: torch.Generator) -> Float[Tensor, "I 1 R U"]:
        """All the randomness of :meth:`sample`: for each individual random shifts of one Sobol' sequence.

        Draws belong in turn to independent sets (randomised quasi-Monte Carlo, Cranley and Patterson 1976, SIAM J.
        Numer. Anal. 13:904), whose differences give the remaining error.
        """
        shape = (len(self.means), 1, independent_sets(int(self.counts[0].sum())), self.means.shape[2] + 2)
        shift = torch.rand(shape, generator=generator, device=generator.device, dtype=self.means.dtype)
        return shift.to(self.means.device)

    def draws_at(self, shifts: Float[Tensor, "I 1 R U"]) -> tuple[Float[Tensor, "I S V"], Float[Tensor, "I S"]]:
        """:meth:`sample`, given the shifts."""
        draws = int(self.counts[0].sum())
        sequence = sobol_points(-(-draws // shifts.shape[2]), shifts.shape[-1]).to(shifts)
        even = (sequence[:, None] + shifts).remainder(1.0).flatten(1, 2)[:, :draws].clamp(1e-12, 1 - 1e-12)
        component = _strata(self.counts, draws).gather(1, even[..., 0].argsort(1).argsort(1))
        spread = (0.5 * self.freedom / _half_chi_square_quantile(even[..., 1], self.freedom)).sqrt()
        standard = torch.special.ndtri(even[..., 2:]) * spread[..., None]
        every = torch.arange(len(even), device=even.device)[:, None]
        phi = self.means[every, component] + (self.factors[every, component] @ standard[..., None])[..., 0]
        return phi, self.log_prob(phi)

    def standard(self, shape: tuple[int, int, int], generator: torch.Generator) -> Float[Tensor, "I S V"]:
        """Draws of a component before its location and factor."""
        dtype = self.means.dtype
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
        waits = torch.empty((*shape[:2], self.freedom // 2), device=generator.device, dtype=dtype)
        chi_square = 2 * waits.exponential_(generator=generator).sum(-1)
        return (noise * (self.freedom / chi_square).sqrt()[..., None]).to(self.means.device)

    def log_prob(self, phi: Float[Tensor, "I S V"]) -> Float[Tensor, "I S"]:
        """Log density of the mixture."""
        size = phi.shape[2]
        identity = torch.eye(size, dtype=phi.dtype, device=phi.device).expand(self.factors.shape)
        whitening: Tensor = torch.linalg.solve_triangular(self.factors, identity, upper=False)
        centres = (whitening @ self.means[..., None])[..., 0]
        standard = phi @ whitening.flatten(1, 2).mT - centres.flatten(1)[:, None]
        distance = standard.reshape(*phi.shape[:2], *self.means.shape[1:]).square().sum(-1)
        freedom = self.freedom
        normaliser = (
            math.lgamma(0.5 * (freedom + size))
            - math.lgamma(0.5 * freedom)
            - 0.5 * size * math.log(freedom * math.pi)
            - self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )
        share = self.counts.to(phi.dtype).log() - math.log(int(self.counts[0].sum()))
        log_component = (share + normaliser)[:, None] - 0.5 * (freedom + size) * torch.log1p(distance / freedom)
        return torch.logsumexp(log_component, -1)


def independent_sets(draws: int) -> int:
    """How many independent sets the draws of an individual are made of: two, or more where there are enough draws, so
    that their error is well estimated for a handful of individuals, too."""
    return _SETS if draws >= _MANY_DRAWS else 2


@lru_cache(maxsize=8)
def sobol_points(count: int, size: int) -> Float[Tensor, "n d"]:
    """The first points of the Sobol' sequence, float64 on the CPU; not to be written to."""
    engine = torch.quasirandom.SobolEngine(size)  # type: ignore[no-untyped-call]
    points: Tensor = engine.draw(count, dtype=torch.float64)
    return points


def _half_chi_square_quantile(probability: Float[Tensor, "*shape"], freedom: int) -> Float[Tensor, "*shape"]:
    """Quantile of half a chi-square; with two degrees of freedom an exponential distribution's."""
    return -torch.log1p(-probability) if freedom == HEAVIEST else gamma_3_quantile(probability)


def gamma_3_quantile(probability: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Quantile of the gamma distribution of shape 3, half a chi-square with 6 degrees of freedom.

    Wilson and Hilferty's approximation, then Newton's method on the closed form of the distribution function, in the
    logarithm of the smaller tail.
    """
    normal = torch.special.ndtri(probability)
    found = 3 * (1 - 1 / 27 + normal / (3 * math.sqrt(3))).clamp_min(0.02) ** 3
    upper = probability > 0.5
    target = torch.where(upper, torch.log1p(-probability), probability.log())
    for _ in range(8):
        above = 1 + found + 0.5 * found.square()
        log_density = 2 * found.log() - found - math.log(2)
        log_upper = above.log() - found
        # Below, 1 - exp(-g)(1 + g + g^2/2) cancels; there its series begins with g^3/6.
        lower = torch.where(found < 0.3, _gamma_3_below(found), -torch.expm1(log_upper))
        tail = torch.where(upper, log_upper, lower.log())
        slope = torch.where(upper, -1.0, 1.0) * (log_density - tail).exp()
        step = ((tail - target) / (slope * found)).clamp(-1.0, 1.0)
        found = found * (-step).exp()
    quantile: Tensor = found
    return quantile


def _gamma_3_below(x: Tensor) -> Tensor:
    """Distribution function of the gamma distribution of shape 3 near 0, without cancellation."""
    term: Tensor = x**3 / 6
    total = term
    for order in range(4, 14):
        term = term * x / order
        total = total + term
    return total * (-x).exp()


def _strata(counts: Int[Tensor, "I K"], draws: int) -> Int[Tensor, "I S"]:
    """Component of each draw, in order: the first ``counts[:, 0]`` draws from component 0, and so on."""
    ends = counts.cumsum(1).contiguous()
    place = torch.arange(draws, device=counts.device).expand(len(counts), -1).contiguous()
    return torch.searchsorted(ends, place, right=True)
