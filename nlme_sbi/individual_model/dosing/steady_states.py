"""The steady state of a repeated dose (SS): what doses have left that were given for ever.

It is the fixed point of one interval. For differential equations Newton's method finds it, from the initial state:
exact for linear equations after one step, from below for saturable elimination. Doses of all individuals and records,
and the neighbours that a Jacobian by differences takes, go through the solver as one batch. Derivatives come from the
fixed point's equation and not from the way there: three of Newton's steps with a Jacobian that is kept carry first,
second and third derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.individual_model.dosing.timelines import RepeatedDose
from nlme_sbi.individual_model.solvers import Equation, Solver, over_interval, with_inflow

_SETTLED = 1e-7  # relative change over an interval that counts as none (float32: twenty of its roundings)
_MOST_STEPS = 30
_DERIVATIVES = 3  # orders that are right; Laplace's approximation asks for three
_KEEPS_JACOBIAN = 0.1  # what a step must leave of the change for the next one to take the same Jacobian


def states_of_repeated_doses(
    equation: Equation, initial: Float[Tensor, "*batch X"], solver: Solver, doses: Sequence[RepeatedDose]
) -> list[Float[Tensor, "*batch X"]]:
    """The states at the records of doses, before these doses; the initial one of those that do not matter.

    NaN where no steady state is found.

    Args:
        equation: that gives out the equations of some rows (``of_rows``).
        initial: state before any dose.
        solver: of the equation.
        doses: with the batch of ``initial``.
    """
    batch, size = doses[0].recorded.shape, initial.shape[-1]
    base = initial.expand(*batch, size).reshape(-1, size)
    chosen = [torch.nonzero(dose.matters.reshape(-1))[:, 0] for dose in doses]
    groups = [list(range(len(doses)))] if equation.during is None else [[number] for number in range(len(doses))]
    found = [base] * len(doses)
    for group in groups:
        counts = [len(chosen[number]) for number in group]
        if not sum(counts):
            continue
        here = equation
        if equation.during is not None:  # the doses before were given under the covariates of the record
            recorded = doses[group[0]].recorded
            here = equation.during(recorded, recorded)
        rows = torch.cat([chosen[number] for number in group])
        together = _joined([_rows_of(doses[number], chosen[number]) for number in group])
        states = _Cycle(here, rows, together, solver).state_before(base.index_select(0, rows))
        for number, part in zip(group, states.split(counts), strict=True):
            found[number] = base.index_copy(0, chosen[number], part)
    return [each.reshape(*batch, size) for each in found]


def _fields_of(dose: RepeatedDose) -> dict[str, Tensor]:
    return {name: getattr(dose, name) for name in dose.__dataclass_fields__}


def _rows_of(dose: RepeatedDose, rows: Int[Tensor, " R"]) -> RepeatedDose:
    """Of the flattened batch."""
    batch = dose.recorded.ndim
    return RepeatedDose(
        **{name: value.flatten(0, batch - 1).index_select(0, rows) for name, value in _fields_of(dose).items()}
    )


def _joined(doses: Sequence[RepeatedDose]) -> RepeatedDose:
    parts = [_fields_of(dose) for dose in doses]
    return RepeatedDose(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class _Cycle:
    """One interval of ``R`` repeated doses, of which ``copies`` side by side may be followed at once."""

    def __init__(self, equation: Equation, rows: Int[Tensor, " R"], doses: RepeatedDose, solver: Solver) -> None:
        if equation.of_rows is None:
            raise TypeError("Doses at steady state need an Equation that gives out those of some rows (of_rows).")
        self._of_rows, self._rows, self.doses, self._solver = equation.of_rows, rows, doses, solver
        self._repeated = doses.amount > 0
        self._copies: dict[int, tuple[Equation, RepeatedDose]] = {}

    def _of_copies(self, copies: int) -> tuple[Equation, RepeatedDose]:
        if copies == 1:
            return self._of_rows(self._rows), self.doses
        if copies not in self._copies:
            self._copies[copies] = self._of_rows(self._rows.repeat(copies)), _joined([self.doses] * copies)
        return self._copies[copies]

    def __call__(self, state: Float[Tensor, "CR X"]) -> Float[Tensor, "CR X"]:
        """The state an interval later, where doses are repeated; where an infusion is constant, the state and its
        slope. Both are the state itself where it is steady."""
        equation, doses = self._of_copies(len(state) // len(self._rows))
        if bool((doses.constant > 0).any()):
            still = state + equation(doses.recorded, state) + doses.constant[..., None] * doses.entry
            if not bool(self._repeated.any()):
                return still
            cycled = self._moved(equation, doses, state + doses.bolus, doses.interval)
            return torch.where((doses.constant > 0)[..., None], still, cycled)
        return self._moved(equation, doses, state + doses.bolus, doses.interval)

    def state_before(self, initial: Float[Tensor, "R X"]) -> Float[Tensor, "R X"]:
        """The steady state at the records, before the dose itself."""
        settled = _fixed_point(self, initial)
        lagged = (self.doses.lag > 0) & self._repeated
        if not bool(lagged.any()):
            return settled
        equation, doses = self._of_copies(1)
        moved = self._moved(equation, doses, settled + doses.bolus, doses.since_entry())
        return torch.where(lagged[..., None], moved, settled)

    def _moved(self, equation: Equation, doses: RepeatedDose, state: Tensor, length: Tensor) -> Tensor:
        """From the start of a dose over ``length``."""
        first, inflow, later = doses.inflows(length)
        suggested, recorded = torch.full_like(length, torch.nan), doses.recorded
        if bool(doses.infused.any()):
            during = with_inflow(equation, inflow)
            state, suggested = over_interval(during, state, recorded, recorded + first, suggested, self._solver)
        begin = recorded + first
        state, _ = over_interval(with_inflow(equation, later), state, begin, recorded + length, suggested, self._solver)
        return state


Step = Callable[[Tensor], Tensor]


def _fixed_point(function: Step, begin: Float[Tensor, "R X"]) -> Float[Tensor, "R X"]:
    """Where ``function`` changes nothing, by Newton's steps; NaN where it is not found."""
    with torch.no_grad():
        state = begin.detach()
        settled = max(_SETTLED, 20 * torch.finfo(state.dtype).eps)
        moved, jacobian = _with_jacobian(function, state)
        change = _size(moved - state)
        best, least, after_best = state, change.nan_to_num(nan=torch.inf), moved
        for _ in range(_MOST_STEPS):
            if bool((least <= settled * _size(best).clamp(min=1e-12)).all()):
                break
            state = state + torch.linalg.solve(jacobian, (moved - state)[..., None])[..., 0]
            moved = function(state)
            before, change = change, _size(moved - state)
            better = change < least
            best = torch.where(better[:, None], state, best)
            after_best = torch.where(better[:, None], moved, after_best)
            least = torch.where(better, change, least)
            slow = ~(change <= _KEEPS_JACOBIAN * before) & (least > settled * _size(best).clamp(min=1e-12))
            if bool(slow.any()):
                # Where a step made it worse, an interval from the best state leads on.
                state = torch.where(better[:, None], state, after_best)
                moved, jacobian = _with_jacobian(function, state)
                change = _size(moved - state)
        size = _size(best).clamp(min=1e-12)
        lost = ~(least <= math.sqrt(settled) * size)
    if not torch.is_grad_enabled():
        return torch.where(lost[:, None], torch.nan, best)
    inverse = _inverse_at(function, best)
    if inverse is None:
        return torch.where(lost[:, None], torch.nan, best)
    found = best
    for _ in range(_DERIVATIVES):  # each carries derivatives of one order more
        found = found + (inverse @ (function(found) - found)[..., None])[..., 0]
    return torch.where(lost[:, None], torch.nan, found)


