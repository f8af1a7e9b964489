"""A solver for stiff equations: adaptive Rosenbrock methods in batches, every individual with its own steps.

Fast components bound the steps of explicit methods even after they have died out. A Rosenbrock method instead solves a
linear system with the Jacobian at every stage, without iterations, so that it differentiates and batches as explicit
methods do. Its steps need not stop at measurement times: states there come from the method's own interpolant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.rosenbrock_tableaus import RODAS4P, RODAS5P, Tableau
from nlme_sbi.individual_model.solvers import Equation, RightHandSide
from nlme_sbi.numerics.batched_lu import BatchedLu

_TABLEAUS = {"rodas4p": RODAS4P, "rodas5p": RODAS5P}
_KEPT = 0.75  # the batch is made smaller when fewer than this share of it is unfinished


@dataclass(frozen=True)
class Rosenbrock:
    """Adaptive Rosenbrock-Wanner methods for stiff equations, L-stable; every individual has its own step size.

    Steps do not stop at measurement times but interpolate there, with ``rodas4p`` to order 3 and with ``rodas5p`` to
    order 4. The Jacobian is the equation's own where it has one, else that of automatic differentiation.

    Args:
        relative_tolerance: local error allowed, relative to the state.
        absolute_tolerance: local error allowed where the state is small, in the state's unit.
        max_steps: attempts between two measurement times, after which the individual counts as failed (NaN).
        method: ``rodas4p`` (order 4, six stages), the cheaper one down to tolerances of about 1e-6, or ``rodas5p``
            (order 5, eight stages).

    Source: Steinebach (1995) for ``rodas4p``; Steinebach (2023), BIT Numerical Mathematics 63:27 for ``rodas5p``.
    """

    relative_tolerance: float = 1e-5
    absolute_tolerance: float = 1e-7
    max_steps: int = 1000
    method: Literal["rodas4p", "rodas5p"] = "rodas4p"

    def __post_init__(self) -> None:
        if not (self.relative_tolerance > 0 and self.absolute_tolerance > 0 and self.max_steps > 0):
            raise ValueError(f"Tolerances and max_steps must be positive; got {self}.")
        if self.method not in _TABLEAUS:
            raise ValueError(f"method must be one of {', '.join(_TABLEAUS)}; got {self.method}.")

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`nlme_sbi.individual_model.solvers.Solver.advance`."""
        equation = slope if isinstance(slope, Equation) else Equation(slope)
        zero = torch.zeros_like(step)
        states, suggested = self._integrate(equation, state, start=zero, times=zero[..., None] + 1, first=step)
        return states[..., 0, :], suggested

    def trajectory(
        self,
        equation: Equation,
        state: Float[Tensor, "*batch X"],
        *,
        start: Float[Tensor, " *batch"],
        times: Float[Tensor, "*batch T"],
    ) -> Float[Tensor, "*batch T W"]:
        """Wanted states at ``times``, from ``state`` at ``start``; before the start the state is the initial one."""
        return self._integrate(equation, state, start=start, times=times, first=torch.full_like(start, torch.nan))[0]

    def _integrate(
        self, equation: Equation, state: Tensor, *, start: Tensor, times: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States ``(*batch, T, X)``, and the step ``(*batch)`` that the last one suggests."""
        batch, count, width = start.shape, start.numel(), times.shape[-1]
        grid = _Grid(times.reshape(count, width))
        tableau = _TABLEAUS[self.method]
        rows = torch.arange(count, device=state.device)
        current = _flatten(equation, batch) if equation.of_rows is None else equation.of_rows(rows)
        time = start.reshape(-1)
        # An unknown start (NaN) makes the state unknown.
        state = torch.where(torch.isnan(time), torch.nan, state.reshape(count, -1).T).contiguous()
        reached, attempts = grid.count_until(rows, time), torch.zeros_like(rows)
        returned = list(range(len(state)) if equation.wanted is None else equation.wanted)
        output, initial = _Output(grid, len(returned)), state[returned]
        output.add(rows, torch.zeros_like(reached), reached, lambda local, _: initial.index_select(-1, local))
        step = self._first_step(current, time, state, grid.end(rows) - time, first.detach().reshape(-1))
        suggested = step.clone()
        while True:
            remaining = grid.end(rows) - time.detach()
            active = (reached < width) & (attempts < self.max_steps) & torch.isfinite(state).all(0)
            active &= step > torch.finfo(step.dtype).eps * time.abs()
            left = int(active.sum())
            if equation.of_rows is not None and left < _KEPT * len(rows):
                suggested[rows] = step
                kept = torch.nonzero(active)[:, 0]
                rows, time, step, remaining, active = rows[kept], time[kept], step[kept], remaining[kept], active[kept]
                state, reached, attempts = state.index_select(-1, kept), reached[kept], attempts[kept]
                current = equation.of_rows(rows)
            if not left:
                break
            with torch.no_grad():
                last = step >= remaining
                tried = torch.where(active, torch.where(last, remaining, step), 0.0)
                between = grid.count_until(rows, time + 0.999 * tried) > reached
                attempt = _take_step(tableau, current, time, state, tried, check_interpolant=bool(between.any()))
                size = self._error_size(attempt, between)
                accepted = active & (size <= 1)
                wanted = tried * _growth(size, tableau.order)
                # A last step that was shortened to end at the last time must not shrink the suggestion.
                step = torch.where(active, torch.where(accepted & last, torch.maximum(step, wanted), wanted), step)
                taken = torch.where(accepted, tried, 0.0)
            if torch.is_grad_enabled():
                # Repeated with gradients and without the rejected steps, whose overflow would turn gradients into NaN.
                attempt = _take_step(tableau, current, time, state, taken)
            here = torch.where(accepted, torch.where(last, grid.end(rows), time.detach() + taken), -torch.inf)
            passed = torch.maximum(reached, grid.count_until(rows, here))
            output.add(rows, reached, passed, _Interpolant(attempt, returned, time, taken))
            state = torch.where(accepted, attempt.after, state)
            time = time + taken
            attempts = torch.where(passed > reached, 0, attempts + 1)
            reached = passed
        suggested[rows] = step
        return output.collect().reshape(*batch, width, -1), suggested.reshape(batch)

    @torch.no_grad()
    def _first_step(
        self, equation: Equation, time: Tensor, state: Tensor, span: Tensor, suggested: Tensor
    ) -> Float[Tensor, " R"]:
        """The suggested step, or where there is none one whose local error should be a hundredth of the tolerance.

        Source: Hairer, Nørsett and Wanner (1993), Solving Ordinary Differential Equations I, 2nd ed., section II.4.
        """
        scale = self.absolute_tolerance + self.relative_tolerance * state.abs()
        slope = equation(time, state.T).T
        size, change = _norm(state / scale), _norm(slope / scale)
        span = span.clamp(min=0.0)
        trial = torch.where((size > 1e-5) & (change > 1e-5), 0.01 * size / change, 1e-6 * span)
        trial = torch.minimum(trial, span)
        moved = equation(time + trial, (state + trial * slope).T).T
        bend = _norm((moved - slope) / scale) / trial
        largest = torch.maximum(change, bend.nan_to_num(nan=0.0))
        order = _TABLEAUS[self.method].order
        guess = torch.minimum(100 * trial, (0.01 / largest.clamp(min=1e-15)) ** (1 / order))
        # A shorter step would not change the time in floating point.
        guess = torch.maximum(guess.nan_to_num(nan=0.0), 16 * torch.finfo(time.dtype).eps * time.abs())
        return torch.where(torch.isfinite(suggested), suggested, torch.minimum(guess, span))

    def _error_size(self, attempt: _Step, between: Tensor) -> Float[Tensor, " R"]:
        """Root mean square of the local error over the states, in units of the tolerance; infinite where not finite.

        Where there are measurement times ``between`` the ends of the step, the interpolant's error counts as well.
        """
        largest = torch.maximum(attempt.before.abs(), attempt.after.abs())
        scale = self.absolute_tolerance + self.relative_tolerance * largest
        size = _norm(attempt.error / scale)
        if attempt.dense_error is not None:
            size = torch.where(between, torch.maximum(size, _norm(attempt.dense_error / scale)), size)
        return size.nan_to_num(nan=torch.inf)


@dataclass(frozen=True)
class _Step:
    """States before and after a step, its local error, and the interpolant's vectors and error, each ``(X, R)``."""

    before: Tensor
    after: Tensor
    error: Tensor
    dense: tuple[Tensor, ...]
    dense_error: Tensor | None


def _take_step(
    tableau: Tableau,
    equation: Equation,
    time: Tensor,
    state: Tensor,
    step: Tensor,
    *,
    check_interpolant: bool = False,
) -> _Step:
    """One step of every individual; a step of length 0 changes nothing."""
    jacobian, time_slope = _derivatives(equation, time, state)
    # All equations are multiplied by the step, which may be 0.
    matrix = -step * jacobian
    matrix = matrix + torch.eye(len(state), dtype=state.dtype, device=state.device)[..., None] / tableau.gamma
    factors = BatchedLu(matrix)
    stages = _Stages(state, len(tableau.nodes))
    argument = state
    for number, (node, time_weight) in enumerate(zip(tableau.nodes, tableau.time_weights, strict=True)):
        coupling = torch.zeros_like(state)
        if number:
            weights = (tableau.arguments[number - 1], tableau.couplings[number - 1])
            moved, coupling = stages.combinations(weights)
            argument = state + moved
        right = torch.addcmul(coupling, step, equation(time + node * step, argument.T).T)
        if time_slope is not None and time_weight != 0:
            right = right + time_weight * step.square() * time_slope
        last = factors.solve(right)
        stages.append(last)
    after = argument + last
    dense = stages.combinations(tableau.dense)
    if not check_interpolant:
        return _Step(state, after, last, dense, None)
    # Residual of the equation at mid-step for the interpolant. Stiff components are right at the end of every step
    # however wrong they are within it, so that the local error alone would allow steps that skip their course.
    bend = dense[0] + sum(vector / 2**power for power, vector in enumerate(dense[1:], 1))
    turn = sum(power * vector / 2 ** (power - 1) for power, vector in enumerate(dense[1:], 1))
    middle = (state + after) / 2 + bend / 4
    residual = after - state + turn / 4 - step * equation(time + step / 2, middle.T).T
    return _Step(state, after, last, dense, factors.solve(residual))


class _Stages:
    """The stages of a step, ``(X, R)`` each, and their linear combinations by one matrix product."""

    def __init__(self, state: Tensor, count: int) -> None:
        self._shape = state.shape
        self._found: list[Tensor] = []
        # Without autograd, which keeps the stages it needs, all stages share one piece of memory.
        self._together = None if torch.is_grad_enabled() else state.new_empty((count, state.numel()))

    def append(self, stage: Tensor) -> None:
        if self._together is not None:
            self._together[len(self._found)] = stage.reshape(-1)
        self._found.append(stage)

    def combinations(self, weights: tuple[tuple[float, ...], ...]) -> tuple[Tensor, ...]:
        """One sum of all stages for each row of weights; rows may be shorter."""
        count = len(self._found)
        if self._together is None:
            return tuple(self._weighted_sum(row) for row in weights)
        rows = [[*row, *(0.0,) * (count - len(row))] for row in weights]
        stages = self._together[:count]
        found = torch.tensor(rows, dtype=stages.dtype, device=stages.device) @ stages
        return found.reshape(len(rows), *self._shape).unbind()

    def _weighted_sum(self, row: tuple[float, ...]) -> Tensor:
        total = row[0] * self._found[0]
        for weight, stage in zip(row[1:], self._found[1:], strict=False):
            total = torch.add(total, stage, alpha=weight)
        return total


def _derivatives(equation: Equation, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """Derivatives of the slope in the state ``(X, X, R)`` and in time ``(X, R)``, None where there is none."""
    columns = state.T
    if equation.jacobian is not None and equation.autonomous:
        return equation.jacobian(time, columns).movedim((-2, -1), (0, 1)), None
    if equation.jacobian is not None:
        still = (torch.ones_like(time), torch.zeros_like(columns))
        in_time = torch.func.jvp(equation.right_hand_side, (time, columns), still)[1]
        return equation.jacobian(time, columns).movedim((-2, -1), (0, 1)), in_time.T
    found = torch.func.vjp(equation.right_hand_side, time, columns)
    slope, pull_back = found[0], found[1]
    # Individuals do not influence each other, so that one product gives a row of all their Jacobians.
    units = torch.eye(len(state), dtype=state.dtype, device=state.device)
    in_time, rows = zip(*(pull_back(unit.expand_as(slope)) for unit in units), strict=True)
    return torch.stack([row.T for row in rows]), None if equation.autonomous else torch.stack(in_time)


@dataclass(frozen=True)
class _Interpolant:
    """The state within a step: ``x0 + s (x1 - x0 + (1 - s) (d1 + s d2 + ...))`` for ``s`` in [0, 1]."""

    step: _Step
    states: list[int]
    time: Tensor
    length: Tensor

    def __call__(self, local: Tensor, wanted: Tensor) -> Tensor:
        """States at the times ``wanted (K,)`` of the individuals at the positions ``local (K,)``."""
        ends = self.step.before, self.step.after - self.step.before
        vectors = torch.cat([vector[self.states] for vector in (*ends, *self.step.dense)])
        begin, change, *dense = vectors.index_select(-1, local).chunk(len(self.step.dense) + 2)
        share = (wanted - self.time.index_select(0, local)) / self.length.index_select(0, local)
        bend = dense[-1]
        for vector in dense[-2::-1]:
            bend = torch.addcmul(vector, share, bend)
        return torch.addcmul(begin, share, torch.addcmul(change, 1 - share, bend))


class _Grid:
    """Measurement times ``(R, T)``, non-decreasing; those that all share are searched as one row."""

    def __init__(self, times: Tensor) -> None:
        self.times = times
        shared = times.shape[0] == 0 or times.stride(0) == 0
        self._sorted = times.detach()[0].contiguous() if shared and len(times) else times.detach().contiguous()

    def end(self, rows: Tensor) -> Tensor:
        """The last time of ``rows``."""
        return self.times.detach()[:, -1][rows]

    def count_until(self, rows: Tensor, until: Tensor) -> Tensor:
        """How many times of ``rows`` lie at ``until`` or before."""
        until = until.detach()
        if self._sorted.ndim == 1:
            return torch.searchsorted(self._sorted, until.contiguous(), right=True)
        return torch.searchsorted(self._sorted[rows], until[:, None].contiguous(), right=True)[:, 0]


class _Output:
    """States at measurement times, in the order in which they are found; those not reached are NaN."""

    def __init__(self, grid: _Grid, states: int) -> None:
        self._grid = grid
        self._states = states
        self._values: list[Tensor] = []
        self._places: list[Tensor] = []

    def add(self, rows: Tensor, first: Tensor, beyond: Tensor, values: Callable[[Tensor, Tensor], Tensor]) -> None:
        """States at the times ``first`` to ``beyond`` (exclusive) of each of ``rows``.

        ``values`` gives them, ``(X, K)``, for ``K`` positions in ``rows`` and as many times.
        """
        counts = beyond - first
        local = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        if not len(local):
            return
        column = torch.arange(len(local), device=rows.device) - (counts.cumsum(0) - counts - first)[local]
        row = rows[local]
        self._values.append(values(local, self._grid.times[row, column]))
        self._places.append(row * self._grid.times.shape[1] + column)

    def collect(self) -> Tensor:
        """All states, ``(R T, X)``."""
        times = self._grid.times
        found = sum(map(len, self._places))
        order = torch.full((times.numel(),), found, dtype=torch.int64, device=times.device)
        if found:
            order[torch.cat(self._places)] = torch.arange(found, device=times.device)
        nothing = torch.full((self._states, 1), torch.nan, dtype=times.dtype, device=times.device)
        return torch.cat([*self._values, nothing], dim=-1).index_select(-1, order).T


def _norm(scaled: Tensor) -> Float[Tensor, " R"]:
    """Root mean square over the states ``(X, R)``."""
    return scaled.square().mean(0).sqrt()


def _growth(size: Tensor, order: int) -> Tensor:
    """Factor for the step of a method whose local error grows as the step to the power ``order``."""
    return (0.9 * size.clamp(min=1e-10) ** (-1 / order)).clamp(0.2, 6.0)


def _flatten(equation: Equation, batch: torch.Size) -> Equation:
    """The equation for states and times whose batch dimensions are flattened into one."""
    if len(batch) == 1:
        return equation
    known = equation.jacobian

    def slope(time: Tensor, state: Tensor) -> Tensor:
        return equation(time.reshape(batch), state.reshape(*batch, -1)).reshape(state.shape)

    if known is None:
        return Equation(slope, autonomous=equation.autonomous)

    def jacobian(time: Tensor, state: Tensor) -> Tensor:
        width = state.shape[-1]
        return known(time.reshape(batch), state.reshape(*batch, -1)).reshape(-1, width, width)

    return Equation(slope, jacobian, equation.autonomous)
