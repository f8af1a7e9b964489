"""Fits on draws that do not depend on theta: starting values, then the best refined on draws with small enough
Monte-Carlo error."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.estimators.interface import Estimator
from nlme_sbi.population.fitting.label_switching import apply_ordering
from nlme_sbi.population.fitting.multistart import MultistartResult, run_multistart
from nlme_sbi.population.fitting.outcome import Optimum, Outcome
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.population.objective.interface import NoDraws, Source, WeightedDraws
from nlme_sbi.population.objective.objective import rough_information
from nlme_sbi.population.objective.optimization import lbfgs, newton
from nlme_sbi.population.objective.standard_errors import (
    covariance_from,
    monte_carlo_error,
)
from nlme_sbi.types import Observations

_CONVERGED = 0.01  # largest Newton step that may be left, in standard errors
_LABELLINGS = 2  # maximisations, the second where the first ended under another labelling than requested


def fit_fixed_draws(
    chosen: Estimator,
    model: PopulationModel,
    inputs: tuple[Source, Observations, torch.Generator],
    *,
    starts: int,
    accuracy: float,
    report: Report,
) -> Outcome:
    """For estimators whose draws do not depend on theta: starting values, then the best refined on draws with small
    enough Monte-Carlo error."""
    source, observations, generator = inputs
    report(FitProgress("draws", 0, 0))
    with torch.no_grad():
        first = chosen.prepare(source, observations, model, generator)
    if isinstance(first, NoDraws):
        raise TypeError(f"estimator {chosen.name} neither prepares draws nor makes them for a theta.")
    explored = run_multistart(first, observations.ids, generator, starts=starts, report=report)
    for _ in range(_LABELLINGS):
        state, optimum, shortage = _optimise_with_enough_draws(
            chosen, first, explored, inputs, accuracy=accuracy, report=report
        )
        ordered = apply_ordering(model, optimum.maximum.theta)
        if ordered is optimum.maximum.theta:
            break
        explored = replace(
            explored, best=replace(optimum.maximum, theta=ordered), information=rough_information(first, ordered)
        )
    step = optimum.maximum.step
    left = "unknown" if step is None else f"{step:.2g} standard errors"
    converged = step is not None and step < _CONVERGED and optimum.covariance is not None
    return Outcome(
        state=state,
        optimum=optimum,
        restarts=explored.restarts,
        converged=converged,
        message=f"{'Converged' if converged else 'NOT converged'} (largest step left: {left}).",
        shortage=shortage,
    )


def _optimise_with_enough_draws(
    chosen: Estimator,
    state: WeightedDraws,
    explored: MultistartResult,
    inputs: tuple[Source, Observations, torch.Generator],
    *,
    accuracy: float,
    report: Report,
) -> tuple[WeightedDraws, Optimum, str]:
    """The optimum on enough draws, or on as many as there are, with the reason why there are no more."""
    optimum = _optimise(state, explored.best.theta, explored.information, report)
    free = state.population.unknowns.free
    while not max(optimum.worst(free)) < accuracy:
        if optimum.covariance is None:
            break
        with torch.no_grad():
            times = _draw_factor(max(optimum.worst(free)) / accuracy)
            better = chosen.improve(state, optimum.maximum.theta, inputs[1], inputs[2], times=times)
        if isinstance(better, str):
            return state, optimum, better
        state = better
        optimum = _optimise(state, optimum.maximum.theta, optimum.information, report)
    return state, optimum, ""


def _draw_factor(ratio: float) -> int:
    """Factor on the number of draws that lowers a Monte-Carlo error by ``ratio``: a power of 2, at most 16."""
    return 2 ** min(4, max(1, math.ceil(2 * math.log2(ratio)))) if math.isfinite(ratio) else 2


def _optimise(state: WeightedDraws, theta: Tensor, information: Tensor, report: Report) -> Optimum:
    """L-BFGS and Newton steps on all draws, then both kinds of error."""
    _, info = torch.linalg.cholesky_ex(information)
    if int(info) != 0:
        information = rough_information(state, theta)
    evaluations = 0

    def watch(objective: float) -> None:
        nonlocal evaluations
        evaluations += 1
        report(FitProgress("polish", evaluations, 0, objective))

    maximum = lbfgs(state, theta, information, tolerance=0.02, watch=watch)
    report(FitProgress("curvature", 0, 0, maximum.objective))
    maximum, information = newton(state, maximum.theta)
    covariance = covariance_from(information)
    report(FitProgress("Monte-Carlo error", 0, 0, maximum.objective))
    error = monte_carlo_error(state, maximum.theta, covariance, maximum.objective)
    return Optimum(maximum, information, covariance, error)
