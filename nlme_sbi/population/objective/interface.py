"""What the objective is computed from: weighted draws of every individual, in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.posteriors import Posterior, PosteriorSamples
from nlme_sbi.types import Design, Prior

Source = Posterior | PosteriorSamples


@runtime_checkable
class DrawBlock(Protocol):
    """Some individuals whose draws fit into memory (and a CPU's cache) together."""

    @property
    def rows(self) -> Tensor:
        """Positions of the individuals in the data, ``(i,)``."""

    @property
    def design(self) -> Design:
        """Their designs."""

    def varying(self) -> Tensor:
        """Draws of the varying parameters, ``(i, S, V)`` float64."""

    def log_weights(self, theta: Tensor) -> Tensor:
        """``(i, S)``, differentiable: the log of the mean of their exponentials is an individual's objective."""


@runtime_checkable
class GivenWeights(Protocol):
    """A block of draws that stood for the individuals' posteriors with weights of their own, before any theta."""

    def given_weights(self) -> Tensor | None:
        """These weights, ``(i, S)``, adding up to 1 for every individual; None where all draws counted alike."""


@runtime_checkable
class WeightedDraws(Protocol):
    """What an estimator prepares: fixed draws of every individual with weights that depend on ``theta``."""

    @property
    def population(self) -> PopulationModel:
        """The model that the weights belong to."""

    @property
    def blocks(self) -> tuple[DrawBlock, ...]:
        """All individuals, each in one block."""

    @property
    def individuals(self) -> int:
        """Their number."""

    @property
    def draws(self) -> int:
        """Draws for each individual."""

    @property
    def fitted(self) -> bool:
        """Whether something was fitted to the draws: an error that the weights do not show."""

    def part(self, individuals: Tensor, draws: slice) -> WeightedDraws:
        """The same with fewer individuals and draws, nothing refitted: cheap, for exploring."""

    def training_draws(self) -> tuple[Tensor, Prior]:
        """Draws of all parameters ``(I, S, D)`` under the training prior, and that prior: where starts come from."""

    def half(self, which: int) -> WeightedDraws:
        """Every other draw, with everything that was fitted to the draws refitted: for the jackknife."""

    def warnings(self, theta: Tensor, ids: tuple[str, ...]) -> tuple[str, ...]:
        """Warnings about these draws at ``theta``, beyond their effective number."""


@dataclass(frozen=True, eq=False)
class NoDraws:
    """What an estimator has that makes its draws for one theta, before it knows any: the population model."""

    population: PopulationModel


@runtime_checkable
class SetsOfDraws(WeightedDraws, Protocol):
    """Draws that were made in several independent sets, whose differences give their Monte-Carlo error."""

    def independent(self) -> tuple[WeightedDraws, ...]:
        """Each set alone."""


@runtime_checkable
class MovableDraws(WeightedDraws, Protocol):
    """Draws whose likelihoods are expanded in the constants, and which can be compared with draws made elsewhere."""

    @property
    def made_for(self) -> Tensor:
        """Theta about whose constants they are expanded."""

    @property
    def is_direct(self) -> bool:
        """Whether nothing is expanded, because likelihoods are evaluated wherever the constants go."""

    def expand_about(self, theta: Tensor) -> WeightedDraws:
        """The same draws expanded about the constants at ``theta``."""

    def joint_draws(self, other: Any, generator: torch.Generator) -> WeightedDraws:
        """Fresh draws valid at the theta of these and at that of the other draws."""
