"""Multistart on a subset of the data that is large enough to compare starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.compute.progress import FitProgress, Report
from nlme_sbi.population.fitting.initial_values import starting_points
from nlme_sbi.population.fitting.label_switching import apply_ordering
from nlme_sbi.population.fitting.multistart_summary import compare_ends
from nlme_sbi.population.models.labels import list_ids
from nlme_sbi.population.objective.interface import WeightedDraws
from nlme_sbi.population.objective.objective import contributions, rough_information
from nlme_sbi.population.objective.optimization import Maximum, maximise
from nlme_sbi.population.objective.subsets import random_part
from nlme_sbi.population.results.restart import Restart

EXPLORED_INDIVIDUALS = 1000  # starts are compared on so many individuals
_EXPLORED_DRAWS = 500  # with so many draws


@dataclass(frozen=True, eq=False)
class MultistartResult:
    """Results of all starts; ``information`` is approximate, for all individuals."""

    best: Maximum
    restarts: tuple[Restart, ...]
    information: Float[Tensor, "free free"]


def run_multistart(
    state: WeightedDraws, ids: tuple[str, ...], generator: torch.Generator, *, starts: int, report: Report
) -> MultistartResult:
    """Run every start on a part of the data that is large enough to compare them; the best is shown under the labelling
    that the population model asks for."""
    part = _part(state, generator)
    phi, prior = part.training_draws()
    ends: list[tuple[str, Maximum | None]] = []
    points = starting_points(phi, prior, state.population, count=starts, generator=generator)
    for done, (name, theta) in enumerate(points):
        report(FitProgress("starts", done, len(points), _highest(ends)))
        finite = bool(torch.isfinite(contributions(part, theta)).all())
        end = maximise(part, theta) if finite else None
        ends.append((name, end if end is not None and math.isfinite(end.objective) else None))
    reached = [end for _, end in ends if end is not None]
    if not reached:
        raise ValueError(_describe_failure(part, points[0][1], ids))
    best = max(reached, key=lambda end: end.objective)
    information = rough_information(part, best.theta)
    restarts = compare_ends(ends, best, part, torch.linalg.inv(information))
    theta = apply_ordering(state.population, best.theta)
    if theta is not best.theta:
        best, information = replace(best, theta=theta), rough_information(part, theta)
    return MultistartResult(best, restarts, information * (state.individuals / part.individuals))


def _part(state: WeightedDraws, generator: torch.Generator) -> WeightedDraws:
    if state.individuals <= EXPLORED_INDIVIDUALS and state.draws <= _EXPLORED_DRAWS:
        return state
    chosen = random_part(state.individuals, EXPLORED_INDIVIDUALS, generator).to(generator.device)
    stride = max(1, state.draws // _EXPLORED_DRAWS)
    return state.part(chosen, slice(0, stride * _EXPLORED_DRAWS, stride))


def _highest(ends: list[tuple[str, Maximum | None]]) -> float | None:
    return max((end.objective for _, end in ends if end is not None), default=None)


def _describe_failure(state: WeightedDraws, theta: Tensor, ids: tuple[str, ...]) -> str:
    broken = torch.nonzero(~torch.isfinite(contributions(state, theta)))[:, 0]
    names = f" First: {list_ids(ids, broken)}." if len(ids) == state.individuals else ""
    return (
        f"The objective is not finite at any start, for {len(broken)} of {state.individuals} individuals.{names} "
        "A fixed or constant value may lie outside the training prior, or the draws are degenerate."
    )
