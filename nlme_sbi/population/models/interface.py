"""What population models, estimators and their draws must offer each other; the fit knows nothing else of them.

Further letters in shapes: ``V`` parameters that vary between individuals, ``W`` parameters that do not, ``P`` unknowns.
Population unknowns ``theta`` are always one flat, unconstrained float64 vector ``(P,)``, fixed entries included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.types import Design, Observations

Unknown = Literal["identity", "log", "partial_correlation"]


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

    def why_not_exchangeable(self, first: str, second: str) -> str:
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
