"""Shared by estimators of a likelihood whose draws are made for one theta."""

from __future__ import annotations

from jaxtyping import Float
from torch import Generator, Tensor

from nlme_sbi.population.estimators.initialization import require_likelihood
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.population.objective.objective import contributions
from nlme_sbi.types import Observations, Simulator


class OfLikelihood:
    """A likelihood estimated from weighted draws made for one theta; subclasses make the draws."""

    simulator: Simulator | None
    name: str

    def prepare(
        self,
        source: Source,
        observations: Observations,  # noqa: ARG002
        population: PopulationModel,
        generator: Generator,  # noqa: ARG002
    ) -> NoDraws:
        """Nothing but the population model: draws are made for one theta.

        Raises:
            ValueError: where the simulator has no likelihood.
        """
        require_likelihood(self.simulator, source, self.name)
        return NoDraws(population)

    def objective(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> Float[Tensor, " I"]:
        """``log p(y_i | theta)`` of every individual, from the draws."""
        return contributions(state, theta)

    def reuse(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> WeightedDraws | None:  # noqa: ARG002
        """None: draws are valid at one theta only."""
        return None
