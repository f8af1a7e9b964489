"""Protocols between population models, estimators and their draws; the fit relies on nothing else.

Further letters in shapes: ``V`` parameters that vary between individuals, ``W`` parameters that do not, ``P`` unknowns.
Population unknowns ``theta`` are always one flat, unconstrained float64 vector ``(P,)``, fixed entries included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import ndtri
from torch import Tensor

from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population.models.labels import correlation_label, effect_label
from nlme_sbi.types import Design, Observations

Transform = Literal["identity", "log", "logit", "log_above_two", "partial_correlation"]

# Quantities that theta holds in the models of this package; user-defined models may have others.
MEAN, LOG_SD, PARTIAL_CORRELATION = "mean", "log_sd", "partial_correlation"
EFFECT, LOG_SD_EFFECT = "effect", "log_sd_effect"
FREEDOM, CLASS_ODDS = "degrees_of_freedom", "class_odds"
EFFECTS = (EFFECT, LOG_SD_EFFECT)


@dataclass(frozen=True)
class Unknown:
    """What one entry of theta is. Equal unknowns of two models of a kind mean the same.

    Args:
        quantity: "mean" or "log_sd" of an individual parameter, "partial_correlation" of two, "effect" (of a covariate
            on a typical value), "log_sd_effect", "degrees_of_freedom", "class_odds" (log odds of a class to class 1),
            or a word of a user-defined model.
        parameter: that it belongs to; "" where it belongs to none. Of a correlation the one that comes first.
        other: the second parameter of a correlation, the covariate of an effect; "" for the others.
        level: of a categorical covariate, or a class of a mixture beyond the first; "" otherwise.
    """

    quantity: str
    parameter: str = ""
    other: str = ""
    level: str = ""

    @property
    def name(self) -> str:
        """As files and error messages call it: ``log_sd.ka``, ``effect.CL.sex.male``. For display, not for parsing."""
        return ".".join(part for part in (self.quantity, self.parameter, self.other, self.level) if part)


@dataclass(frozen=True)
class EffectForm:
    """How a coefficient of a covariate acts, for tables.

    Args:
        form: power, exponential, linear, categorical, or the name in a user-defined model.
        reference: where the effect is nothing, a number or a level in words.
        ratio: whether ``exp(coefficient)`` is a ratio of natural values (of SDs), for a level or for one unit.
    """

    form: str
    reference: str
    ratio: bool = False


@dataclass(frozen=True, eq=False)
class ParameterTable:
    """The population unknowns, in the order of ``theta``; places are positions in theta.

    Args:
        rows: what each entry is.
        transforms: how an entry of theta relates to the quantity that it stands for.
        starts: ``(P,)`` float64; the given value for fixed entries, a given start, or NaN: taken from the draws.
        fixed: ``(P,)`` True where the value is given and not estimated.
        effects: forms of the coefficients of covariates, by place.
        shared: of parameters that share an SD with others, the word for all of them: deviations of occasions.
    """

    rows: tuple[Unknown, ...]
    transforms: tuple[Transform, ...]
    starts: Float[Tensor, " P"]
    fixed: Bool[Tensor, " P"]
    effects: Mapping[int, EffectForm] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.rows), len(self.transforms), len(self.starts), len(self.fixed)}
        if len(lengths) != 1 or len(set(self.names)) != len(self.rows):
            raise ValueError("A parameter table needs one different name, transform, start and flag for each unknown.")
        if bool(torch.isnan(self.starts[self.fixed]).any()):
            raise ValueError("Every fixed unknown needs its value.")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Such as ``mean.delta``, ``log_sd.delta``."""
        return tuple(row.name for row in self.rows)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What tables print: ``ka`` for ``mean.ka``, ``omega(ka)`` for ``log_sd.ka``, ``gamma(CL_OCC)`` of
        occasions, ``corr(ka, V)``, ``WT on CL``."""
        return tuple(self._label(row) for row in self.rows)

    def entry(self, quantity: str, parameter: str = "", other: str = "", level: str = "") -> int | None:
        """Place of an unknown in theta, or None where the model has none."""
        return self._places.get(Unknown(quantity, parameter, other, level))

    def entries(self, *quantities: str) -> tuple[int, ...]:
        """Places of all unknowns of these quantities, ascending."""
        return tuple(place for place, row in enumerate(self.rows) if row.quantity in quantities)

    @property
    def free(self) -> Int[Tensor, " free"]:
        """Positions of the unknowns that are estimated."""
        return torch.nonzero(~self.fixed)[:, 0]

    @cached_property
    def _places(self) -> dict[Unknown, int]:
        return {row: place for place, row in enumerate(self.rows)}

    def _label(self, row: Unknown) -> str:
        if row.quantity == CLASS_ODDS:
            one = self.entries(CLASS_ODDS) == (len(self) - 1,)
            return f"weight of {row.level}" if one else f"log odds of {row.level} to class 1"
        if row.quantity in (MEAN, LOG_SD) and row.level:
            return f"{self._label(replace(row, level=''))} ({row.level})"
        if row.quantity == MEAN:
            return row.parameter
        if row.quantity == LOG_SD:
            word = self.shared.get(row.parameter)
            return f"omega({row.parameter})" if word is None else f"gamma({word})"
        if row.quantity in EFFECTS:
            return effect_label(row.parameter, row.other, row.level, on_log_sd=row.quantity == LOG_SD_EFFECT)
        if row.quantity == PARTIAL_CORRELATION:
            # The first ones of a block are plain correlations; the others are given the parameters before the pair.
            given = tuple(
                one.parameter for one in self.rows if one.quantity == PARTIAL_CORRELATION and one.other == row.parameter
            )
            return correlation_label(row.parameter, row.other, given)
        return "degrees of freedom" if row.quantity == FREEDOM else row.name


@runtime_checkable
class Moments(Protocol):
    """What tables summarise: a population, or a class of a mixture."""

    @property
    def parameters(self) -> ParameterSpace:
        """The individual parameters."""

    @property
    def unknowns(self) -> ParameterTable:
        """The entries of theta."""

    @property
    def varying(self) -> tuple[int, ...]:
        """Columns of phi that have a density."""

    def mean(self, theta: Tensor) -> Tensor:
        """Unconstrained values ``(D,)`` of the typical individual, whose covariates are at their references."""

    def covariance(self, theta: Tensor) -> Tensor:
        """Covariance ``(D, D)`` between individuals like the typical one; zero rows for constants."""


@runtime_checkable
class PopulationModel(Moments, Protocol):
    """``p(phi | theta, x)`` for one parameter space; ``design`` carries what ``x`` may be.

    A new population model is one class with these members and those of :class:`Moments`; estimators, fit, uncertainty
    and table need no change.
    One with covariates has those of :class:`CovariateModel`, too, one whose parameters may be exchanged those of
    :class:`ExchangeableModel`, one whose random effects are not Gaussian those of :class:`ShapedModel`. Everything is
    batched, differentiable in ``theta`` and float64.
    """

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


@runtime_checkable
class CovariateModel(PopulationModel, Protocol):
    """A population model in which individuals have typical values and covariances of their own."""

    def means(self, theta: Tensor, design: Design) -> Tensor:
        """Each individual's typical value, ``(I, D)`` unconstrained."""

    def covariances(self, theta: Tensor, design: Design) -> Tensor:
        """Each individual's covariance about it, ``(I, D, D)``; zero rows for constants."""


