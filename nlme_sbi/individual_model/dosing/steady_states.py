"""The steady state of a repeated dose (SS) in differential equations.

It is the fixed point of one dosing interval, found by Newton's method from the initial state: linear equations need one
step; under saturable elimination the search comes from below. Doses of all individuals and records, and the shifted
states of a Jacobian by differences, are solved as one batch. Derivatives come from the implicit function theorem, not
from the iterations: three Newton steps with one fixed Jacobian carry first, second and third derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.individual_model.dosing.timelines import RepeatedDose
from nlme_sbi.individual_model.solvers import Equation, Solver, over_interval, with_inflow

_CONVERGED = 1e-7  # relative change over an interval that counts as none (float32: twenty of its roundings)
_MOST_STEPS = 30
_DERIVATIVES = 3  # orders that are exact; Laplace's approximation needs three
_KEEP_JACOBIAN = 0.1  # a step that reduces the change to less than this share lets the next one keep the Jacobian


def find_steady_states(
    equation: Equation, initial: Float[Tensor, "*batch X"], solver: Solver, doses: Sequence[RepeatedDose]
) -> list[Float[Tensor, "*batch X"]]:
    """States at the records of doses at steady state, before these doses.

    Args:
        equation: of the states, with ``of_rows``.
        initial: state before any dose.
        solver: of the equation.
        doses: with the batch of ``initial``.

    Returns:
        One state for each dose: NaN where no steady state is found, the initial state where it does not matter.

    Raises:
        TypeError: the equation has no ``of_rows``.
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
        if equation.during is not None:  # past doses were given under the covariates of the record
            recorded = doses[group[0]].recorded
            here = equation.during(recorded, recorded)
        rows = torch.cat([chosen[number] for number in group])
        together = _concatenate([_select_rows(doses[number], chosen[number]) for number in group])
        states = _Cycle(here, rows, together, solver).state_before(base.index_select(0, rows))
        for number, part in zip(group, torch.split(states, counts), strict=True):
            found[number] = base.index_copy(0, chosen[number], part)
    return [each.reshape(*batch, size) for each in found]


def _fields_of(dose: RepeatedDose) -> dict[str, Tensor]:
    return {item.name: getattr(dose, item.name) for item in fields(dose)}


def _select_rows(dose: RepeatedDose, rows: Int[Tensor, " R"]) -> RepeatedDose:
    """Doses of some rows of the flattened batch."""
    batch = dose.recorded.ndim
    return RepeatedDose(
        **{name: value.flatten(0, batch - 1).index_select(0, rows) for name, value in _fields_of(dose).items()}
    )