def _size(states: Float[Tensor, "R X"]) -> Float[Tensor, " R"]:
    return states.abs().amax(-1)


def _with_jacobian(function: Step, state: Float[Tensor, "R X"]) -> tuple[Float[Tensor, "R X"], Float[Tensor, "R X X"]]:
    """The function, and identity minus its Jacobian by central differences, from one batch."""
    count, size = state.shape
    width = state.abs().amax(-1, keepdim=True).clamp(min=1e-6) * torch.finfo(state.dtype).eps ** (1 / 3)
    shifts = [width * unit for unit in torch.eye(size, dtype=state.dtype, device=state.device)]
    moved = function(torch.cat([state, *(state + shift for shift in shifts), *(state - shift for shift in shifts)]))
    here, above, below = moved.split([count, count * size, count * size])
    columns = (above - below).reshape(size, count, size) / (2 * width)
    identity = torch.eye(size, dtype=state.dtype, device=state.device)
    return here, torch.nan_to_num(identity - columns.permute(1, 2, 0), nan=0.0) + 1e-300 * identity


def _inverse_at(function: Step, state: Float[Tensor, "R X"]) -> Float[Tensor, "R X X"] | None:
    """The inverse of identity minus the Jacobian, by automatic differentiation; None where there is nothing else to
    differentiate the function in."""
    with torch.enable_grad():
        if not function(state).requires_grad:
            return None
        leaf = state.clone().requires_grad_(True)
        moved = function(leaf)
        rows = [
            torch.autograd.grad(moved[:, place].sum(), leaf, retain_graph=place + 1 < state.shape[1])[0]
            for place in range(state.shape[1])
        ]
    identity = torch.eye(state.shape[1], dtype=state.dtype, device=state.device)
    matrix = torch.nan_to_num(identity - torch.stack(rows, dim=1), nan=0.0) + 1e-300 * identity
    inverse: Tensor = torch.linalg.inv(matrix)
    return inverse
