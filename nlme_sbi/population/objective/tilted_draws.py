r"""A log likelihood that is corrected for what simulation says of its bias.

A ratio whose draws come from a network is the likelihood of a slightly wrong model. At theta_hat data simulated from
theta_hat itself show by how much: the mean score of a simulated individual is then not 0 but some :math:`t`, known with
a covariance, and scores spread by :math:`J`, which need not be the curvature. With N individuals the corrected log
likelihood is

.. math:: \ell(\theta) - N t^T d + \tfrac12 d^T Q d, \qquad d = \theta - \hat\theta,

whose score has mean 0 under theta_hat, and whose curvature at its maximum is the inverse of the estimator's covariance,
network error included (Pauli, Racugno and Ventura 2011, Stat. Sinica 21:149, adjust composite likelihoods alike). The
second term is bounded, so that it only shapes the bulk. Weights of an individual's draws do not change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import DrawBlock, GivenWeights, WeightedDraws
from nlme_sbi.types import Design, Prior

_MOST = 2.0  # nats that the change of curvature may come to


@dataclass(frozen=True, eq=False)
class Tilt:
    """What is added to every individual's log likelihood.

    Args:
        centre: ``(P,)`` theta at which it is 0.
        slope: ``(P,)`` for each individual, to be subtracted; 0 where fixed.
        curvature: ``(P, P)`` for all individuals together; 0 where fixed.
        individuals: their number.
    """

    centre: Float[Tensor, " P"]
    slope: Float[Tensor, " P"]
    curvature: Float[Tensor, "P P"]
    individuals: int

    def __call__(self, theta: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """The change of one individual's log likelihood."""
        away = theta - self.centre.to(theta)
        bent = 0.5 * away @ self.curvature.to(theta) @ away
        return -(self.slope.to(theta) @ away) + _MOST * torch.tanh(bent / _MOST) / self.individuals


@dataclass(frozen=True, eq=False)
class TiltedBlock:
    """A block whose individuals' log likelihoods are tilted."""

    inner: DrawBlock
    tilt: Tilt

    @property
    def rows(self) -> Tensor:
        return self.inner.rows

    @property
    def design(self) -> Design:
        return self.inner.design

    def varying(self) -> Float[Tensor, "I S V"]:
        """Draws of the varying parameters."""
        return self.inner.varying()

    def given_weights(self) -> Float[Tensor, "I S"] | None:
        """The weights that the draws came with; None where all count alike."""
        return self.inner.given_weights() if isinstance(self.inner, GivenWeights) else None

    def log_weights(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "I S"]:
        """Those of the draws, each moved by the same amount."""
        return self.inner.log_weights(theta) + self.tilt(theta)


@dataclass(frozen=True, eq=False)
class TiltedDraws:
    """Weighted draws with a tilt; everything else is that of the draws."""

    inner: WeightedDraws
    tilt: Tilt

    @property
    def population(self) -> PopulationModel:
        return self.inner.population

    @property
    def blocks(self) -> tuple[TiltedBlock, ...]:
        return tuple(TiltedBlock(block, self.tilt) for block in self.inner.blocks)

    @property
    def individuals(self) -> int:
        return self.inner.individuals

    @property
    def draws(self) -> int:
        return self.inner.draws

    @property
    def fitted(self) -> bool:
        return self.inner.fitted

    def part(self, individuals: Tensor, draws: slice) -> TiltedDraws:
        """Some individuals with some of their draws."""
        return replace(self, inner=self.inner.part(individuals, draws))

    def training_draws(self) -> tuple[Tensor, Prior]:
        """The draws under the training prior, and that prior."""
        return self.inner.training_draws()

    def half(self, which: int) -> TiltedDraws:
        """Every other draw."""
        return replace(self, inner=self.inner.half(which))

    def warnings(self, theta: Float[Tensor, " P"], ids: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the draws."""
        return self.inner.warnings(theta, ids)
