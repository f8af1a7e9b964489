r"""The exact estimator: the population likelihood itself, for simulators whose likelihood can be evaluated.

.. math:: \log p(y_i \mid \theta) = \log \int p(y_i \mid v, s_\theta)\, p(v \mid \theta)\, dv

with the varying parameters v integrated by importance sampling from a heavy-tailed mixture of each individual's own
(:mod:`nlme_sbi.population.proposals`), and the constant parameters s as arguments of the likelihood: they are never
sampled. The network only tells where to begin.

Between two sets of draws the likelihood's dependence on s is its expansion about the values that the draws were made
for: each draw's own gradient, and the mean Hessian of draws of the individual that are chosen by weight. Draws are made
anew at the optimum until it moves so little that what the expansion leaves in it is below a twentieth of a standard
error; values, gradients and curvatures are exact at the point that the last draws were made for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.beginnings import (
    explorable,
    first_climbers,
    is_near,
    likelihood_of,
    modes_with_images,
    require_everybody,
    tractable,
)
from nlme_sbi.population.exact_draws import ExactDraws, drawn, with_bad_ones_refined
from nlme_sbi.population.proposals import along_profiles, mixtures
from nlme_sbi.population.roles import PopulationModel, Source, WeightedDraws
from nlme_sbi.population.weighting import contributions
from nlme_sbi.types import Observations, Simulator

_DRAWS_ALL = 100_000  # draws of all individuals together that there are at least


@dataclass(frozen=True)
class Exact:
    """Settings of the exact estimator.

    Args:
        draws: of each individual's mixture to begin with, at least; few individuals get more.
        max_draws: how far their number is raised while the Monte-Carlo error is too large.
        exploring: draws of the network with which the fit's starts are compared, by the prior ratio.
        simulator: whose likelihood it is; taken from the posterior when left out.
    """

    draws: int = 64
    max_draws: int = 8192
    exploring: int = 300
    simulator: Simulator | None = None

    name = "exact"
    absolute = True
    approximation = ""

    def __post_init__(self) -> None:
        if self.draws < 16 or self.max_draws < self.draws or self.exploring < 20:
            raise ValueError(
                f"estimator: needs 16 <= draws <= max_draws and exploring >= 20; got {self.draws}, {self.max_draws} "
                f"and {self.exploring}."
            )

    def prepare(
        self, source: Source, observations: Observations, population: PopulationModel, generator: torch.Generator
    ) -> WeightedDraws:
        """The network's draws of some individuals, on which starts are compared by the prior ratio.

        Raises:
            ValueError: where the simulator has no likelihood.
        """
        tractable(self.simulator, source, self.name)
        return explorable(source, observations, population, draws=self.exploring, generator=generator)

    def objective(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> Float[Tensor, " I"]:
        """Estimated ``log p(y_i | theta)`` of every individual."""
        return contributions(state, theta)

    def follow(
        self,
        source: Source,
        observations: Observations,
        theta: Float[Tensor, " P"],
        previous: WeightedDraws,
        generator: torch.Generator,
    ) -> ExactDraws:
        """Draws made for ``theta``: modes, mixtures, draws with their likelihoods expanded in the constants."""
        simulator = tractable(self.simulator, source, self.name)
        joint = likelihood_of(simulator, previous.population, observations, theta)
        individuals = len(observations)
        known = previous if isinstance(previous, ExactDraws) and previous.individuals == individuals else None
        if known is not None and is_near(joint, known.proposed_for):
            # The mixtures still fit: draws from them, with likelihoods at the new theta.
            state = drawn(joint, known.modes, known.mixed, source.prior, generator)
            return replace(with_bad_ones_refined(state, generator), proposed_for=known.proposed_for)
        if known is None:
            rows, starts = first_climbers(joint, source, observations, generator)
        else:
            rows, starts = known.modes.rows, known.modes.means
        laplace, at = modes_with_images(joint, rows, starts)
        require_everybody(laplace.rows, observations)
        mixed = mixtures(along_profiles(joint, laplace, at), individuals, self._draws_of(previous, individuals))
        state = drawn(joint, laplace, mixed, source.prior, generator)
        return with_bad_ones_refined(state, generator)

    def with_draws(self, draws: int) -> Exact:
        """The same with so many draws of each individual, at least those it had and at most ``max_draws``."""
        return replace(self, draws=min(max(draws, self.draws), self.max_draws))

    def serves(self, state: WeightedDraws, theta: Float[Tensor, " P"]) -> bool:
        """Whether draws that were made for another theta are as good at this one."""
        return isinstance(state, ExactDraws) and is_near(replace(state.joint, theta=theta), state.proposed_for)

    def improve(
        self,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        observations: Observations,  # noqa: ARG002 - the draws carry theirs
        generator: torch.Generator,
        *,
        times: int = 2,
    ) -> WeightedDraws | str:
        """``times`` as many draws, or why there are none."""
        if not isinstance(state, ExactDraws):
            raise TypeError(f"exact made no such draws: {type(state).__name__}.")
        if state.draws >= self.max_draws:
            return f"max_draws={self.max_draws} is reached"
        draws = min(times * state.draws, self.max_draws)
        joint = replace(state.joint, theta=theta.detach())
        more = drawn(joint, state.modes, state.mixed.with_draws(draws), state.training, generator)
        return with_bad_ones_refined(replace(more, proposed_for=state.proposed_for), generator)

    def _draws_of(self, previous: WeightedDraws, individuals: int) -> int:
        if isinstance(previous, ExactDraws) and previous.individuals == individuals:
            return previous.draws
        return max(self.draws, min(self.max_draws, _DRAWS_ALL // individuals))