def _concatenate(doses: Sequence[RepeatedDose]) -> RepeatedDose:
    parts = [_fields_of(dose) for dose in doses]
    return RepeatedDose(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class _Cycle:
    """One dosing interval of ``R`` repeated doses, a function of the state; several copies of them are one batch."""

    def __init__(self, equation: Equation, rows: Int[Tensor, " R"], doses: RepeatedDose, solver: Solver) -> None:
        if equation.of_rows is None:
            raise TypeError("Doses at steady state need an Equation that has of_rows, the equation of some rows.")
        self._of_rows, self._rows, self.doses, self._solver = equation.of_rows, rows, doses, solver
        self._repeated = doses.amount > 0
        self._copies: dict[int, tuple[Equation, RepeatedDose]] = {}

    def _of_copies(self, copies: int) -> tuple[Equation, RepeatedDose]:
        if copies == 1:
            return self._of_rows(self._rows), self.doses
        if copies not in self._copies:
            self._copies[copies] = self._of_rows(self._rows.repeat(copies)), _concatenate([self.doses] * copies)
        return self._copies[copies]

    def __call__(self, state: Float[Tensor, "CR X"]) -> Float[Tensor, "CR X"]:
        """The state an interval later, or for a constant infusion the state plus its slope: at steady state both equal
        the state."""
        equation, doses = self._of_copies(len(state) // len(self._rows))
        if bool((doses.constant > 0).any()):
            still = state + equation(doses.recorded, state) + doses.constant[..., None] * doses.entry
            if not bool(self._repeated.any()):
                return still
            cycled = self._move(equation, doses, state + doses.bolus, doses.interval)
            return torch.where((doses.constant > 0)[..., None], still, cycled)
        return self._move(equation, doses, state + doses.bolus, doses.interval)

    def state_before(self, initial: Float[Tensor, "R X"]) -> Float[Tensor, "R X"]:
        """The steady state at the records, before the dose itself."""
        scale = self.doses.amount[:, None] * self.doses.entry + self.doses.constant[:, None] * self.doses.entry
        steady = _fixed_point(self, initial, scale.detach())
        lagged = (self.doses.lag > 0) & self._repeated
        if not bool(lagged.any()):
            return steady
        equation, doses = self._of_copies(1)
        moved = self._move(equation, doses, steady + doses.bolus, doses.since_entry())
        return torch.where(lagged[..., None], moved, steady)

    def _move(self, equation: Equation, doses: RepeatedDose, state: Tensor, length: Tensor) -> Tensor:
        """The state ``length`` after the start of a dose, at most an interval, with infusions of earlier doses."""
        first, inflow, later = doses.inflows(length)
        suggested, recorded = torch.full_like(length, torch.nan), doses.recorded
        if bool(doses.infused.any()):
            during = with_inflow(equation, inflow)
            state, suggested = over_interval(during, state, recorded, recorded + first, suggested, self._solver)
        begin = recorded + first
        state, _ = over_interval(with_inflow(equation, later), state, begin, recorded + length, suggested, self._solver)
        return state


Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Visited:
    """A state, the function there, and the largest change between them."""

    state: Float[Tensor, "R X"]
    moved: Float[Tensor, "R X"]
    change: Float[Tensor, " R"]

    @classmethod
    def of(cls, function: Step, state: Float[Tensor, "R X"]) -> _Visited:
        moved = function(state)
        return cls(state, moved, _size(moved - state).nan_to_num(nan=torch.inf))

    def or_better(self, other: _Visited) -> _Visited:
        """For each row the one of the two with the smaller change."""
        better = other.change < self.change
        return _Visited(
            torch.where(better[:, None], other.state, self.state),
            torch.where(better[:, None], other.moved, self.moved),
            torch.where(better, other.change, self.change),
        )

    def has_converged(self, tolerance: float) -> Bool[Tensor, " R"]:
        return self.change <= tolerance * _size(self.state).clamp(min=1e-12)


def _fixed_point(function: Step, begin: Float[Tensor, "R X"], scale: Float[Tensor, "R X"]) -> Float[Tensor, "R X"]:
    """Fixed point of ``function`` by Newton steps, of which the last carry gradients; NaN where it is not found.

    Args:
        function: of states.
        begin: states to start from.
        scale: typical sizes of states, from which steps of differences are taken; 0 where unknown.
    """
    with torch.no_grad():
        tolerance = max(_CONVERGED, 20 * torch.finfo(begin.dtype).eps)
        at = best = _Visited.of(function, begin.detach())
        jacobian = _newton_matrix(function, at, scale)
        for _ in range(_MOST_STEPS):
            if bool(best.has_converged(tolerance).all()):
                break
            step = torch.linalg.solve_ex(jacobian, (at.moved - at.state)[..., None])[0][..., 0]
            before, at = at, _Visited.of(function, at.state + step)
            worse, best = at.change > best.change, best.or_better(at)
            slow = ~(at.change <= _KEEP_JACOBIAN * before.change) & ~best.has_converged(tolerance)
            if bool(slow.any()):
                if bool(worse.any()):  # go on one interval after the best state
                    at = _Visited.of(function, torch.where(worse[:, None], best.moved, at.state))
                    best = best.or_better(at)
                jacobian = _newton_matrix(function, at, scale)
        lost = ~best.has_converged(math.sqrt(tolerance))
    inverse = _inverse_newton_matrix(function, best.state) if torch.is_grad_enabled() else None
    found = best.state
    if inverse is not None:
        for _ in range(_DERIVATIVES):  # each adds one order of derivatives
            found = found + (inverse @ (function(found) - found)[..., None])[..., 0]
    return torch.where(lost[:, None], torch.nan, found)


def _size(states: Float[Tensor, "R X"]) -> Float[Tensor, " R"]:
    return states.abs().amax(-1)


def _newton_matrix(function: Step, at: _Visited, scale: Float[Tensor, "R X"]) -> Float[Tensor, "R X X"]:
    """Identity minus the Jacobian, by central differences in one batch."""
    state = at.state
    count, size = state.shape
    sizes = torch.maximum(torch.maximum(state.abs(), at.moved.abs().nan_to_num(nan=0.0)), scale)
    sizes = torch.maximum(sizes, 1e-6 * sizes.amax(-1, keepdim=True)).clamp(min=1e-12)
    width = sizes * torch.finfo(state.dtype).eps ** (1 / 3)
    shifts = [width * unit for unit in torch.eye(size, dtype=state.dtype, device=state.device)]
    moved = function(torch.cat([*(state + shift for shift in shifts), *(state - shift for shift in shifts)]))
    above, below = moved.reshape(2, size, count, size).unbind(0)
    rows = (above - below) / (2 * width.T[..., None])
    identity = torch.eye(size, dtype=state.dtype, device=state.device)
    return torch.nan_to_num(identity - rows.permute(1, 2, 0), nan=0.0) + 1e-300 * identity


def _inverse_newton_matrix(function: Step, state: Float[Tensor, "R X"]) -> Float[Tensor, "R X X"] | None:
    """The inverse of identity minus the Jacobian, by automatic differentiation; None where the function
    has no gradients to carry."""
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
    inverse: Tensor = torch.linalg.inv_ex(matrix)[0]
    return inverse
