r"""Batched initial value problems over torch tensors: every individual has its own times and steps, and may fail alone.

Each individual goes from one of its measurement times to its next in the same pseudo-time ``s`` in [0, 1],
:math:`dx/ds = \Delta t\\, f(t_0 + s \Delta t, x)`, so that individual times need neither a union grid nor
interpolation, and times that depend on ``phi`` (an onset) are differentiable. Solutions are differentiable by autograd
through the steps taken; where an individual cannot be solved, its states are NaN and the others are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint

from nlme_sbi.individual_model.adjoint import solve_by_adjoint

RightHandSide = Callable[[Tensor, Tensor], Tensor]  # (time (*batch), state (*batch, X)) -> derivative (*batch, X)


@dataclass(frozen=True)
class Equation:
    """``dx/dt`` with properties that some solvers use; calling it evaluates the right-hand side.

    Args:
        right_hand_side: ``(time (*batch), state (*batch, X)) -> (*batch, X)``, per unit of time.
        jacobian: ``(time, state) -> (*batch, X, X)``, entry ``[..., i, j]`` the derivative of slope ``i`` in state
            ``j``; by automatic differentiation where it is not given.
        autonomous: whether the right-hand side does not depend on time.
        wanted: positions of the states that :func:`solve` returns, in this order; None for all.
        of_rows: the equation of some individuals, by positions in the flattened batch, for states ``(rows, X)``; with
            it a solver drops individuals that have reached their last time.
        during: the equation from one stop ``(*batch)`` to the next, where it changes at stops (covariates in time);
            for two equal stops the equation with the covariates of that time, which then no longer change.
        inputs: tensors that the right-hand side depends on, for solvers that do not differentiate through their steps.
    """

    right_hand_side: RightHandSide
    jacobian: RightHandSide | None = None
    autonomous: bool = False
    wanted: tuple[int, ...] | None = None
    of_rows: Callable[[Tensor], Equation] | None = None
    during: Callable[[Tensor, Tensor], Equation] | None = None
    inputs: EquationInputs | None = None

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        return self.right_hand_side(time, state)


@dataclass(frozen=True, eq=False)
class EquationInputs:
    """What a right-hand side depends on besides time and state, and may need gradients.

    Args:
        tensors: any tensors.
        rebuild: the same equation with other tensors in their place.
        weights: leaf tensors, such as those of a neural network.
    """

    tensors: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor]], Equation]
    weights: tuple[Tensor, ...] = ()

    def extend(self, *tensors: Tensor, rebuild: Callable[[Equation, Sequence[Tensor]], Equation]) -> EquationInputs:
        """Inputs of an equation that is made of this one and of further tensors."""
        count = len(self.tensors)
        return EquationInputs(
            (*self.tensors, *tensors),
            lambda others: rebuild(self.rebuild(others[:count]), others[count:]),
            self.weights,
        )


def equation_by_stretch(during: Callable[[Tensor, Tensor], Equation]) -> Equation:
    """An equation that changes at stops, given by the equation from one stop to the next; see :class:`Equation`."""

    def unknown(*_: Tensor) -> Tensor:
        raise TypeError("This equation changes at stops; call its `during` with two of them.")

    return Equation(unknown, during=during)


@runtime_checkable
class Solver(Protocol):
    """Integrates over unit pseudo-time; ``step`` is a suggestion, the returned one the next suggestion."""

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """State ``(*batch, X)`` at ``s = 1`` from the state at ``s = 0``, and the next step ``(*batch)`` in ``s``."""


@runtime_checkable
class TrajectorySolver(Solver, Protocol):
    """A solver whose steps need not stop at measurement times, because it interpolates about as well as it solves."""

    def trajectory(self, equation: Equation, state: Tensor, *, start: Tensor, times: Tensor) -> Tensor:
        """States at ``times``, as :func:`solve`, of those that the equation names in ``wanted``."""


def solve(
    right_hand_side: RightHandSide | Equation,
    state: Float[Tensor, "*batch X"],
    *,
    start: Float[Tensor, " *batch"],
    times: Float[Tensor, "*batch T"],
    solver: Solver,
) -> Float[Tensor, "*batch T W"]:
    """States at ``times``, from ``state`` at ``start``; before the start the state is the initial one.

    All states, ``W = X``, or those that the equation names in ``wanted``.

    Args:
        right_hand_side: ``(time (*batch), state (*batch, X)) -> (*batch, X)``, per unit of time; or an
            :class:`Equation`, with its Jacobian and other properties.
        state: initial state.
        start: time of the initial state.
        times: non-decreasing along the last dimension.
        solver: :class:`RungeKutta4`, :class:`DormandPrince5`, :class:`TorchDiffEq` or, for stiff equations,
            :class:`~nlme_sbi.individual_model.rosenbrock.Rosenbrock`.
    """
    equation = right_hand_side if isinstance(right_hand_side, Equation) else Equation(right_hand_side)
    if isinstance(solver, TrajectorySolver):
        return solver.trajectory(equation, state, start=start, times=times)
    found = []
    now, suggested = start, torch.full_like(start, torch.nan)
    for column in times.unbind(-1):
        # Not clamp: where time and start are equal, its gradient would belong to the time instead of the start.
        after = torch.where(column > now, column, now)
        state, suggested = over_interval(equation, state, now, after, suggested, solver)
        now = after
        found.append(state)
    states = torch.stack(found, dim=-2)
    return states if equation.wanted is None else states[..., list(equation.wanted)]


def over_interval(
    equation: Equation, state: Tensor, now: Tensor, after: Tensor, suggested: Tensor, solver: Solver
) -> tuple[Tensor, Tensor]:
    """The state ``(*batch, X)`` at ``after`` from that at ``now``, and the suggested next step.

    Args:
        equation: of the state.
        state: at ``now``.
        now: ``(*batch)``.
        after: ``(*batch)``, not before ``now``; where it is equal nothing changes.
        suggested: step in units of time, NaN where there is no suggestion.
        solver: of the equation.
    """
    length = after - now
    moves = length > 0
    step = torch.where(moves, suggested / torch.where(moves, length, 1.0), 1.0).detach()
    moved, step = solver.advance(_to_pseudo_time(equation, now, length), state, step)
    return moved, torch.where(moves, step * length.detach(), suggested)


def with_inflow(equation: Equation, inflow: Float[Tensor, "*batch X"]) -> Equation:
    """The equation with a constant inflow into its states added."""
    inputs = equation.inputs
    if inputs is not None:
        inputs = inputs.extend(inflow, rebuild=lambda bare, others: with_inflow(bare, *others))

    def slope(time: Tensor, state: Tensor) -> Tensor:
        return equation(time, state) + inflow

    return Equation(slope, equation.jacobian, equation.autonomous, inputs=inputs)


def _to_pseudo_time(equation: Equation, now: Tensor, length: Tensor) -> Equation:
    """The same equation in pseudo-time, from ``now`` on."""

    def slope(pseudo_time: Tensor, state: Tensor) -> Tensor:
        return length[..., None] * equation(now + pseudo_time * length, state)

    known, inputs = equation.jacobian, equation.inputs
    if inputs is not None:
        inputs = inputs.extend(now, length, rebuild=lambda bare, others: _to_pseudo_time(bare, *others))
    if known is None:
        return Equation(slope, autonomous=equation.autonomous, inputs=inputs)

    def jacobian(pseudo_time: Tensor, state: Tensor) -> Tensor:
        return length[..., None, None] * known(now + pseudo_time * length, state)

    return Equation(slope, jacobian, equation.autonomous, inputs=inputs)


@dataclass(frozen=True)
class RungeKutta4:
    """Classical Runge-Kutta of order 4 with ``steps`` equal steps between neighbouring measurement times."""

    steps: int = 4

    def __post_init__(self) -> None:
        _require_steps(self)

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        width = 1.0 / self.steps
        for number in range(self.steps):
            begin = torch.full_like(step, number * width)
            first = slope(begin, state)
            second = slope(begin + width / 2, state + width / 2 * first)
            third = slope(begin + width / 2, state + width / 2 * second)
            fourth = slope(begin + width, state + width * third)
            state = state + width / 6 * (first + 2 * second + 2 * third + fourth)
        return state, torch.full_like(step, width)


@dataclass(frozen=True)
class Midpoint:
    """Explicit midpoint rule of order 2 with ``steps`` equal steps between neighbouring measurement times.

    For right-hand sides that are cheap to be wrong by a little: neural ones, trained with the same steps.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        _require_steps(self)

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        width = 1.0 / self.steps
        for number in range(self.steps):
            begin = torch.full_like(step, number * width)
            middle = state + width / 2 * slope(begin, state)
            state = state + width * slope(begin + width / 2, middle)
        return state, torch.full_like(step, width)