@runtime_checkable
class ExchangeableModel(PopulationModel, Protocol):
    """A population model that can exchange the labels of two parameters."""

    @property
    def ordering(self) -> tuple[tuple[str, ...], ...]:
        """Chains of names whose typical values decrease in the reported labelling."""

    def why_not_exchangeable(self, first: str, second: str) -> str:
        """Why the exchange does not leave the model as it was, in words; empty where it does."""

    def exchange(self, theta: Tensor, first: str, second: str) -> Tensor:
        """Theta of the same population under exchanged names."""


@runtime_checkable
class ShapedModel(PopulationModel, Protocol):
    """A population model whose random effects are not Gaussian.

    ``mean`` and ``covariance`` are those that individuals have, whatever their density; tables, priors on theta and
    settings speak of omega, the SDs of :meth:`dispersion`.
    """

    @property
    def tail_freedom(self) -> float:
        """Degrees of freedom of a Student-t whose tails are as heavy as the heaviest that the model may have; infinite
        for Gaussian and exponential tails. Proposals of individuals must have heavier ones."""

    def dispersion(self, theta: Tensor) -> Tensor:
        """Omega as tables have it, ``(D, D)``; zero rows for constants. The covariance only where the random effects
        are Gaussian."""

    def quantile(self, theta: Tensor, probability: float) -> Tensor:
        """Value ``(D,)`` below which this share of individuals like the typical one lies, parameter by parameter,
        unconstrained."""

    def describe(self, theta: Tensor, covariance: Tensor) -> tuple[str, ...]:
        """Sentences below the table: the law, and what omega is in it; ``covariance (P, P)`` is that of the
        estimates."""

    def warn(self, theta: Tensor, covariance: Tensor | None, individuals: int) -> tuple[str, ...]:
        """What makes an estimate of the law from so many individuals doubtful, in words, with the remedy;
        ``covariance`` is that of the free unknowns, None where it is not known."""


