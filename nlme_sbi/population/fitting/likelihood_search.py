"""Maximum likelihood with estimators whose draws are made for one theta: starts, search, verification.

The likelihood is first maximised from several starting values, roughly and on a random subset where there are many
individuals; the best goes on with all individuals and as many draws as the target Monte-Carlo error takes. The result
is verified with draws, and modes of the individuals, that the search did not use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.estimators.initialization import require_likelihood
from nlme_sbi.population.estimators.interface import ThetaDependentEstimator
from nlme_sbi.population.fitting.beyond_prior import find_other_explanation, find_prior_conflict
from nlme_sbi.population.fitting.label_switching import apply_ordering, exchange_between
from nlme_sbi.population.fitting.likelihood_starts import (
    SingleFits,
    fit_individuals_alone,
    likelihood_starts,
    start_from,
)
from nlme_sbi.population.models.interface import MEAN, PopulationModel
from nlme_sbi.population.objective.individuals import individual_estimates
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.population.objective.likelihood_point import Draw, NoLikelihoodError, Point
from nlme_sbi.population.objective.subsets import of_individuals, random_part
from nlme_sbi.population.objective.trust_region import Climb, Limits, climb_likelihood
from nlme_sbi.population.objective.vanishing_sds import vanishing_parameters
from nlme_sbi.population.objective.verification import TOLERANCE, Verification, too_many, verify_maximum
from nlme_sbi.population.results.restart import BEYOND, Restart
from nlme_sbi.types import Observations, TractableSimulator

STARTS_ON = 60  # individuals on whom starts are compared
_PART = 500  # size of the random subset for the first steps where there are many individuals
_MANY = 1000  # individuals from which the last steps are taken on common draws
_ROUGH = Limits(tolerance=0.15, errors=2.0, passes=25)
_NEARBY = Limits(tolerance=0.3, errors=2.0, passes=25)
_LAST = Limits(tolerance=0.5 * TOLERANCE, errors=2.0, passes=30, ends_at_zero=True)
_WITHOUT_NOISE = 5e-4  # tolerance where nothing is sampled
_TOO_LOW = 20.0  # log-likelihood below the best start at which another is given up after some passes
_PATIENCE = 4
_SAME = 2.0  # standard errors between ends of equal likelihood that are one maximum, after rough searches
_LEVEL = 0.5  # log-likelihoods this near may be equal after rough searches, before Monte-Carlo error
_DIFFERS = 3.0  # standard errors between means of parameters that are named
_CHECKS = 6  # verifications of the result, and restarts of the search from there, at most
_UNSEEN = "a scan still finds modes of individuals that the search had not seen"
_SAFETY = 1.1  # factor on the Monte-Carlo error before it sets the number of draws


@dataclass(frozen=True, eq=False)
class Task:
    """What is fitted: an estimator, the source of individuals' first guesses, data, population model, and the
    parameters whose SD stays in the search however small it becomes."""

    estimator: ThetaDependentEstimator
    source: Source
    observations: Observations
    population: PopulationModel
    generator: torch.Generator
    report: Report
    kept: tuple[str, ...] = ()

    def part(self, rows: Tensor) -> Task:
        """The same with some of the individuals."""
        if len(rows) == len(self.observations):
            return self
        some = of_individuals(self.source, rows)
        return replace(self, source=some, observations=self.observations[rows])

    def draw(self, theta: Float[Tensor, " P"], before: WeightedDraws | None) -> WeightedDraws:
        """Draws made for ``theta``."""
        known = NoDraws(self.population) if before is None else before
        with torch.no_grad():
            return self.estimator.draws_at(self.source, self.observations, theta, known, self.generator)

    def keep(self, theta: Float[Tensor, " P"], before: WeightedDraws | None) -> WeightedDraws:
        """The previous draws where they are valid at ``theta``, too; else new ones."""
        with torch.no_grad():
            kept = None if before is None else self.estimator.reuse(theta, before)
        return self.draw(theta, before) if kept is None else kept

    def search_modes_again(self, theta: Float[Tensor, " P"], before: WeightedDraws | None) -> WeightedDraws:
        """Draws made for ``theta`` with modes searched for from the beginning, too."""
        if before is None:
            return self.draw(theta, None)
        with torch.no_grad():
            return self.estimator.search_modes_again(self.source, self.observations, before, theta, self.generator)

    def scan_for_modes(self, point: Point, columns: tuple[int, ...] = ()) -> tuple[Point, tuple[int, ...]] | None:
        """The same point with draws that cover modes which the search had missed, and the coordinates along which they
        were found; None where a scan finds none."""
        with torch.no_grad():
            found = self.estimator.scan_for_modes(
                self.source, self.observations, point.state, point.theta, self.generator, columns=columns
            )
        return None if found is None else (Point.at(point.theta, found[0], point.held), found[1])

    def point(self, theta: Float[Tensor, " P"], draw: Draw | None = None, before: WeightedDraws | None = None) -> Point:
        """The likelihood at ``theta`` on draws made for it."""
        state = (draw or self.draw)(theta, before)
        return Point.at(theta, state, self.population.unknowns.fixed.to(theta.device))


@dataclass(frozen=True, eq=False)
class CheckedMaximum:
    """Result of a likelihood search with its verification."""

    point: Point
    verification: Verification
    restarts: tuple[Restart, ...]
    shortage: str = ""


def search_likelihood(
    task: Task, *, starts: int, accuracy: float, begin: Float[Tensor, " P"] | None = None
) -> CheckedMaximum:
    """The maximum of the likelihood, checked.

    Args:
        task: what is fitted.
        starts: how many.
        accuracy: target Monte-Carlo error, in standard errors.
        begin: a single starting value in place of ``starts``.

    Raises:
        ValueError: where the likelihood is 0 or not finite at every start.
    """
    restarts: tuple[Restart, ...] = ()
    theta = begin
    if theta is None:
        theta, restarts = compare_starts(task, starts=starts)
    return maximise_and_check(task, theta, accuracy=accuracy, restarts=restarts)


def compare_starts(task: Task, *, starts: int) -> tuple[Float[Tensor, " P"], tuple[Restart, ...]]:
    """A rough search from every start; the best result under the requested labelling, and how all ended.

    Raises:
        ValueError: where the likelihood is 0 or not finite at every start.
    """
    estimator, generator = task.estimator, task.generator
    rows = random_part(len(task.observations), STARTS_ON, generator)
    part = replace(task.part(rows), estimator=estimator.coarsen(len(rows)))
    simulator = require_likelihood(getattr(estimator, "simulator", None), task.source, estimator.name)
    fits = fit_individuals_alone(simulator, part.source, part.observations, generator)
    points = likelihood_starts(fits, part.source, task.population, count=starts, generator=generator)
    ends: list[tuple[str, Climb | None]] = []
    refused: NoLikelihoodError | None = None
    for done, (name, theta) in enumerate(points):
        best = _highest(ends)
        task.report(FitProgress("starts", done, len(points), None if best is None else best.point.value))
        limits = replace(_ROUGH, enough=partial(_reason_to_give_up, best))
        try:
            ends.append((name, climb_likelihood(part.draw, part.point(theta), limits)))
        except NoLikelihoodError as problem:
            refused = problem
            ends.append((name, None))
    best = _highest(ends)
    if best is None:
        raise ValueError(str(refused) if refused is not None else "The likelihood is not finite at any start.")
    other = None
    if len(part.observations) == len(task.observations):
        other = _climb_from_other_explanation(
            part, simulator, fits, replace(_ROUGH, enough=partial(_reason_to_give_up, best))
        )
    if other is None:
        return apply_ordering(task.population, best.point.theta), _compare_with_best(ends, best)
    gain = other.point.value - best.point.value
    beyond = find_prior_conflict(task.population, best.point.theta, other.point.theta, gain, task.source)
    named = "another explanation of the data", other
    if not beyond:
        ends.append(named)
        best = _highest(ends) or best
        return apply_ordering(task.population, best.point.theta), _compare_with_best(ends, best)
    (judged,) = _compare_with_best([named], best)
    restarts = _compare_with_best(ends, best)
    if judged.verdict == "other point" and not judged.exchanged:
        restarts = (*restarts, replace(judged, verdict=BEYOND, differing=beyond))
    return apply_ordering(task.population, best.point.theta), restarts


def _climb_from_other_explanation(
    part: Task, simulator: TractableSimulator, fits: SingleFits, limits: Limits
) -> Climb | None:
    """The result of a search from another explanation of the same data; None where there is none."""
    other = find_other_explanation(simulator, part.source, part.observations, fits, part.generator)
    if other is None:
        return None
    try:
        end = climb_likelihood(part.draw, part.point(start_from(other, part.source, part.population)), limits)
    except NoLikelihoodError:
        return None
    return end if math.isfinite(end.point.value) else None


def maximise_and_check(
    task: Task, theta: Float[Tensor, " P"], *, accuracy: float, restarts: tuple[Restart, ...]
) -> CheckedMaximum:
    """From near a maximum to a verified estimate on all individuals.

    The first steps are rough, and on a random subset where there are many individuals. The last ones take as many draws
    as the accuracy needs; the draws at each point are independent of the step that led there, and modes of the
    individuals are searched for from scratch, so that the last point's own draws verify it.
    """
    individuals = len(task.observations)
    if individuals > STARTS_ON:
        part = task.part(random_part(individuals, _PART, task.generator))
        rough = replace(part, estimator=task.estimator.coarsen(len(part.observations)))
        nearby = replace(_NEARBY, kept=task.kept)
        theta = climb_likelihood(
            rough.draw, rough.point(theta), nearby, watch=partial(_report_climb, rough)
        ).point.theta
        if individuals > _MANY:  # all individuals begin where the subset leaves off
            near = part.point(theta)
            near, _ = part.scan_for_modes(near) or (near, ())
            theta = climb_likelihood(part.keep, near, nearby, watch=partial(_report_climb, part)).point.theta
    tolerance = _WITHOUT_NOISE if task.estimator.approximation else _LAST.tolerance
    last = replace(_LAST, tolerance=tolerance, kept=task.kept)
    start = task.point(theta)
    start, columns = task.scan_for_modes(start) or (start, ())
    if individuals > _MANY:
        return _maximise_on_common_draws(task, start, columns, last, accuracy=accuracy, restarts=restarts)
    climb = climb_likelihood(task.search_modes_again, start, last, watch=partial(_report_climb, task))
    if vanishing_parameters(climb.point):  # decided later by a fit in which that SD is fixed at 0
        return CheckedMaximum(climb.point, _check(task, climb), restarts)
    climb, shortage = _reduce_monte_carlo_error(task, _add_comparison_point(task, climb), last, accuracy)
    for turn in range(_CHECKS + 1):
        # No second scan where the first found nothing and the search converged.
        wider = task.scan_for_modes(climb.point, columns) if columns or not climb.arrived else None
        checked = _check(task, climb, "" if wider is None else _UNSEEN)
        is_done = wider is None and (checked.passed or not climb.arrived or climb.point.left is None)
        if is_done or turn == _CHECKS:
            break
        # A maximum on the draws of the search, which others do not confirm: go on from there.
        task.report(FitProgress("check", turn, _CHECKS, climb.point.value))
        before = climb.point
        again, columns = wider or (_draw_again(task, before, checked), columns)
        climb = climb_likelihood(task.search_modes_again, again, last, watch=partial(_report_climb, task))
        climb = climb if climb.previous is not None else replace(climb, previous=before)
        climb, shortage = _reduce_monte_carlo_error(task, climb, last, accuracy)
    return CheckedMaximum(climb.point, checked, restarts, shortage)


def _maximise_on_common_draws(
    task: Task,
    start: Point,
    columns: tuple[int, ...],
    last: Limits,
    *,
    accuracy: float,
    restarts: tuple[Restart, ...],
) -> CheckedMaximum:
    """The last steps with many individuals, whose draws are expensive while the remaining distance is short beside the
    population's SDs: all steps use the same draws, and new draws at the end verify the result."""
    shared = replace(last, errors=0.0)
    climb = climb_likelihood(task.keep, start, shared, watch=partial(_report_climb, task))
    if vanishing_parameters(climb.point):  # decided later by a fit in which that SD is fixed at 0
        return CheckedMaximum(climb.point, _check(task, climb), restarts)
    climb, shortage = _reduce_monte_carlo_error(task, climb, shared, accuracy, draw=task.keep)
    for turn in range(_CHECKS + 1):
        task.report(FitProgress("check", turn, _CHECKS, climb.point.value))
        fresh = replace(task.point(climb.point.theta, task.draw, climb.point.state), held=climb.point.held)
        wider = task.scan_for_modes(fresh, columns)
        end = replace(climb, point=fresh, previous=climb.point)
        checked = _check(task, end, "" if wider is None else _UNSEEN)
        is_done = wider is None and (checked.passed or not climb.arrived or fresh.left is None)
        if is_done or turn == _CHECKS:
            break
        again, columns = wider or (_draw_again(task, fresh, checked), columns)
        climb = climb_likelihood(task.keep, again, shared, watch=partial(_report_climb, task))
        climb, shortage = _reduce_monte_carlo_error(task, climb, shared, accuracy, draw=task.keep)
    return CheckedMaximum(fresh, checked, restarts, shortage)


