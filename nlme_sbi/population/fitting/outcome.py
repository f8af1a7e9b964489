"""The outcome of an estimation, by whichever algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.optimization import Maximum
from nlme_sbi.population.objective.standard_errors import MonteCarloError
from nlme_sbi.population.objective.verification import Verification
from nlme_sbi.population.results.restart import Restart


@dataclass(frozen=True, eq=False)
class Optimum:
    """The optimum on all draws with both kinds of error; ``covariance`` is over the free unknowns."""

    maximum: Maximum
    information: Float[Tensor, "free free"]
    covariance: Float[Tensor, "free free"] | None
    error: MonteCarloError

    def worst(self, free: Tensor) -> tuple[float, float]:
        """Largest Monte-Carlo SE and bias in standard errors; infinite where there are none."""
        if self.covariance is None:
            return math.inf, math.inf
        se = torch.ones_like(self.maximum.theta).index_copy(0, free, self.covariance.diagonal().sqrt())
        return self.error.worst(se, free)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of an estimation, by whichever algorithm.

    Args:
        state: draws at the estimate.
        optimum: the estimate with both kinds of error.
        restarts: how the starts ended.
        converged: whether the estimate counts as converged.
        message: how the fit ended.
        warnings: of the search itself.
        verification: the check on draws that the search did not use; None where draws are fixed.
        shortage: why the Monte-Carlo error is no smaller.
    """

    state: WeightedDraws
    optimum: Optimum
    restarts: tuple[Restart, ...]
    converged: bool
    message: str
    warnings: tuple[str, ...] = ()
    verification: Verification | None = None
    shortage: str = ""
