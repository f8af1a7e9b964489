r"""The exact estimator: the population likelihood itself, for simulators whose likelihood can be evaluated.

.. math:: \log p(y_i \mid \theta) = \log \int p(y_i \mid v, s_\theta)\, p(v \mid \theta)\, dv

with the varying parameters v integrated by importance sampling from a heavy-tailed mixture of each individual's own
(:mod:`nlme_sbi.population.likelihood.laplace_components`), and the constant parameters s as arguments of the
likelihood: they are never sampled. The network only provides starting points.

Draws are made anew for every theta of the search, and value, score and curvature there are those of the
likelihood itself (:mod:`nlme_sbi.population.objective.trust_region`); the estimate is verified on draws that nothing
was fitted to (:mod:`nlme_sbi.population.objective.verification`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.population.estimators.exact_draws import (
    ExactDraws,
    draw_from_mixtures,
    draws_without_variability,
    refine_bad_mixtures,
)
from nlme_sbi.population.estimators.initialization import (
    choose_mode_starts,
    find_every_mode,
    is_near,
    likelihood_of,
    require_likelihood,
)
from nlme_sbi.population.estimators.of_likelihood import OfLikelihood
from nlme_sbi.population.likelihood.laplace_components import (
    mixtures,
    profile_components,
)
from nlme_sbi.population.likelihood.log_joint import JointDensity, select_rows
from nlme_sbi.population.likelihood.mode_scan import find_unseen_modes
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.population.objective.subsets import of_individuals
from nlme_sbi.types import Observations, Simulator

_DRAWS_ALL = 100_000  # draws of all individuals together that there are to begin with,
_PREDICTED_ALL = 10_000_000  # where they do not take more predictions than this
_EXPANDED = 0.05  # change of constants over which expansions serve the search
_MANY = 400  # individuals above which only those are drawn again for whom a scan has found modes
_ROUGH_ALL, _ROUGH_MOST = 10_000, 512  # the same where starts are compared


@dataclass(frozen=True)
class Exact(OfLikelihood):
    """Settings of the exact estimator.

    Args:
        draws: of each individual's mixture to begin with, at least; few individuals get more.
        max_draws: how far their number is raised while the Monte-Carlo error is too large.
        simulator: whose likelihood it is; taken from the posterior when left out.
        rough: leave out what only matters for the last digits; set where starts are compared.
    """

    draws: int = 64
    max_draws: int = 8192
    simulator: Simulator | None = None
    rough: bool = False

    name = "exact"
    absolute = True
    approximation = ""

    def __post_init__(self) -> None:
        if self.draws < 16 or self.max_draws < self.draws:
            raise ValueError(f"estimator: needs 16 <= draws <= max_draws; got {self.draws} and {self.max_draws}.")

    def draws_at(
        self,
        source: Source,
        observations: Observations,
        theta: Float[Tensor, " P"],
        previous: WeightedDraws | NoDraws,
        generator: torch.Generator,
    ) -> ExactDraws:
        """Draws made for ``theta``: modes, mixtures, draws with their likelihoods expanded in the constants."""
        simulator = require_likelihood(self.simulator, source, self.name)
        joint = replace(likelihood_of(simulator, previous.population, observations, theta), rough=self.rough)
        individuals = len(observations)
        if not previous.population.varying:
            return draws_without_variability(joint, source.prior)
        known = previous if isinstance(previous, ExactDraws) and previous.individuals == individuals else None
        if known is not None and is_near(joint, known.proposed_for):
            # The mixtures still fit: draws from them, with likelihoods at the new theta.
            state = draw_from_mixtures(joint, known.modes, known.mixed, source.prior, generator)
            state = state if self.rough else refine_bad_mixtures(state, generator)
            return replace(state, proposed_for=known.proposed_for)
        draws = self._draws_of(previous, observations)
        if known is None:
            starts = choose_mode_starts(joint, source, observations, generator)
        else:
            starts = known.modes.add_starts(torch.arange(individuals, device=theta.device), joint.centres)
        return self._make_draws(joint, starts, source, observations, generator, draws=draws)

    def search_modes_again(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        generator: torch.Generator,
    ) -> ExactDraws:
        """Draws for ``theta`` that depend on the search only through its modes: from those, and from modes that a
        search from scratch finds beside them."""
        if not isinstance(state, ExactDraws):
            raise TypeError(f"exact made no such draws: {type(state).__name__}.")
        simulator = require_likelihood(self.simulator, source, self.name)
        joint = likelihood_of(simulator, state.population, observations, theta)
        if not state.population.varying:
            return draws_without_variability(joint, source.prior)
        starts = state.modes.add_starts(*choose_mode_starts(joint, source, observations, generator))
        return self._make_draws(joint, starts, source, observations, generator, draws=state.draws)

    def scan_for_modes(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        generator: torch.Generator,
        *,
        columns: tuple[int, ...] = (),
    ) -> tuple[ExactDraws, tuple[int, ...]] | None:
        """Draws for ``theta`` with modes that the search has missed, where a scan finds any."""
        if not isinstance(state, ExactDraws):
            raise TypeError(f"exact made no such draws: {type(state).__name__}.")
        if not state.population.varying:
            return None
        joint = likelihood_of(
            require_likelihood(self.simulator, source, self.name), state.population, observations, theta
        )
        unseen = find_unseen_modes(joint, state.modes, generator, columns=columns)
        if unseen is None:
            return None
        starts = state.modes.add_starts(unseen.rows, unseen.points)
        if len(observations) > _MANY and bool((state.made_for == theta).all()):
            changed = torch.unique(unseen.rows)
            return self._redraw_individuals(state, changed, starts, source, observations, generator), unseen.columns
        made = self._make_draws(joint, starts, source, observations, generator, draws=state.draws)
        return made, unseen.columns

    def _redraw_individuals(
        self,
        state: ExactDraws,
        changed: Tensor,
        starts: tuple[Tensor, Tensor],
        source: Source,
        observations: Observations,
        generator: torch.Generator,
    ) -> ExactDraws:
        """The same draws, but those of the ``changed`` individuals made anew from these starts of a search for
        modes."""
        rows, points = starts
        place = torch.full((state.individuals,), -1, dtype=torch.int64, device=rows.device)
        place[changed] = torch.arange(len(changed), device=rows.device)
        mine = place[rows] >= 0
        made = self._make_draws(
            replace(state.joint, observations=select_rows(state.joint.observations, changed)),
            (place[rows[mine]], points[mine]),
            of_individuals(source, changed.cpu()),
            observations[changed.cpu()],
            generator,
            draws=state.draws,
        )
        modes = state.modes.replace_rows(replace(made.modes, rows=changed[made.modes.rows]))
        blocks = tuple(replace(block, rows=changed[block.rows]) for block in made.blocks)
        return replace(state.replace_rows(changed, made.mixed, blocks), modes=modes)

    def reuse(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> ExactDraws | None:
        """The same draws where ``theta`` is so near that they serve as well; their likelihoods at other constants are
        expansions unless they are evaluated anyhow."""
        if not isinstance(state, ExactDraws) or not state.population.varying:
            return None
        there = replace(state.joint, theta=theta.detach())
        return state if is_near(there, state.made_for, constants=_EXPANDED) else None

    def _make_draws(
        self,
        joint: JointDensity,
        starts: tuple[Tensor, Tensor],
        source: Source,
        observations: Observations,
        generator: torch.Generator,
        *,
        draws: int,
    ) -> ExactDraws:
        """Modes from these starts, mixtures on them, draws."""
        individuals = len(observations)
        laplace, at = find_every_mode(joint, starts, source, observations, generator)
        if self.rough:  # heavy tails around the modes serve to compare starts
            mixed = mixtures(laplace, individuals, draws, freedom=joint.proposal_freedom)
            return draw_from_mixtures(joint, laplace, mixed, source.prior, generator)
        components = profile_components(joint, laplace, at)
        mixed = mixtures(components, individuals, draws, freedom=joint.proposal_freedom)
        return refine_bad_mixtures(draw_from_mixtures(joint, laplace, mixed, source.prior, generator), generator)

    def coarsen(self, individuals: int) -> Exact:
        """The same with as few draws, and as little care for each individual, as comparing starts takes."""
        draws = max(self.draws, min(_ROUGH_MOST, self.max_draws, _ROUGH_ALL // individuals))
        return replace(self, draws=draws, rough=True)

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
        more = draw_from_mixtures(joint, state.modes, state.mixed.with_draws(draws), state.training, generator)
        return refine_bad_mixtures(replace(more, proposed_for=state.proposed_for), generator)

    def _draws_of(self, previous: WeightedDraws | NoDraws, observations: Observations) -> int:
        individuals = len(observations)
        if isinstance(previous, ExactDraws) and previous.individuals == individuals:
            return previous.draws
        if self.rough:
            return self.draws
        affordable = min(_DRAWS_ALL // individuals, _PREDICTED_ALL // observations.values.numel())
        return max(self.draws, min(self.max_draws, affordable))