def _draw_again(task: Task, before: Point, checked: Verification) -> Point:
    """The same theta with more draws where many individuals have too few effective ones, else with new draws."""
    if too_many(checked.poor_individuals, len(task.observations)):
        with torch.no_grad():
            more = task.estimator.improve(before.state, before.theta, task.observations, task.generator, times=4)
        if not isinstance(more, str):
            return Point.at(before.theta, more, before.held)
    return replace(task.point(before.theta, task.search_modes_again, before.state), held=before.held)


def _add_comparison_point(task: Task, climb: Climb) -> Climb:
    """The search result with new draws where no step was taken, so that there are two to compare."""
    if climb.previous is not None or not climb.arrived:
        return climb
    fresh = replace(task.point(climb.point.theta, task.search_modes_again, climb.point.state), held=climb.point.held)
    return replace(climb, point=fresh, previous=climb.point)


def _check(task: Task, climb: Climb, doubt: str = "") -> Verification:
    """Compare the last point with the previous one, whose draws are independent of it; ``doubt`` is a reason against it
    from elsewhere."""
    point = climb.point
    individuals = individual_estimates(point.state, point.theta)
    reason = doubt if climb.arrived or vanishing_parameters(point) else climb.reason
    return verify_maximum(
        point, climb.previous, individuals, draws=point.state.draws, ids=task.observations.ids, reason=reason
    )


