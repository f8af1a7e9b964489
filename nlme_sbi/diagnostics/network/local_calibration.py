r"""Calibration where the data are: pairs from the part of the prior around the observed individuals, judged exactly.

A network may be calibrated over its whole training prior and far too wide, or too narrow, at the few places where real
individuals lie, because those are rare under the prior. So parameters are drawn from the training prior p where a bump
k lets them, a mixture of kernels about posterior draws of the observed individuals: from a density r proportional to
:math:`k(\phi)\, p(\phi)`. Data are simulated from them with the observed designs, and ranks are taken as over the
prior. But then the posterior given the data is not the one under p that the network learned: it is proportional to
:math:`k(\phi)\, p(\phi \mid y)`. Ranks that ignore this accuse a perfect network. Here draws *and* truth get the weight
:math:`r/p = k`, and ranks are those of weighted pools (:mod:`nlme_sbi.diagnostics.network.ranks`).

**Valid for** every simulator, with or without a likelihood, and any number of draws: if
:math:`q(\phi \mid y) = p(\phi \mid y)` for the simulated data, the ranks are exactly uniform, and tests keep their
error rates. k may depend on network and data in any way, because it is fixed before anything is simulated; designs are
drawn independently of the parameters. **Less sensitive than** ranks over the prior: where k is narrower than a
posterior, k and not the network decides the width of the weighted draws, and few effective draws leave much to chance.
Kernels are therefore twice as wide as the individuals' posteriors, and the effective share of the draws is reported.
**Not judged**: q outside the places where k has mass, such as a mode that no draw of an observed individual has found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.types import Design, Prior

_MOST_KERNELS = 200
_LEAST_DRAWS = 10
_AT_ONCE = 2_000_000  # parameter vectors times kernels
_TRIES = 500
_PILOT = 10_000


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    r"""The density r: the training prior times a bump k, the equal mixture of normals, each about one draw of an
    observed individual and with that individual's own posterior covariance, widened.

    :meth:`of` makes it. It is a :class:`nlme_sbi.types.Prior`, but for a constant in :meth:`log_prob`.

    Args:
        prior: the training prior.
        centres: ``(M, D)``, float64.
        whiteners: ``(M, D, D)`` inverse Cholesky factors of the kernels' covariances.
        ceiling: log density at which the prior is cut off, so that draws of k can be rejected into draws of r; where
            the prior is higher (hardly anywhere) r has ``exp(ceiling)`` in its place, and the weight r/p says so.
    """

    prior: Prior
    centres: Float[Tensor, "M D"]
    whiteners: Float[Tensor, "M D D"]
    ceiling: float

    @classmethod
    def of(
        cls, draws: Float[Tensor, "I S D"], prior: Prior, generator: torch.Generator, *, width: float = 2.0
    ) -> Neighbourhood:
        """Around the draws of the observed individuals, at most 200 of which get a kernel, evenly chosen.

        Args:
            draws: from the posterior under test, unconstrained.
            prior: the training prior.
            generator: picks one draw of each individual (several where there are fewer than 100 individuals).
            width: of the kernels, in SDs of the individual's posterior.

        Raises:
            ValueError: for fewer than 10 draws, or draws that do not spread.
        """
        individuals, count, parameters = draws.shape
        if count < _LEAST_DRAWS * parameters:
            raise ValueError(
                f"{count} draws of each individual do not determine a covariance of {parameters} parameters; "
                f"{_LEAST_DRAWS * parameters} are needed (diagnose.draws)."
            )
        each = max(1, _MOST_KERNELS // individuals)
        chosen = torch.linspace(0, individuals - 1, min(individuals, _MOST_KERNELS), device=draws.device).round().long()
        some = draws[chosen].double()
        picked = torch.randint(count, (len(chosen), each), generator=generator, device=draws.device)
        centres = some.gather(1, picked[..., None].expand(-1, -1, parameters)).flatten(0, 1)
        deviations = some - some.mean(1, keepdim=True)
        covariances = width**2 * deviations.mT @ deviations / (count - 1)
        factors, failed = torch.linalg.cholesky_ex(covariances)
        if bool((failed != 0).any()) or not bool(torch.isfinite(factors).all()):
            raise ValueError("Draws of an observed individual do not spread in every direction; the network is broken.")
        identity = torch.eye(parameters, dtype=torch.float64, device=draws.device).expand_as(factors)
        whiteners = torch.linalg.solve_triangular(factors, identity, upper=False)
        bump = cls(prior, centres, whiteners.repeat_interleave(each, 0), 0.0)
        highest = float(prior.log_prob(bump._bump_draws(_PILOT, generator)).max())
        if not math.isfinite(highest):
            raise ValueError("The network's draws for the data lie outside the support of the training prior.")
        return replace(bump, ceiling=highest)

    @property
    def names(self) -> tuple[str, ...]:
        return self.prior.names

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "n D"]:
        """Independent draws, float32, by rejection: draws of k that the prior lets pass.

        Raises ``ValueError`` where it lets hardly any pass.
        """
        found: list[Tensor] = []
        missing = count
        for _ in range(_TRIES):
            phi = self._bump_draws(_PILOT, generator)
            chance = torch.rand(len(phi), generator=generator, dtype=torch.float64, device=phi.device)
            passed = phi[chance.log() < self.prior.log_prob(phi.double()) - self.ceiling][:missing]
            found.append(passed)
            missing -= len(passed)
            if missing == 0:
                return torch.cat(found)
        raise ValueError("The network's draws for the data lie almost all where the training prior has no mass.")

    def log_prob(self, phi: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Log density up to a constant; -inf outside the support of the prior."""
        flat = phi.reshape(-1, phi.shape[-1]).double()
        rows = max(1, _AT_ONCE // len(self.centres))
        parts = [self._mixture(flat[start : start + rows]) for start in range(0, len(flat), rows)]
        bump = torch.cat(parts) if parts else flat.new_zeros(0)
        found = bump + self.prior.log_prob(flat).clamp_max(self.ceiling)
        density: Tensor = found.reshape(phi.shape[:-1]).to(phi.dtype)
        return density

    def _bump_draws(self, count: int, generator: torch.Generator) -> Float[Tensor, "n D"]:
        device = self.centres.device
        which = torch.randint(len(self.centres), (count,), generator=generator, device=device)
        shape = (count, self.centres.shape[1], 1)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        spread = torch.linalg.solve_triangular(self.whiteners[which], noise, upper=False)[..., 0]
        phi: Tensor = (self.centres[which] + spread).float()
        return phi

    def _mixture(self, phi: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """All kernels by one product: each log density is a polynomial of second order in phi."""
        count, parameters = self.centres.shape
        origin = self.mean  # near it the terms of the polynomial are small, and little is cancelled
        precisions = self.whiteners.mT @ self.whiteners
        slopes = torch.einsum("mij,mj->mi", precisions, self.centres - origin)
        log_volumes = self.whiteners.diagonal(dim1=1, dim2=2).log().sum(1) - 0.5 * parameters * math.log(2 * math.pi)
        constants = log_volumes - 0.5 * (slopes * (self.centres - origin)).sum(1)
        moved = phi - origin
        squares = (moved[:, :, None] * moved[:, None]).flatten(1)
        features = torch.cat([squares, moved, torch.ones_like(moved[:, :1])], 1)
        polynomials = torch.cat([-0.5 * precisions.flatten(1), slopes, constants[:, None]], 1)
        density: Tensor = torch.logsumexp(features @ polynomials.T, 1) - math.log(count)
        return density

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """Of the bump."""
        return self.centres.mean(0)

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Of the bump."""
        spread = torch.linalg.inv(self.whiteners)
        covariance: Tensor = (spread @ spread.mT).mean(0) + torch.cov(self.centres.T, correction=0)
        return covariance


@dataclass(frozen=True, eq=False)
class ObservedDesigns:
    """The observed individuals' designs, drawn with replacement, as a :class:`nlme_sbi.types.DesignSource`."""

    pool: Design

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` of them."""
        rows = torch.randint(len(self.pool), (count,), generator=generator, device=generator.device)
        return self.pool[rows]

    def covers(self, design: Design) -> dict[int, str]:
        """Nothing is refused: these designs are the data's own."""
        del design
        return {}
