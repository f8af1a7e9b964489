"""A theta with draws made for it, and the likelihood, score and information from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.numerics.factorizations import eigh_or_diagonal
from nlme_sbi.population.models.interface import MEAN
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import (
    complete_information,
    hessian,
    objective_error,
    score_error,
    value_and_gradient,
)
from nlme_sbi.population.objective.standard_errors import covariance_from, name_weakest

_SADDLE = 0.05  # least eigenvalue of the scaled complete information
_OF_PRIOR = 0.15  # of the training prior's SD: least unit of a constant's value


Draw = Callable[[Tensor, WeightedDraws | None], WeightedDraws]  # theta, draws before -> draws made for theta


class NoLikelihoodError(ValueError):
    """No draw of some individual has a likelihood above 0 at a theta; ``rows`` are their positions."""

    def __init__(self, message: str, rows: Tensor) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True, eq=False)
class Point:
    """A theta with draws made for it, and the likelihood, score and information from them.

    Args:
        theta: ``(P,)``.
        state: the draws.
        value: log-likelihood.
        gradient: ``(P,)`` the score; 0 where fixed.
        held: ``(P,)`` unknowns that do not move: fixed ones, and SDs held on their way to 0.
    """

    theta: Float[Tensor, " P"]
    state: WeightedDraws
    value: float
    gradient: Float[Tensor, " P"]
    held: Bool[Tensor, " P"]

    @classmethod
    def at(cls, theta: Float[Tensor, " P"], state: WeightedDraws, held: Bool[Tensor, " P"]) -> Point:
        """Evaluate likelihood and score on ``state`` at ``theta``."""
        value, gradient = value_and_gradient(state, theta)
        return cls(theta, state, value, gradient, held)

    @property
    def is_finite(self) -> bool:
        """Whether value and score are numbers."""
        return math.isfinite(self.value) and bool(torch.isfinite(self.gradient).all())

    @property
    def active(self) -> Tensor:
        """Positions of the unknowns that move."""
        return torch.nonzero(~self.held)[:, 0]

    @property
    def labels(self) -> list[str]:
        """Printed names of the unknowns that move."""
        population = self.state.population
        return [population.unknowns.labels[place] for place in self.active.tolist()]

    @cached_property
    def information(self) -> Float[Tensor, "free free"]:
        """Observed information of the free unknowns."""
        return -hessian(self.state, self.theta)

    @cached_property
    def complete(self) -> Float[Tensor, "free free"]:
        """Information that the complete data would have on the free unknowns, at the present guess of them."""
        return complete_information(self.state, self.theta)

    def among_active(self, matrix: Float[Tensor, "free free"]) -> Float[Tensor, "active active"]:
        """Rows and columns of the unknowns that move."""
        free = self.state.population.unknowns.free.to(self.theta.device)
        kept = torch.nonzero(~self.held[free])[:, 0]
        return matrix[kept][:, kept]

    @cached_property
    def covariance(self) -> Float[Tensor, "active active"] | None:
        """Inverse of the observed information of what moves; None where it is not positive definite."""
        return covariance_from(self.among_active(self.information))

    @property
    def weakest(self) -> str:
        """Names of the moving unknowns about which the data say least."""
        return name_weakest(self.among_active(self.information), self.labels)

    @cached_property
    def left(self) -> Float[Tensor, " active"] | None:
        """Newton step to the maximum, in standard errors; None where there is no maximum nearby."""
        if self.covariance is None:
            return None
        return (self.covariance @ self.gradient[self.active]) / self.covariance.diagonal().sqrt()

    @cached_property
    def left_error(self) -> Float[Tensor, " active"]:
        """Monte-Carlo standard error of :attr:`left`, from how independent draws of every individual differ."""
        if self.covariance is None:
            return torch.full_like(self.gradient[self.active], math.inf)
        spread = self.among_active(score_error(self.state, self.theta))
        variance = (self.covariance @ spread @ self.covariance).diagonal() / self.covariance.diagonal()
        return variance.clamp_min(0).sqrt()

    @cached_property
    def noise(self) -> Float[Tensor, " I"]:
        """Monte-Carlo standard error of every individual's log-likelihood, from independent draws of it."""
        return objective_error(self.state, self.theta)

    @cached_property
    def metric(self) -> tuple[Float[Tensor, "active active"], Float[Tensor, " active"]]:
        """A factor F of the complete information made positive definite, F F' = D, and the unit of every unknown."""
        complete = self.among_active(self.complete)
        scale = complete.diagonal().abs().clamp_min(1e-12).sqrt()
        values, vectors = eigh_or_diagonal(complete / (scale[:, None] * scale))
        root = values.abs().clamp_min(_SADDLE).sqrt()
        factor = scale[:, None] * (vectors * root) @ vectors.T
        return factor, torch.maximum(math.sqrt(self.state.individuals) / scale, _least_units(self))

    @property
    def error(self) -> float:
        """Monte-Carlo standard error of :attr:`value`."""
        return float(self.noise.norm())


def _least_units(point: Point) -> Float[Tensor, " active"]:
    """A share of the training prior's SD for values of constants, which many measurements of an individual determine so
    precisely that their own unit is too short; 0 for the others."""
    population = point.state.population
    if not population.constant:
        return torch.zeros_like(point.theta)[point.active]
    sd = point.state.training_draws()[1].covariance.diagonal().sqrt().to(point.theta)
    least = torch.zeros_like(point.theta)
    for column in population.constant:
        place = population.unknowns.entry(MEAN, population.parameters.names[column])
        if place is not None:
            least[place] = _OF_PRIOR * sd[column]
    return least[point.active]
