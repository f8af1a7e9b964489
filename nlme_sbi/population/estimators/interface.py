"""Protocols of estimators, and what they return to the fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import Report
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents
from nlme_sbi.population.likelihood.log_joint import JointDensity
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.types import Observations


@runtime_checkable
class Estimator(Protocol):
    """A way to the population likelihood.

    ``absolute`` is whether the objective is log p(y | theta) itself; otherwise it is a ratio to the evidence under
    the training prior, and no absolute -2 log L exists.
    """

    @property
    def name(self) -> str:
        """As in tables and configs."""

    @property
    def absolute(self) -> bool:
        """Whether the objective is a log likelihood."""

    @property
    def approximation(self) -> str:
        """What the likelihood is approximated by, in a word that tables print; "" where only draws limit it."""

    def prepare(
        self, source: Source, observations: Observations, population: PopulationModel, generator: torch.Generator
    ) -> WeightedDraws | NoDraws:
        """Draws for every individual, or nothing yet where draws are made for one theta."""

    def objective(self, theta: Tensor, state: WeightedDraws) -> Tensor:
        """Each individual's contribution, ``(I,)``."""

    def improve(
        self,
        state: WeightedDraws,
        theta: Tensor,
        observations: Observations,
        generator: torch.Generator,
        *,
        times: int = 2,
    ) -> WeightedDraws | str:
        """``times`` as many draws because those at hand were too few at ``theta``, or as many as there may be; or the
        reason why there are no more."""


@runtime_checkable
class ThetaDependentEstimator(Estimator, Protocol):
    """An estimator of a likelihood whose draws are made for one theta, and made anew for every theta of the search."""

    def draws_at(
        self,
        source: Source,
        observations: Observations,
        theta: Tensor,
        previous: WeightedDraws | NoDraws,
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Draws of all individuals made for ``theta``; ``previous`` are the draws of the search so far, or only
        the population model.

        Raises:
            NoLikelihoodError: where no draw of some individual has a likelihood above 0.
        """

    def search_modes_again(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Tensor,
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Draws made for ``theta`` that depend on ``state`` only through its modes; others are searched for, too."""

    def scan_for_modes(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Tensor,
        generator: torch.Generator,
        *,
        columns: tuple[int, ...] = (),
    ) -> tuple[WeightedDraws, tuple[int, ...]] | None:
        """Draws made for ``theta`` where a scan finds modes of individuals that the search has missed, and the
        coordinates along which it did; else None. Along ``columns`` every individual is scanned in any
        case."""

    def reuse(self, theta: Tensor, state: WeightedDraws) -> WeightedDraws | None:
        """The same draws, if they are valid at ``theta`` as well; None where they must be made anew."""

    def coarsen(self, individuals: int) -> ThetaDependentEstimator:
        """The same estimator with as few draws as comparing starts on so many individuals takes."""


@runtime_checkable
class LikelihoodDraws(WeightedDraws, Protocol):
    """Draws of an estimator that evaluates the likelihood and knows individuals' modes."""

    @property
    def joint(self) -> JointDensity:
        """Likelihood and population density of all individuals, with the simulator and the data."""

    @property
    def modes(self) -> LaplaceComponents:
        """Of every individual, for the theta that the draws were made for."""


@runtime_checkable
class LocalDraws(WeightedDraws, Protocol):
    """Draws whose likelihoods hold near the constants that they were made for, and can be made to hold farther."""

    def along_constants(self, covariance: Tensor | None) -> WeightedDraws:
        """The same draws with likelihoods that hold as far as constants lie under ``covariance (P, P)`` of the
        estimates, which is None where it is not known."""


@runtime_checkable
class BoundedDraws(WeightedDraws, Protocol):
    """Draws whose likelihoods are known within a range of the constants only."""

    def share_beyond_range(self, thetas: Tensor) -> Tensor:
        """Share of ``thetas (K, P)`` whose constants come near the end of that range, for each constant."""


@runtime_checkable
class EstimatorChoice(Protocol):
    """A placeholder for an estimator until the source of the draws is known."""

    def choose(self, source: Source) -> tuple[Estimator, str]:
        """The estimator, and the reason in words."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of an estimator's own search.

    Args:
        theta: ``(P,)`` the estimate.
        monte_carlo_se: ``(P,)`` Monte-Carlo standard error from the search's randomness, 0 where fixed.
        left: ``(P,)`` remaining distance by the search's own estimate: estimate minus optimum, 0 where fixed.
        converged: whether the search converged, by its own criterion.
        message: how it ended, in words.
        shortage: why its Monte-Carlo error is no smaller.
        warnings: about the search.
    """

    theta: Float[Tensor, " P"]
    monte_carlo_se: Float[Tensor, " P"]
    left: Float[Tensor, " P"]
    converged: bool
    message: str
    shortage: str = ""
    warnings: tuple[str, ...] = ()


@runtime_checkable
class SelfOptimizingEstimator(ThetaDependentEstimator, Protocol):
    """An estimator with a search of its own; all else comes from draws at its estimate.

    The fit takes the estimate as it is: likelihood, information, individuals and table come from
    :meth:`ThetaDependentEstimator.draws_at` at it, the estimate's own Monte-Carlo error from the search.
    """

    def search(
        self,
        source: Source,
        observations: Observations,
        theta: Float[Tensor, " P"],
        previous: WeightedDraws | NoDraws,
        generator: torch.Generator,
        *,
        accuracy: float,
        report: Report,
    ) -> SearchResult:
        """From a start to the estimate.

        Args:
            source: the posterior or draws, for first guesses of individuals.
            observations: all data.
            theta: the result of comparing starts.
            previous: draws that it had, or only the population model.
            generator: of everything random.
            accuracy: target Monte-Carlo error, in standard errors.
            report: called with how far it is.
        """


@dataclass(frozen=True, eq=False)
class Redraw:
    """Makes draws for another theta, as the fit's estimator does it; a value that can be copied and sent."""

    estimator: ThetaDependentEstimator
    source: Source
    observations: Observations

    def __call__(self, theta: Tensor, previous: WeightedDraws, generator: torch.Generator) -> WeightedDraws:
        """Draws made for ``theta``; ``previous`` are those before."""
        return self.estimator.draws_at(self.source, self.observations, theta, previous, generator)
