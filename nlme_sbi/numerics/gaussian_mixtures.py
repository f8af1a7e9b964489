"""Gaussian mixtures fitted to every individual's draws at once, and their conditional densities.

Parameters without variability between individuals turn ``p(phi | theta)`` into a spike that draws miss. The ratio
estimator therefore needs the density of those parameters *given* the others, and takes it from a Gaussian mixture that
is fitted to the joint draws of each individual: conditionals of Gaussian mixtures are Gaussian mixtures in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.compute.blocks import over_blocks
from nlme_sbi.numerics.factorizations import cholesky_or_diagonal
from nlme_sbi.numerics.mixture_em import Components, Criterion, features, fit_standardised, log_densities

_BLOCK = 131072  # draws that are worked on at once: small enough for a cache, large enough to hide overheads


@dataclass(frozen=True, eq=False)
class GaussianMixtures:
    """One mixture for each individual, padded with components of weight 0.

    Args:
        log_weights: ``(I, K)``, -inf for padding.
        means: ``(I, K, D)``.
        covariances: ``(I, K, D, D)``.
    """

    log_weights: Float[Tensor, "I K"]
    means: Float[Tensor, "I K D"]
    covariances: Float[Tensor, "I K D D"]

    @property
    def components(self) -> Int[Tensor, " I"]:
        """Components of each individual's mixture."""
        return torch.isfinite(self.log_weights).sum(1)

    def __getitem__(self, rows: Tensor) -> GaussianMixtures:
        """Mixtures of some individuals, without padding that none of them needs."""
        used = int(self.components[rows].max())
        return GaussianMixtures(self.log_weights[rows, :used], self.means[rows, :used], self.covariances[rows, :used])

    def log_prob(self, phi: Float[Tensor, "I S D"]) -> Float[Tensor, "I S"]:
        """Log density of ``(I, S, D)``."""
        return torch.logsumexp(self.log_weights[:, None] + log_densities(phi, self.means, self.covariances), -1)

    def marginal(self, columns: list[int]) -> GaussianMixtures:
        """The mixtures' marginal distribution of some columns."""
        return GaussianMixtures(
            self.log_weights, self.means[..., columns], self.covariances[..., columns, :][..., columns]
        )

    def distance(self, point: Float[Tensor, "I D"]) -> Float[Tensor, " I"]:
        """Mahalanobis distance of a point to the nearest component that holds at least 1% of the draws."""
        offsets = point[:, None] - self.means
        factor = cholesky_or_diagonal(self.covariances)
        standard: Tensor = torch.linalg.solve_triangular(factor, offsets[..., None], upper=False)
        squares = standard.square().sum((-1, -2))
        return squares.masked_fill(self.log_weights < math.log(0.01), math.inf).amin(1).sqrt()

    def condition(self, phi: Float[Tensor, "I S V"], varying: list[int], constant: list[int]) -> ConditionalDensity:
        """The density of the constant columns given each draw of the varying ones."""
        means = self.means[..., varying]
        within = self.covariances[..., varying, :][..., varying]
        cross = self.covariances[..., constant, :][..., varying]
        factor = cholesky_or_diagonal(within)
        slopes = torch.cholesky_solve(cross.mT, factor).mT  # (I, K, W, V)
        rest = self.covariances[..., constant, :][..., constant] - slopes @ cross.mT
        whitening = _inverse_lower(cholesky_or_diagonal(0.5 * (rest + rest.mT)))
        log_shares = self.log_weights[:, None] + log_densities(phi, means, self.covariances_of(varying))
        log_shares = torch.log_softmax(log_shares, -1)
        # Whitened conditional means: A (mu_s + B (v - mu_v)), one matrix product for all draws and components.
        intercept = self.means[..., constant, None] - slopes @ means[..., None]
        gain = (whitening @ slopes).flatten(1, 2)  # (I, K W, V)
        centres = phi @ gain.mT + (whitening @ intercept).flatten(1)[:, None]
        log_scale = whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * len(constant) * math.log(2 * math.pi)
        return ConditionalDensity(
            log_shares=log_shares + log_scale[:, None],
            centres=centres.reshape(*centres.shape[:2], -1, len(constant)),
            whitening=whitening,
        )

    def covariances_of(self, columns: list[int]) -> Float[Tensor, "I K V V"]:
        """Covariances of some columns."""
        return self.covariances[..., columns, :][..., columns]