def _reduce_monte_carlo_error(
    task: Task, climb: Climb, last: Limits, accuracy: float, *, draw: Draw | None = None
) -> tuple[Climb, str]:
    """Continue with as many draws as the target accuracy takes, made by ``draw`` for every step; or the reason why
    there are no more."""
    while climb.point.covariance is not None and len(climb.point.active):
        lacking = _SAFETY * _noise(climb.point) / accuracy
        if not lacking > _SAFETY:
            break
        times = 2 ** min(4, max(1, math.ceil(1.6 * math.log2(min(lacking, 1e3)))))
        before = climb.point
        with torch.no_grad():
            better = task.estimator.improve(before.state, before.theta, task.observations, task.generator, times=times)
        if isinstance(better, str):
            return climb, better
        again = Point.at(before.theta, better, before.held)
        climb = climb_likelihood(draw or task.search_modes_again, again, last, watch=partial(_report_climb, task))
        climb = climb if climb.previous is not None else replace(climb, previous=before)
    return climb, ""


def _noise(point: Point) -> float:
    """Largest Monte-Carlo standard error of an unknown, in standard errors."""
    return float(point.left_error.max()) if len(point.active) else 0.0


def _report_climb(task: Task, point: Point, passes: int) -> None:
    task.report(FitProgress(f"likelihood of {len(task.observations)} individuals", passes, 0, point.value))


