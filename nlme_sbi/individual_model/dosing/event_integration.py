"""Differential equations with doses: every individual has its own timeline, and the solver stops at every event.

The solver steps from one point of the timeline (:mod:`nlme_sbi.individual_model.dosing.timelines`) to the next; between
two of them the inflow is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import ReceivedDoses
from nlme_sbi.individual_model.dosing.steady_states import find_steady_states
from nlme_sbi.individual_model.dosing.timelines import build_timeline
from nlme_sbi.individual_model.solvers import Equation, Solver, over_interval, with_inflow


def solve_through_doses(
    equation: Equation,
    state: Float[Tensor, "*batch X"],
    *,
    start: Float[Tensor, " *batch"],
    times: Float[Tensor, "*batch T"],
    doses: ReceivedDoses,
    places: Sequence[int],
    solver: Solver,
    stops: Float[Tensor, "I V"] | None = None,
) -> Float[Tensor, "*batch T X"]:
    """States at ``times`` under doses; where the equation cannot be solved, they are NaN.

    Args:
        equation: of the states, without the doses; for doses at steady state it must have ``of_rows``.
        state: initial; a reset returns to it.
        start: time of the initial state; earlier doses enter at this time.
        times: non-decreasing along the last dimension.
        doses: of the individuals, the first dimension of the batch.
        places: for each compartment, counted from 1, the state that its doses enter.
        solver: as for :func:`nlme_sbi.individual_model.solvers.solve`.
        stops: times at which the equation changes, records of covariates; None where it does not.

    Raises:
        ValueError: infusions at steady state that overlap too often.
    """
    before = partial(find_steady_states, equation, state, solver)
    nodes, measured = build_timeline(state, start, times, doses, places, before, stops)
    initial, now, inflow = state, start, torch.zeros_like(state)
    suggested = torch.full_like(start, torch.nan)
    found = []
    for place, column in enumerate(nodes.time.unbind(-1)):
        after = torch.where(column > now, column, now)  # not clamp: its gradient differs where the two are equal
        if equation.during is None:
            state, suggested = over_interval(with_inflow(equation, inflow), state, now, after, suggested, solver)
        elif bool((after > now).any()):  # records of covariates mostly coincide with other stops
            here = with_inflow(equation.during(now, after), inflow)
            state, suggested = over_interval(here, state, now, after, suggested, solver)
        now = after
        emptied = nodes.clear[..., place, None]
        state = torch.where(emptied, initial, state) + nodes.jump[..., place, :]
        inflow = torch.where(emptied, 0.0, inflow) + nodes.flow[..., place, :]
        found.append(state)
    states = torch.stack(found, dim=-2)
    return states.gather(-2, measured[..., None].expand(*measured.shape, state.shape[-1]))
