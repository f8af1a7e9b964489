r"""SAEM, the stochastic approximation version of EM (Kuhn and Lavielle 2005), for all individuals at once.

Every iteration moves the chains of all individuals (:mod:`nlme_sbi.population.estimators.saem.mcmc`) and updates theta
(:mod:`nlme_sbi.population.estimators.saem.stochastic_approximation`): first with step 1 until theta no longer drifts,
then with steps :math:`k^{-0.7}`, over which theta is averaged (Polyak and Juditsky 1992). Chains at the average, held
fixed, then show whether it is a maximum and give the Monte-Carlo error of the search
(:mod:`nlme_sbi.population.estimators.saem.convergence`).

The exact estimator's importance sampling takes no part in the search; it gives likelihood, information and individuals
at the estimate, as in other SAEM software.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.estimators.exact import Exact
from nlme_sbi.population.estimators.initialization import (
    choose_mode_starts,
    likelihood_of,
    require_every_individual,
    require_likelihood,
)
from nlme_sbi.population.estimators.interface import SearchResult
from nlme_sbi.population.estimators.of_likelihood import OfLikelihood
from nlme_sbi.population.estimators.saem.convergence import StationaryPoint, check_stationarity, drift
from nlme_sbi.population.estimators.saem.mcmc import (
    Chains,
    CompleteData,
    Kernels,
    population_density,
    start_chains,
    sweep_chains,
)
from nlme_sbi.population.estimators.saem.stochastic_approximation import Recursion, update_theta
from nlme_sbi.population.likelihood.laplace_components import LaplaceComponents, distinct_modes, mixtures
from nlme_sbi.population.likelihood.log_joint import JointDensity
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.models.labels import list_ids
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.population.objective.subsets import of_individuals, random_part
from nlme_sbi.types import Observations, Simulator, TractableSimulator

_CHAINS_ALL = 400  # chains of all individuals together that there are at least
_POWER = 0.7  # of the decreasing steps
_SETTLED = 0.25  # first part of the averaging phase that is left out of the average
_DRIFT = 3.0  # standard errors between the halves of a window that count as drift
_REFRESHED = (5, 15, 40, 80)  # sweeps before which proposals are placed anew, then whenever a phase begins
_CURVED = 5  # sweeps between evaluations of the information of stepped entries, after the first few
_LEARNING = 0.6  # power with which the adaptation of random walks fades
_ROUNDS = 4  # of averaging and checking
_WATCHED = 100  # sweeps at the average, at least
_MARGIN = 0.9  # of the target accuracy: standard errors are known here only from the chains
_MANY = 2000  # individuals beyond which a random part of them burns in first
_PART = 1000
_STUCK = 0.02  # share of accepted proposals below which chains are named


@dataclass(frozen=True)
class Saem(OfLikelihood):
    """Settings of SAEM.

    Args:
        burn_in: sweeps with step 1, at least; more while theta drifts.
        averaging: sweeps with decreasing steps, at least; more while their Monte-Carlo error is too large.
        max_sweeps: of everything.
        chains: for each individual; 0 chooses so that there are 400 of all individuals together, at least one each.
        acceptance: share of accepted random-walk steps that step lengths adapt to.
        draws: for each individual of the importance sampling at the estimate, at least.
        simulator: whose likelihood it is; taken from the posterior when left out.
    """

    burn_in: int = 100
    averaging: int = 200
    max_sweeps: int = 3000
    chains: int = 0
    acceptance: float = 0.35
    draws: int = 256
    simulator: Simulator | None = None

    name = "saem"
    absolute = True
    approximation = ""

    def __post_init__(self) -> None:
        if self.burn_in < 40 or self.averaging < 80 or self.max_sweeps < self.burn_in + self.averaging + _WATCHED:
            raise ValueError(
                f"estimator: needs burn_in >= 40, averaging >= 80 and max_sweeps >= burn_in + averaging + {_WATCHED}; "
                f"got {self.burn_in}, {self.averaging} and {self.max_sweeps}."
            )
        if self.chains < 0 or not 0 < self.acceptance < 1 or self.draws < 16:
            raise ValueError(
                "estimator: needs chains >= 0 (0 chooses), acceptance between 0 and 1 and draws >= 16; got "
                f"{self.chains}, {self.acceptance} and {self.draws}."
            )

    @property
    def _sampling(self) -> Exact:
        most = Exact.max_draws
        return Exact(draws=min(self.draws, most), max_draws=most, simulator=self.simulator)

    def draws_at(
        self,
        source: Source,
        observations: Observations,
        theta: Float[Tensor, " P"],
        previous: WeightedDraws | NoDraws,
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Importance sampling at ``theta``, as the exact estimator does it."""
        return self._sampling.draws_at(source, observations, theta, previous, generator)

    def search_modes_again(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        generator: torch.Generator,
    ) -> WeightedDraws:
        """Importance sampling at ``theta`` with modes searched for from the beginning, as in the exact estimator."""
        return self._sampling.search_modes_again(source, observations, state, theta, generator)

    def scan_for_modes(
        self,
        source: Source,
        observations: Observations,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        generator: torch.Generator,
        *,
        columns: tuple[int, ...] = (),
    ) -> tuple[WeightedDraws, tuple[int, ...]] | None:
        """The same with modes that a scan finds, where it finds any."""
        return self._sampling.scan_for_modes(source, observations, state, theta, generator, columns=columns)

    def reuse(self, theta: Float[Tensor, " P"], state: WeightedDraws) -> WeightedDraws | None:
        """Importance sampling's draws where they serve for ``theta`` as well."""
        return self._sampling.reuse(theta, state)

    def coarsen(self, individuals: int) -> Exact:
        """The exact estimator with few draws: starts are compared on the likelihood."""
        return self._sampling.coarsen(individuals)

    def improve(
        self,
        state: WeightedDraws,
        theta: Float[Tensor, " P"],
        observations: Observations,
        generator: torch.Generator,
        *,
        times: int = 2,
    ) -> WeightedDraws | str:
        """More draws of the importance sampling; the estimate itself does not come from it."""
        return self._sampling.improve(state, theta, observations, generator, times=times)

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
    ) -> SearchResult:
        """SAEM from ``theta``, until its Monte-Carlo error is below ``accuracy`` standard errors."""
        simulator = require_likelihood(self.simulator, source, self.name)
        population = previous.population
        if len(observations) > _MANY:
            rows = random_part(len(observations), _PART, generator)
            some = (of_individuals(source, rows), observations[rows], population, theta)
            first = _Run.start(self, simulator, some, generator)
            theta = first.burn_in(report).theta
        run = _Run.start(self, simulator, (source, observations, population, theta), generator)
        return run.burn_in(report).average_and_check(accuracy, observations.ids, report)


