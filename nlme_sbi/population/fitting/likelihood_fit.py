"""Fits of a likelihood: by maximising it, or by an estimator's own search whose result is then checked on draws."""

from __future__ import annotations

from torch import Tensor

from nlme_sbi.compute.progress import FitProgress
from nlme_sbi.population.estimators.interface import Estimator, SelfOptimizingEstimator
from nlme_sbi.population.fitting.label_switching import apply_ordering
from nlme_sbi.population.fitting.likelihood_search import Task, compare_starts, search_likelihood
from nlme_sbi.population.fitting.outcome import Optimum, Outcome
from nlme_sbi.population.objective.individuals import individual_estimates
from nlme_sbi.population.objective.interface import NoDraws
from nlme_sbi.population.objective.likelihood_point import Point
from nlme_sbi.population.objective.optimization import Maximum
from nlme_sbi.population.objective.standard_errors import likelihood_error, monte_carlo_error
from nlme_sbi.population.objective.verification import Verification, verify_maximum
from nlme_sbi.population.results.restart import Restart

_SCANS = 3  # scans for modes of individuals that a search may have missed
_CONTRADICTED = 0.25  # standard errors between a search's estimate and the maximum of the likelihood there


def fit_likelihood(task: Task, *, starts: int, accuracy: float, begin: Tensor | None) -> Outcome:
    """The maximum of a likelihood, checked on draws that the search did not use."""
    begin = None if begin is None else begin.to(task.generator.device)
    if isinstance(task.estimator, SelfOptimizingEstimator):
        return _fit_by_own_search(task, task.estimator, starts=starts, accuracy=accuracy, begin=begin)
    found = search_likelihood(task, starts=starts, accuracy=accuracy, begin=begin)
    restarts = found.restarts
    ordered = apply_ordering(task.population, found.point.theta)
    if ordered is not found.point.theta:  # the search ended in the other labelling
        found = search_likelihood(task, starts=starts, accuracy=accuracy, begin=ordered)
    point, state = found.point, found.point.state
    covariance = _covariance(point)
    task.report(FitProgress("Monte-Carlo error", 0, 0, point.value))
    error = monte_carlo_error(state, point.theta, covariance, point.value)
    optimum = Optimum(
        Maximum(point.theta, point.value, 1, found.verification.score), point.information, covariance, error
    )
    return Outcome(
        state=state,
        optimum=optimum,
        restarts=restarts,
        converged=found.verification.passed,
        message=found.verification.message(_likelihood_name(task.estimator)),
        verification=found.verification,
        shortage=found.shortage,
    )


def _covariance(point: Point) -> Tensor | None:
    """Of the free unknowns; None where one of them is held or the information is not positive definite."""
    if len(point.active) < len(point.state.population.unknowns.free):
        return None
    return point.covariance


def _likelihood_name(estimator: Estimator) -> str:
    return f"-2 log L ({estimator.approximation})" if estimator.approximation else "-2 log L"


def _fit_by_own_search(
    task: Task, chosen: SelfOptimizingEstimator, *, starts: int, accuracy: float, begin: Tensor | None
) -> Outcome:
    """The estimator's own estimate, as it is, with likelihood, information and check from draws made for it."""
    restarts: tuple[Restart, ...] = ()
    if begin is None:
        begin, restarts = compare_starts(task, starts=starts)
    found = chosen.search(
        task.source,
        task.observations,
        begin,
        NoDraws(task.population),
        task.generator,
        accuracy=accuracy,
        report=task.report,
    )
    task.report(FitProgress("likelihood", 0, 0))
    point = task.point(found.theta)
    columns: tuple[int, ...] = ()
    for _ in range(_SCANS):  # the search is judged by the likelihood over all modes, not only over those it knew
        wider = task.scan_for_modes(point, columns)
        if wider is None:
            break
        point, columns = wider
    individuals = individual_estimates(point.state, point.theta)
    checked = verify_maximum(
        point,
        None,
        individuals,
        draws=point.state.draws,
        ids=task.observations.ids,
        reason="" if found.converged else "by the search's own judgement",
        tolerance=_CONTRADICTED,
    )
    covariance = _covariance(point)
    error = likelihood_error(point.state, found.theta, se=found.monte_carlo_se, bias=found.left)
    maximum = Maximum(found.theta, point.value, 1, checked.score)
    own = f"{found.message} " if checked.passed or not found.converged else ""
    return Outcome(
        state=point.state,
        optimum=Optimum(maximum, point.information, covariance, error),
        restarts=restarts,
        converged=checked.passed,
        message=f"{own}{_second_opinion(checked, point)}".strip(),
        warnings=found.warnings,
        verification=checked,
        shortage=found.shortage,
    )


def _second_opinion(checked: Verification, point: Point) -> str:
    """A sentence on a search's estimate from the likelihood on draws made there."""
    if not checked.passed:
        return checked.message()
    return (
        f"The likelihood of draws made there is highest {checked.score:.2g} standard errors away (Monte-Carlo SE "
        f"{float(point.left_error.max()) if len(point.active) else 0.0:.1g})."
    )