@dataclass(frozen=True)
class ModifiedEuler:
    """Modified Euler method (Heun's) of order 2 with ``steps`` equal steps between neighbouring measurement times."""

    steps: int = 1

    def __post_init__(self) -> None:
        _require_steps(self)

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        width = 1.0 / self.steps
        for number in range(self.steps):
            begin = torch.full_like(step, number * width)
            first = slope(begin, state)
            second = slope(begin + width, state + width * first)
            state = state + width / 2 * (first + second)
        return state, torch.full_like(step, width)


def _require_steps(solver: Midpoint | ModifiedEuler | RungeKutta4) -> None:
    if solver.steps < 1:
        raise ValueError(
            f"{type(solver).__name__} needs at least one step between measurement times; got {solver.steps}."
        )


# Dormand and Prince (1980), J. Comput. Appl. Math. 6:19-26, table 2; the last row is the solution of order 5.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class DormandPrince5:
    """Adaptive Runge-Kutta of order 5(4); every individual has its own step size. Not for stiff equations.

    Args:
        relative_tolerance: local error allowed, relative to the state.
        absolute_tolerance: local error allowed where the state is small, in the state's unit.
        max_steps: attempts between two measurement times, after which the individual counts as failed (NaN).
    """

    relative_tolerance: float = 1e-5
    absolute_tolerance: float = 1e-7
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if not (self.relative_tolerance > 0 and self.absolute_tolerance > 0 and self.max_steps > 0):
            raise ValueError(f"Tolerances and max_steps must be positive; got {self}.")

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.zeros_like(step)
        # The first interval has no suggestion; the controller can enlarge a step that is too short fivefold each time.
        step = step.nan_to_num(nan=0.01).clamp(1e-6, 1.0)
        shortest = torch.finfo(step.dtype).eps
        for _ in range(self.max_steps):
            active = (place < 1) & (step > shortest) & torch.isfinite(state).all(-1)
            if not bool(active.any()):
                break
            with torch.no_grad():
                tried = torch.where(active, torch.minimum(step, 1 - place), 0.0)
                proposal, error = _dormand_prince_step(slope, place, state, tried)
                size = self._error_size(error, state, proposal)
                accepted = active & (size <= 1)
                wanted = tried * _growth(size)
                # A last step that was shortened to end at the time must not shrink the suggestion.
                was_cut = accepted & (tried < step)
                step = torch.where(active, torch.where(was_cut, torch.maximum(step, wanted), wanted), step)
            taken = torch.where(accepted, tried, 0.0)
            if torch.is_grad_enabled():
                # Repeated with gradients and without the rejected steps, whose overflow would turn gradients into NaN.
                proposal, _ = _dormand_prince_step(slope, place, state, taken)
            state = torch.where(accepted[..., None], proposal, state)
            place = torch.where(accepted & (tried >= 1 - place), 1.0, place + taken)
        return torch.where((place < 1)[..., None], torch.nan, state), step

    def _error_size(self, error: Tensor, state: Tensor, proposal: Tensor) -> Tensor:
        """Root mean square of the local error over the states, in units of the tolerance; infinite where not finite."""
        largest = torch.maximum(state.abs(), proposal.abs())
        scaled = error / (self.absolute_tolerance + self.relative_tolerance * largest)
        return scaled.square().mean(-1).sqrt().nan_to_num(nan=torch.inf)


