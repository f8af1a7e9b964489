r"""Laplace's approximation of the population likelihood: fast, and approximate.

.. math:: \log p(y_i \mid \theta) \approx \log \sum_m \exp\left[ f_i(\hat v_m, \theta)
          - \tfrac12 \log\det(-\partial_v^2 f_i) + \tfrac V2 \log 2\pi \right]

summed over the distinct modes of each individual, which are found anew at every theta. Constants are arguments of the
likelihood. Exact for models that are linear in the varying parameters with Gaussian errors; the "LAPLACE" method of
other software, with exact second derivatives. Values compare with other Laplace fits only.

Source: Wolfinger (1993), Biometrika 80:791.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.initialization import (
    choose_mode_starts,
    find_every_mode,
    likelihood_of,
    require_likelihood,
)
from nlme_sbi.population.estimators.laplace_draws import LaplaceDraws, assemble_draws
from nlme_sbi.population.estimators.of_likelihood import OfLikelihood
from nlme_sbi.population.likelihood.log_joint import JointDensity
from nlme_sbi.population.likelihood.mode_scan import find_unseen_modes
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.types import Observations, Simulator


@dataclass(frozen=True)
class Laplace(OfLikelihood):
    """Settings of Laplace's approximation.

    Args:
        simulator: whose likelihood it is; taken from the posterior when left out.
    """

    simulator: Simulator | None = None

    name = "laplace"
    absolute = True
    approximation = "Laplace"

    def draws_at(
        self,
        source: Source,
        observations: Observations,
        theta: Float[Tensor, " P"],
        previous: WeightedDraws | NoDraws,
        generator: torch.Generator,
    ) -> LaplaceDraws:
        """Every individual's modes at ``theta``: from those that were known, or from the network's draws."""
        if isinstance(previous, LaplaceDraws) and previous.individuals == len(observations):
            joint = self._joint(source, observations, previous, theta)
            every = torch.arange(len(observations), device=theta.device)
            starts = previous.modes.add_starts(every, joint.centres)
            return self._make_draws(joint, starts, source, observations, generator)
        joint = self._joint(source, observations, previous, theta)
        starts = choose_mode_starts(joint, source, observations, generator)
        return self._make_draws(joint, starts, source, observations, generator)

    def search_modes_again(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        generator: torch.Generator,
    ) -> LaplaceDraws:
        """Every individual's modes at ``theta``, those that were known and whatever a search from the beginning
        finds."""
        if not isinstance(state, LaplaceDraws):
            raise TypeError(f"laplace made no such draws: {type(state).__name__}.")
        joint = self._joint(source, observations, state, theta)
        starts = state.modes.add_starts(*choose_mode_starts(joint, source, observations, generator))
        return self._make_draws(joint, starts, source, observations, generator)

    def scan_for_modes(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        generator: torch.Generator,
        *,
        columns: tuple[int, ...] = (),
    ) -> tuple[LaplaceDraws, tuple[int, ...]] | None:
        """Every individual's modes at ``theta`` with those that the search has missed, where a scan finds any."""
        if not isinstance(state, LaplaceDraws):
            raise TypeError(f"laplace made no such draws: {type(state).__name__}.")
        joint = self._joint(source, observations, state, theta)
        unseen = find_unseen_modes(joint, state.modes, generator, columns=columns)
        if unseen is None:
            return None
        starts = state.modes.add_starts(unseen.rows, unseen.points)
        return self._make_draws(joint, starts, source, observations, generator), unseen.columns

    def _joint(
        self, source: Source, observations: Observations, previous: WeightedDraws | NoDraws, theta: Float[Tensor, " P"]
    ) -> JointDensity:
        if not previous.population.varying:
            raise ValueError(
                "estimator laplace integrates over parameters that vary, and here none does: use estimator=exact."
            )
        simulator = require_likelihood(self.simulator, source, self.name)
        return likelihood_of(simulator, previous.population, observations, theta)

    def _make_draws(
        self,
        joint: JointDensity,
        starts: tuple[Tensor, Tensor],
        source: Source,
        observations: Observations,
        generator: torch.Generator,
    ) -> LaplaceDraws:
        modes, _ = find_every_mode(joint, starts, source, observations, generator)
        return assemble_draws(joint, source.prior, modes)

    def coarsen(self, individuals: int) -> Laplace:  # noqa: ARG002
        """Itself: its result does not depend on draws."""
        return self

    def improve(
        self,
        state: WeightedDraws,  # noqa: ARG002
        theta: Float[Tensor, " P"],  # noqa: ARG002
        observations: Observations,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
        *,
        times: int = 2,  # noqa: ARG002
    ) -> WeightedDraws | str:
        """Nothing is sampled, so there is nothing to add."""
        return "estimator laplace has no Monte-Carlo error; its approximation is the same with more draws"