@runtime_checkable
class MixtureModel(ShapedModel, Protocol):
    """A population of classes of individuals, numbered from 1 in words and from 0 in arrays."""

    @property
    def classes(self) -> int:
        """How many."""

    @property
    def differing(self) -> tuple[int, ...]:
        """Columns of phi whose typical values differ between classes."""

    @property
    def moments(self) -> tuple[Moments, ...]:
        """Mean and covariance of every class."""

    def class_means(self, theta: Tensor, design: Design) -> Tensor:
        """Typical values of every class for every individual's covariates, ``(I, K, D)``: starts of searches."""

    def memberships(self, phi: Tensor, theta: Tensor, design: Design) -> Tensor:
        """Probability of each class given an individual's varying parameters ``(I, S, V)`` -> ``(I, S, K)``."""

    def from_points(self, points: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """A start whose classes are found among estimates ``(I, D)`` of individuals."""

    def sort_classes(self, theta: Tensor) -> Tensor:
        """Theta under the model's rule of numbering; the same object where it is."""


def centres_of(population: PopulationModel, theta: Tensor, design: Design) -> Tensor:
    """Typical values of every class ``(I, K, D)``; of one where there are no classes."""
    if isinstance(population, MixtureModel):
        return population.class_means(theta, design)
    return means_of(population, theta, design)[:, None]


def is_gaussian(population: Moments) -> bool:
    """Whether random effects are Gaussian: coefficients of variation and normal quantiles then follow from omega."""
    return not isinstance(population, ShapedModel)


def dispersion_of(population: Moments, theta: Tensor) -> Tensor:
    """Omega as tables have it, ``(D, D)``: of Gaussian random effects their covariance."""
    return population.dispersion(theta) if isinstance(population, ShapedModel) else population.covariance(theta)


def quantile_of(population: Moments, theta: Tensor, probability: float) -> Tensor:
    """Value ``(D,)`` below which this share of individuals like the typical one lies, parameter by parameter."""
    if isinstance(population, ShapedModel):
        return population.quantile(theta, probability)
    sd = population.covariance(theta).diagonal().sqrt()
    return population.mean(theta) + sd * float(ndtri(probability))


def tail_freedom_of(population: PopulationModel) -> float:
    """Degrees of freedom of a Student-t whose tails are as heavy; infinite where Gaussian ones suffice."""
    return population.tail_freedom if isinstance(population, ShapedModel) else math.inf


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
    """A specification in which parameters can be made constant: fitted where a variance is estimated at 0."""

    def without_variability(self, name: str) -> PopulationSpecification:
        """The same with this parameter constant."""