def _reason_to_give_up(best: Climb | None, point: Point, previous: Point | None, passes: int) -> str:
    """Why to give up a start that is far below another one after some passes and rises too slowly; "" to go on."""
    if best is None or passes < _PATIENCE:
        return ""
    below = best.point.value - point.value
    noise = math.hypot(best.point.error, point.error)
    risen = 0.0 if previous is None else point.value - previous.value
    too_slow = risen * (_ROUGH.passes - passes) < below
    return "far below another start" if below > _TOO_LOW + 4 * noise and too_slow else ""


def _highest(ends: list[tuple[str, Climb | None]]) -> Climb | None:
    reached = [end for _, end in ends if end is not None and math.isfinite(end.point.value)]
    arrived = [end for end in reached if end.arrived or vanishing_parameters(end.point)]
    best = max(reached, key=lambda end: end.point.value, default=None)
    if best is None or best.arrived or not arrived:
        return best
    # A converged result is preferred to one that has not converged unless it is clearly lower.
    other = max(arrived, key=lambda end: end.point.value)
    noise = 4 * math.hypot(best.point.error, other.point.error)
    return other if best.point.value - other.point.value < noise + _LEVEL else best


def _compare_with_best(ends: list[tuple[str, Climb | None]], best: Climb) -> tuple[Restart, ...]:
    """The result of every start against the best, on the same likelihood."""
    point = best.point
    table, population = point.state.population.unknowns, point.state.population
    covariance = point.covariance
    if covariance is None:
        covariance = torch.linalg.pinv(point.among_active(point.complete), hermitian=True)
    se = torch.full_like(point.theta, math.inf)
    se[point.active] = covariance.diagonal().abs().sqrt().clamp_min(1e-12)
    found = []
    for start, end in ends:
        if end is None or not math.isfinite(end.point.value):
            found.append(Restart(start, -math.inf, math.inf, math.inf, "failed"))
            continue
        # An SD that goes to 0 in one of them has no distance: the likelihood is flat there.
        shift = torch.where(end.point.held, 0.0, end.point.theta - point.theta)
        distance = float((shift.abs() / se).max())
        below = point.value - end.point.value
        level = below < _LEVEL + 4 * math.hypot(point.error, end.point.error)
        # Results of rough searches scatter around the maximum.
        arrived = end.arrived or bool(vanishing_parameters(end.point))
        verdict = "same" if distance < _SAME and level else "other point" if level and arrived else "lower"
        differing: tuple[str, ...] = ()
        if verdict == "other point":
            apart = (population.mean(end.point.theta) - population.mean(point.theta)).abs()
            differing = tuple(
                name
                for name, value in zip(population.parameters.names, apart.tolist(), strict=True)
                if (place := table.entry(MEAN, name)) is not None and value / float(se[place]) > _DIFFERS
            )
        errors = torch.where(_unknowns_of_vanishing_sds(point) | _unknowns_of_vanishing_sds(end.point), math.inf, se)
        exchanged = exchange_between(
            population,
            point.theta,
            end.point.theta,
            names=differing,
            se=errors[table.free.to(se.device)],
            within=_DIFFERS,
        )
        unknowns = dict(zip(table.names, end.point.theta.tolist(), strict=True))
        found.append(Restart(start, end.point.value, below, distance, verdict, differing, exchanged, unknowns))
    return tuple(found)


def _unknowns_of_vanishing_sds(point: Point) -> Bool[Tensor, " P"]:
    """Unknowns of parameters whose SD was going to 0, where rough searches end at arbitrary values."""
    table = point.state.population.unknowns
    held = (point.held & ~table.fixed.to(point.held.device)).tolist()
    vanishing = {row.parameter for row, is_held in zip(table.rows, held, strict=True) if is_held}
    return torch.tensor([row.parameter in vanishing for row in table.rows], device=point.theta.device)