@dataclass(frozen=True, eq=False)
class _Run:
    """State of SAEM: everything that the next sweep needs."""

    settings: Saem
    data: CompleteData
    joint: JointDensity
    modes: LaplaceComponents
    chains: Chains
    kernels: Kernels
    recursion: Recursion
    theta: Float[Tensor, " P"]
    generator: torch.Generator
    sweeps: int = 0
    warnings: tuple[str, ...] = ()

    @classmethod
    def start(
        cls,
        settings: Saem,
        simulator: TractableSimulator,
        inputs: tuple[Source, Observations, PopulationModel, Tensor],
        generator: torch.Generator,
    ) -> _Run:
        """Modes, proposals around them and chains drawn from those."""
        source, observations, population, theta = inputs
        joint = likelihood_of(simulator, population, observations, theta)
        with torch.no_grad():
            rows, starts = choose_mode_starts(joint, source, observations, generator, mirrored=False)
            found, at = distinct_modes(joint, rows, starts)
            require_every_individual(found.rows, observations)
            kernels = Kernels.around(joint, found, at, target=settings.acceptance)
        count = settings.chains or max(1, -(-_CHAINS_ALL // len(observations)))
        data = CompleteData.of(simulator, population, joint.observations, chains=count)
        best = mixtures(found, len(observations), 1).means.expand(-1, count, -1)
        chains = start_chains(data, theta, best.clone())
        return cls(
            settings, data, joint, found, chains, kernels, Recursion.start(data, chains, theta), theta, generator
        )

    def sweep(self, step: float | None) -> _Run:
        """One sweep, and with a step one update of theta."""
        turn = self.sweeps
        chains, kernels, _ = sweep_chains(
            self.data,
            self.chains,
            self.kernels,
            self.theta,
            self.generator,
            turn=turn,
            rate=min(0.5, 4 * (turn + 1) ** -_LEARNING),
        )
        run = replace(self, chains=chains, kernels=kernels, sweeps=turn + 1)
        if step is None:
            return run
        curved = turn < _REFRESHED[1] or turn % _CURVED == 0
        recursion, theta = update_theta(self.recursion, self.data, chains, self.theta, step=step, curved=curved)
        return replace(run.at(theta), recursion=recursion)

    def at(self, theta: Tensor) -> _Run:
        """The same chains under another theta."""
        chains = replace(self.chains, prior=population_density(self.data, self.chains.points, theta))
        if self.data.population.constant:
            constants = self.data.population.constants(theta, self.data.observations.design)
            chains = replace(chains, likelihood=self.data.log_likelihood(chains.points, constants))
        return replace(self, theta=theta, chains=chains)

    def refresh_proposals(self) -> _Run:
        """Proposals around the modes that lie near the chains now."""
        individuals = len(self.chains.points)
        joint = replace(self.joint, theta=self.theta)
        every = torch.arange(individuals, device=self.theta.device)
        rows = torch.cat([self.modes.rows, every])
        points = torch.cat([self.modes.means, self.chains.points[:, 0]])
        with torch.no_grad():
            found, at = distinct_modes(joint, rows, points)
            if len(torch.unique(found.rows)) < individuals:
                return self
            kernels = self.kernels.recentre(joint, found, at)
        return replace(self, joint=joint, modes=found, kernels=kernels)

    def burn_in(self, report: Report) -> _Run:
        """Sweeps with step 1 until the window test sees no drift."""
        settings, run = self.settings, self
        free = self.data.population.unknowns.free
        trace: list[Tensor] = []
        most = max(settings.burn_in, settings.max_sweeps // 3)
        ahead = settings.burn_in
        while True:
            if len(trace) in _REFRESHED:
                run = run.refresh_proposals()
            run = run.sweep(1.0)
            trace.append(run.theta[free])
            report(FitProgress("SAEM, step 1", len(trace), ahead))
            if len(trace) < ahead:
                continue
            window = torch.stack(trace[len(trace) // 2 :])
            largest = float(drift(window).abs().max())
            if largest < _DRIFT:
                return run.refresh_proposals()
            if len(trace) >= most:
                place = int(free[int(drift(window).abs().argmax())])
                name = self.data.population.unknowns.labels[place]
                warning = f"After {len(trace)} sweeps with step 1 {name} still drifted; the start may be far off."
                return replace(run.refresh_proposals(), warnings=(*run.warnings, warning))
            ahead = min(most, len(trace) + len(trace) // 2)

    def average_and_check(self, accuracy: float, ids: tuple[str, ...], report: Report) -> SearchResult:
        """Average and check until the average is stationary and its Monte-Carlo error is small enough."""
        settings, run, allowed = self.settings, self, _MARGIN * accuracy
        fixed = self.data.population.unknowns.fixed.to(self.theta.device)
        trace: list[Tensor] = []
        ahead = settings.averaging
        for left_over in reversed(range(_ROUNDS)):
            watched = max(_WATCHED, (ahead - len(trace)) // 2)
            while len(trace) < ahead:
                run = run.sweep((len(trace) + 1) ** -_POWER)
                trace.append(run.theta)
                report(FitProgress("SAEM, averaging", len(trace), ahead))
            kept = trace[int(_SETTLED * len(trace)) :]
            mean = torch.where(fixed, self.theta, torch.stack(kept).mean(0))  # fixed values to the last bit
            run = run.at(mean)
            judged, chains = check_stationarity(run.data, run.chains, run.kernels, mean, run.generator, sweeps=watched)
            run = replace(run, chains=chains, sweeps=run.sweeps + watched)
            se, beyond = judged.sweep_se / len(kept) ** 0.5 / judged.se, _beyond_chance(judged)
            still = float(beyond.abs().max()) < allowed
            room = (settings.max_sweeps - run.sweeps) * 2 // 3  # a third of it for the convergence check
            if (float(se.max()) < allowed and still) or not left_over or room < 2 * _WATCHED:
                break
            if not still:
                trace, ahead = [], min(2 * ahead, room)  # it had not converged: discard these sweeps
                continue
            needed = len(trace) * (float(se.max()) / allowed) ** 2
            ahead = min(int(1.1 * needed) + 20, len(trace) + room)
        return run.summarise(judged, len(kept), accuracy, ids)

    def summarise(self, judged: StationaryPoint, averaged: int, accuracy: float, ids: tuple[str, ...]) -> SearchResult:
        """The estimate with its Monte-Carlo error, message and warnings."""
        free = self.data.population.unknowns.free.to(self.theta.device)
        se = judged.sweep_se / averaged**0.5
        relative, beyond = se / judged.se, _beyond_chance(judged)
        converged = float(beyond.abs().max()) < max(accuracy, float(relative.max()))
        shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in judged.acceptance.items())
        outcome = "Converged" if converged else "NOT converged"
        message = (
            f"{outcome}: at the estimate the score points {float((judged.left / judged.se).abs().max()):.2f} standard "
            f"errors away at most (Monte-Carlo SE {float((judged.left_se / judged.se).max()):.2f}); {self.sweeps} "
            f"sweeps, {averaged} of them averaged, {self.chains.points.shape[1]} chains an individual, accepted: "
            f"{shares}."
        )
        zero = torch.zeros_like(self.theta)
        stuck = torch.nonzero(judged.moved < _STUCK)[:, 0]
        warnings = self.warnings
        if len(stuck) > 0:
            warnings = (
                *warnings,
                f"The chains of {len(stuck)} of {len(ids)} individuals hardly move (fewer than {100 * _STUCK:.0f}% of "
                f"their proposals are accepted): {list_ids(ids, stuck)}. SAEM may have missed a part of their "
                "posteriors; compare with estimator=exact.",
            )
        return SearchResult(
            theta=self.theta,
            monte_carlo_se=zero.index_copy(0, free, se),
            left=zero.index_copy(0, free, beyond * judged.se),
            converged=converged,
            message=message,
            shortage=f"SAEM ended after {self.sweeps} sweeps (estimator.max_sweeps={self.settings.max_sweeps})",
            warnings=warnings,
        )


def _beyond_chance(judged: StationaryPoint) -> Float[Tensor, " free"]:
    """How far the estimate is from the maximum beyond two Monte-Carlo standard errors of that distance, in standard
    errors."""
    excess = (judged.left.abs() - 2 * judged.left_se).clamp_min(0)
    return judged.left.sign() * excess / judged.se
