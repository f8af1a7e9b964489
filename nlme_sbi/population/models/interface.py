"""What population models, estimators and their draws must offer each other; the fit knows nothing else of them.

Further letters in shapes: ``V`` parameters that vary between individuals, ``W`` parameters that do not, ``P`` unknowns.
Population unknowns ``theta`` are always one flat, unconstrained float64 vector ``(P,)``, fixed entries included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, Observations, Posterior, PosteriorSamples, Prior

Unknown = Literal["identity", "log", "partial_correlation"]
Source = Posterior | PosteriorSamples


@dataclass(frozen=True)
class EffectLabel:
    """What a coefficient of a covariate is, for tables.

    Args:
        position: in theta.
        parameter: whose typical value or SD it shifts.
        on: "mean" or "log_sd".
        covariate: its name.
        form: power, exponential, linear, categorical, or what a model of one's own calls it.
        reference: where the effect is nothing, a number or a level in words.
        level: of a categorical covariate; "" otherwise.
        ratio: whether ``exp(coefficient)`` is a ratio of natural values (of SDs), for a level or for one unit.
    """

    position: int
    parameter: str
    on: Literal["mean", "log_sd"]
    covariate: str
    form: str
    reference: str
    level: str = ""
    ratio: bool = False


@dataclass(frozen=True, eq=False)
class ParameterTable:
    """The population unknowns, in the order of ``theta``.

    Args:
        names: such as ``mean.delta``, ``log_sd.delta``.
        transforms: how an entry of theta relates to the quantity that it stands for.
        starts: ``(P,)`` float64; the given value for fixed entries, a wished start, or NaN: taken from the draws.
        fixed: ``(P,)`` True where the value is given and not estimated.
        effects: which entries are coefficients of covariates.
    """

    names: tuple[str, ...]
    transforms: tuple[Unknown, ...]
    starts: Float[Tensor, " P"]
    fixed: Bool[Tensor, " P"]
    effects: tuple[EffectLabel, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.transforms), len(self.starts), len(self.fixed)}
        if len(lengths) != 1 or len(set(self.names)) != len(self.names):
            raise ValueError("A parameter table needs one different name, transform, start and flag for each unknown.")
        if bool(torch.isnan(self.starts[self.fixed]).any()):
            raise ValueError("Every fixed unknown needs its value.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def free(self) -> Int[Tensor, " free"]:
        """Positions of the unknowns that are estimated."""
        return torch.nonzero(~self.fixed)[:, 0]


@runtime_checkable
class PopulationModel(Protocol):
    """``p(phi | theta, x)`` for one parameter space; ``design`` carries what ``x`` may be.

    A new population model is one class with these members; estimators, fit, uncertainty and table need no change.
    One with covariates has those of :class:`CovariateModel`, too, and one whose parameters may be exchanged those of
    :class:`ExchangeableModel`. Everything is batched, differentiable in ``theta`` and float64.
    """

    @property
    def parameters(self) -> ParameterSpace:
        """The individual parameters."""

    @property
    def unknowns(self) -> ParameterTable:
        """The entries of theta."""

    @property
    def varying(self) -> tuple[int, ...]:
        """Columns of phi that have a density."""

    @property
    def constant(self) -> tuple[int, ...]:
        """Columns of phi that are the same for individuals with the same design."""

    def log_prob(self, phi: Tensor, theta: Tensor, design: Design) -> Tensor:
        """Log density of the varying columns ``phi (I, S, V)`` -> ``(I, S)``."""

    def constants(self, theta: Tensor, design: Design) -> Tensor:
        """Values of the constant columns, ``(I, W)``."""

    def sample(self, theta: Tensor, design: Design, generator: torch.Generator) -> Tensor:
        """One individual for every row of the design, ``(I, D)``."""

    def from_moments(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """A start ``theta (P,)`` with about this mean ``(D,)`` and covariance ``(D, D)``; fixed values honoured."""

    def statistics(self, weights: Tensor, phi: Tensor, theta: Tensor, design: Design) -> Tensor | None:
        """What the M-step needs of ``phi (I, S, V)`` weighted by ``(I, S)``: one flat tensor that adds up over blocks
        of individuals, or None where the M-step has no closed form."""

    def m_step(self, statistics: Tensor, theta: Tensor) -> Tensor:
        """Maximiser of the expected complete log-likelihood; entries without closed form (constants) stay."""

    def mean(self, theta: Tensor) -> Tensor:
        """Unconstrained values ``(D,)`` of the typical individual, whose covariates are at their references."""

    def covariance(self, theta: Tensor) -> Tensor:
        """Covariance ``(D, D)`` between individuals like the typical one; zero rows for constants."""


@runtime_checkable
class CovariateModel(PopulationModel, Protocol):
    """A population model in which individuals have typical values and covariances of their own."""

    def means(self, theta: Tensor, design: Design) -> Tensor:
        """Each individual's typical value, ``(I, D)`` unconstrained."""

    def covariances(self, theta: Tensor, design: Design) -> Tensor:
        """Each individual's covariance about it, ``(I, D, D)``; zero rows for constants."""


@runtime_checkable
class ExchangeableModel(PopulationModel, Protocol):
    """A population model that knows what it becomes when two parameters exchange their names."""

    @property
    def ordering(self) -> tuple[tuple[str, ...], ...]:
        """Chains of names whose typical values shall decrease in what is presented."""

    def obstacle(self, first: str, second: str) -> str:
        """Why the exchange does not leave the model as it was, in words; empty where it does."""

    def exchanged(self, theta: Tensor, first: str, second: str) -> Tensor:
        """Theta of the same population under exchanged names."""


def means_of(population: PopulationModel, theta: Tensor, design: Design) -> Tensor:
    """Each individual's typical value ``(I, D)``, with or without covariates."""
    if isinstance(population, CovariateModel):
        return population.means(theta, design)
    return population.mean(theta).expand(len(design), -1)


def covariances_of(population: PopulationModel, theta: Tensor, design: Design) -> Tensor:
    """Each individual's covariance ``(I, D, D)``, with or without covariates."""
    if isinstance(population, CovariateModel):
        return population.covariances(theta, design)
    return population.covariance(theta).expand(len(design), -1, -1)


@runtime_checkable
class PopulationSpecification(Protocol):
    """A population model before it knows the simulator's parameters, as a config names it."""

    def bind(self, parameters: ParameterSpace, observations: Observations | None = None) -> PopulationModel:
        """The model for these parameters and, where it has covariates, for these data; raises ``ValueError`` for names
        that are not there."""


@runtime_checkable
class VariabilitySpecification(PopulationSpecification, Protocol):
    """A specification in which parameters can be made constant: where a variance vanishes, that is what is fitted."""

    def without_variability(self, name: str) -> PopulationSpecification:
        """The same with this parameter constant."""


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
        """What a reader must know of these draws at ``theta``, beyond their effective number."""


@dataclass(frozen=True, eq=False)
class NoDraws:
    """What an estimator has that makes its draws for one theta, before it knows any: the population model."""

    population: PopulationModel


@runtime_checkable
class SetsOfDraws(WeightedDraws, Protocol):
    """Draws that were made in several independent sets, whose differences tell their Monte-Carlo error."""

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

    def expanded_at(self, theta: Tensor) -> WeightedDraws:
        """The same draws expanded about the constants at ``theta``."""

    def bridged(self, other: Any, generator: torch.Generator) -> WeightedDraws:
        """Fresh draws that serve the theta of these and that of the other draws alike."""


@runtime_checkable
class Estimator(Protocol):
    """A way to the population likelihood.

    ``absolute`` tells whether the objective is log p(y | theta) itself; otherwise it is a ratio to the evidence under
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
class FollowingEstimator(Estimator, Protocol):
    """An estimator of a likelihood whose draws are made for one theta, and made anew for every theta of the search."""

    def follow(
        self,
        source: Source,
        observations: Observations,
        theta: Tensor,
        previous: WeightedDraws | NoDraws,
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Draws of all individuals made for ``theta``; ``previous`` is what the search had before, or only tells the
        population model.

        Raises:
            NoLikelihoodError: where no draw of some individual has a likelihood above 0.
        """

    def look_again(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Tensor,
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Draws made for ``theta`` that owe nothing to ``state`` but its modes: others are searched for, too."""

    def search_wider(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Tensor,
        generator: torch.Generator,
    ) -> WeightedDraws | None:
        """Draws made for ``theta`` where a scan finds modes of individuals that the search has passed by; else None."""

    def roughly(self, individuals: int) -> FollowingEstimator:
        """The same estimator with as few draws as comparing starts on so many individuals takes."""


@dataclass(frozen=True)
class FitProgress:
    """How far a fit is: ``done`` of ``total`` steps of a named stage (total 0: not known), and its objective."""

    stage: str
    done: int
    total: int
    objective: float | None = None


Report = Callable[[FitProgress], None]


def discard(progress: FitProgress) -> None:
    """Discard progress reports."""


@dataclass(frozen=True, eq=False)
class Found:
    """Where an estimator's own search ended.

    Args:
        theta: ``(P,)`` the estimate.
        monte_carlo_se: ``(P,)`` what the search's randomness does to it, 0 where fixed.
        left: ``(P,)`` how far the search sees itself from where it was going: estimate minus optimum, 0 where fixed.
        converged: whether the search may end there, by its own judgement.
        message: how it ended, in words.
        shortage: why its Monte-Carlo error is no smaller.
        warnings: what a reader must know of the search.
    """

    theta: Float[Tensor, " P"]
    monte_carlo_se: Float[Tensor, " P"]
    left: Float[Tensor, " P"]
    converged: bool
    message: str
    shortage: str = ""
    warnings: tuple[str, ...] = ()


@runtime_checkable
class SearchingEstimator(FollowingEstimator, Protocol):
    """An estimator that finds theta by itself; its draws at that theta then tell everything else.

    The fit takes the estimate as it
    is: likelihood, information, individuals and table come from :meth:`FollowingEstimator.follow` at it, the estimate's
    own Monte-Carlo error from the search.
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
    ) -> Found:
        """From a start to the estimate.

        Args:
            source: the posterior or draws, for first guesses of individuals.
            observations: all data.
            theta: where the comparison of starts ended.
            previous: draws that it had, or only the population model.
            generator: of everything random.
            accuracy: wished Monte-Carlo error, in standard errors.
            report: told how far it is.
        """


@dataclass(frozen=True, eq=False)
class Redraw:
    """Makes draws for another theta, as the fit's estimator does it; a value that can be copied and sent."""

    estimator: FollowingEstimator
    source: Source
    observations: Observations

    def __call__(self, theta: Tensor, previous: WeightedDraws, generator: torch.Generator) -> WeightedDraws:
        """Draws made for ``theta``; ``previous`` is what was there before."""
        return self.estimator.follow(self.source, self.observations, theta, previous, generator)
