"""What population models, estimators and their draws must offer each other; the fit knows nothing else of them.

Further letters in shapes: ``V`` parameters that vary between individuals, ``W`` parameters that do not, ``P`` unknowns.
Population unknowns ``theta`` are always one flat, unconstrained float64 vector ``(P,)``, fixed entries included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, Observations, Posterior, PosteriorSamples, Prior

Unknown = Literal["identity", "log", "partial_correlation"]
Source = Posterior | PosteriorSamples


@dataclass(frozen=True, eq=False)
class ParameterTable:
    """The population unknowns, in the order of ``theta``.

    Args:
        names: such as ``mean.delta``, ``log_sd.delta``.
        transforms: how an entry of theta relates to the quantity that it stands for.
        starts: ``(P,)`` float64; the given value for fixed entries, a wished start, or NaN: taken from the draws.
        fixed: ``(P,)`` True where the value is given and not estimated.
    """

    names: tuple[str, ...]
    transforms: tuple[Unknown, ...]
    starts: Float[Tensor, " P"]
    fixed: Bool[Tensor, " P"]

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
    Everything is batched, differentiable in ``theta`` and float64.
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
        """Unconstrained values ``(D,)`` of a typical individual."""

    def covariance(self, theta: Tensor) -> Tensor:
        """Between-individual covariance ``(D, D)``; zero rows for constants."""


@runtime_checkable
class PopulationSpecification(Protocol):
    """A population model before it knows the simulator's parameters, as a config names it."""

    def bind(self, parameters: ParameterSpace) -> PopulationModel:
        """The model for these parameters; raises ``ValueError`` for names that are not there."""


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

    def prepare(
        self, source: Source, observations: Observations, population: PopulationModel, generator: torch.Generator
    ) -> WeightedDraws:
        """Draws for every individual."""

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
    """An estimator whose draws are made for one theta and made anew where the optimum went.

    What :meth:`Estimator.prepare` returns then only serves to compare starts, on as many individuals as it likes.
    """

    def follow(
        self,
        source: Source,
        observations: Observations,
        theta: Tensor,
        previous: WeightedDraws,
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Draws of all individuals made for ``theta``; ``previous`` is what the fit had before."""

    def with_draws(self, draws: int) -> FollowingEstimator:
        """The same estimator that makes so many draws of each individual, within its limits."""

    def serves(self, state: WeightedDraws, theta: Tensor) -> bool:
        """Whether draws that were made for another theta are as good at this one."""


@dataclass(frozen=True)
class FitProgress:
    """How far a fit is: ``done`` of ``total`` steps of a named stage (total 0: not known), and its objective."""

    stage: str
    done: int
    total: int
    objective: float | None = None


Report = Callable[[FitProgress], None]