@dataclass(frozen=True)
class TorchDiffEq:
    """Any method of torchdiffeq (Chen 2018), for orders and implicit methods that the two above lack.

    The whole batch shares one step size: the hardest individual determines it, and where one cannot be solved all
    become NaN. Prefer :class:`DormandPrince5` unless its method does not suit the equation.

    Args:
        method: as torchdiffeq names it: dopri8, dopri5, bosh3, adaptive_heun, implicit_adams, ...
        relative_tolerance: local error allowed, relative to the state.
        absolute_tolerance: local error allowed where the state is small, in the state's unit.
        adjoint: whether gradients come from the adjoint equation, solved backwards, instead of from the steps taken:
            memory does not grow with the steps, at the cost of time, and only first derivatives exist.
    """

    method: str = "dopri8"
    relative_tolerance: float = 1e-5
    absolute_tolerance: float = 1e-7
    adjoint: bool = False

    def __post_init__(self) -> None:
        if not (self.relative_tolerance > 0 and self.absolute_tolerance > 0):
            raise ValueError(f"Tolerances must be positive; got {self}.")
        # torchdiffeq refuses unknown methods, with the list of known ones, only when it solves.
        odeint(lambda _, state: -state, torch.ones(1), torch.tensor([0.0, 1.0]), method=self.method)

    def advance(self, slope: RightHandSide, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([0.0, 1.0], dtype=step.dtype, device=step.device)

        def in_batch(slope: RightHandSide) -> RightHandSide:
            return lambda place, state: slope(place.expand(step.shape), state)

        try:
            if self.adjoint and torch.is_grad_enabled():
                inputs = slope.inputs if isinstance(slope, Equation) else None
                tensors, weights = ((), ()) if inputs is None else (inputs.tensors, inputs.weights)
                found = solve_by_adjoint(
                    lambda others: in_batch(slope if inputs is None else inputs.rebuild(others)),
                    state,
                    tensors,
                    weights,
                    method=self.method,
                    relative_tolerance=self.relative_tolerance,
                    absolute_tolerance=self.absolute_tolerance,
                )
                return found, step
            batched = in_batch(slope)
            solution: Tensor = odeint(
                batched, state, ends, method=self.method, rtol=self.relative_tolerance, atol=self.absolute_tolerance
            )[-1]
        except AssertionError:  # raised by torchdiffeq where its step size underflows
            return torch.full_like(state, torch.nan), step
        return solution, step


def _growth(size: Tensor) -> Tensor:
    """Factor for the step of a method whose local error grows as its fifth power."""
    return (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)


def _dormand_prince_step(slope: RightHandSide, place: Tensor, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Solution of order 5 after one step from pseudo-time ``place``, and the estimate of its local error."""
    width = step[..., None]
    slopes = [slope(place, state)]
    moved = state
    for node, weights in zip((*_NODES[1:], 1.0), _STAGES, strict=True):
        moved = state + width * _combination(weights, slopes)
        slopes.append(slope(place + node * step, moved))
    return moved, width * _combination(_ERROR, slopes)


def _combination(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight != 0:
            total = total + weight * slope
    return total