@dataclass(frozen=True, eq=False)
class ConditionalDensity:
    """``q(s | v_ij, y_i)`` for each draw: Gaussian mixtures of which only the place ``s`` is still open.

    Args:
        log_shares: ``(I, S, K)``; log probability of each component given the draw, plus its log normaliser.
        centres: ``(I, S, K, W)``; conditional means, whitened.
        whitening: ``(I, K, W, W)``; inverse Cholesky factors of the conditional covariances.
    """

    log_shares: Float[Tensor, "I S K"]
    centres: Float[Tensor, "I S K W"]
    whitening: Float[Tensor, "I K W W"]

    def log_prob(self, values: Float[Tensor, "I W"]) -> Float[Tensor, "I S"]:
        """Log density of the constants' values, one for each individual, given each of its draws."""
        place = (self.whitening @ values[:, None, :, None])[..., 0]
        distance = (place[:, None] - self.centres.double()).square().sum(-1)
        return torch.logsumexp(self.log_shares.double() - 0.5 * distance, -1)


def fit_mixtures(
    phi: Float[Tensor, "I S D"],
    components: int,
    *,
    criterion: Criterion = "aic",
    start: GaussianMixtures | None = None,
    block: int = _BLOCK,
) -> GaussianMixtures:
    """Gaussian mixtures with full covariances for each individual's draws, by EM in batches.

    Components are added one at a time: the component that is least Gaussian along one of its axes is split along it, so
    that separate modes and skewed or heavy tails are found without random starts. An individual keeps another component
    while it pays for its parameters. How many those are is chosen on at most 1000 of the draws. Each individual's draws
    are standardised first, and covariances are kept above 1e-6 of that of the draws, so that nothing depends on units.
    The mixture has the mean of the draws and, up to a slight regularisation of small components, their covariance.

    Args:
        phi: draws ``(I, S, D)``.
        components: the largest number of components tried.
        criterion: "aic", which approximates densities best: errors left by "bic" add up over individuals (with
            slightly skewed posteriors of 200 individuals, 0.3 against 0.1 standard errors of a constant); or "fixed",
            the same number for every individual (fewer where a component would be left with almost no draws).
        start: mixtures to begin with; then only EM steps are taken and no component is added or removed.
        block: draws that are worked on at once, which bounds memory.

    Raises:
        ValueError: where an individual's draws do not span all dimensions.
    """
    individuals, draws, size = phi.shape
    if draws < 2 * (size + 1):
        raise ValueError(f"A mixture over {size} parameters needs at least {2 * (size + 1)} draws; got {draws}.")
    step = max(1, block // draws)

    def of_rows(rows: Tensor) -> Components:
        piece = phi[rows].double()
        centre, scale = _standardisation(piece, int(rows[0]))
        standard = torch.linalg.solve_triangular(scale, (piece - centre).mT, upper=False).mT
        begun = None if start is None else _to_standard(start, rows, centre, scale)
        fitted = fit_standardised(features(standard), size, largest=components, criterion=criterion, start=begun)
        return Components(
            fitted.log_weights,
            centre + fitted.means @ scale.mT,
            scale[:, None] @ fitted.covariances @ scale[:, None].mT,
        )

    pieces = over_blocks(of_rows, torch.split(torch.arange(individuals, device=phi.device), step), phi.device)
    most = max(piece.log_weights.shape[1] for piece in pieces)
    padded = [piece.pad(most) for piece in pieces]
    return GaussianMixtures(
        torch.cat([piece.log_weights for piece in padded]),
        torch.cat([piece.means for piece in padded]),
        torch.cat([piece.covariances for piece in padded]),
    )


def _standardisation(phi: Float[Tensor, "I S D"], first: int) -> tuple[Tensor, Tensor]:
    """Mean ``(I, 1, D)`` and Cholesky factor of the covariance of each individual's draws."""
    centre = phi.mean(1, keepdim=True)
    centred = phi - centre
    covariance = centred.mT @ centred / phi.shape[1]
    # Condition is judged on correlations, because parameters may have very different spreads.
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    factor, info = torch.linalg.cholesky_ex(covariance)
    bad = (info != 0) | (sd <= 0).any(1)
    bad |= (factor.diagonal(dim1=-2, dim2=-1) / sd).amin(1) < 1e-7
    if bool(bad.any()):
        raise ValueError(
            f"The draws of {int(bad.sum())} individuals do not spread in all directions (first: individual "
            f"{first + int(bad.nonzero()[0, 0])}, counted from 0). Is a parameter constant or a copy of another one?"
        )
    return centre, factor


def _to_standard(mixtures: GaussianMixtures, rows: Tensor, centre: Tensor, scale: Tensor) -> Components:
    chosen = mixtures[rows]
    inverse = _inverse_lower(scale)
    means = (chosen.means - centre) @ inverse.mT
    return Components(chosen.log_weights, means, inverse[:, None] @ chosen.covariances @ inverse[:, None].mT)


def _inverse_lower(factor: Tensor) -> Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse
