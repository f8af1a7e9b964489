"""Differential equations with doses: every individual has its own timeline, and the solver stops at every event.

Measurements, starts and ends of infusions, boluses and resets of an individual are sorted by time, separately for each
draw of its parameters, because lag times and durations depend on them. The solver steps from one to the next; between
two of them the inflow is constant. All is batched over individuals and draws, and differentiable in event times, too.

The steady state of a repeated dose (SS) is the fixed point of one dosing interval, found by Newton's method after some
intervals from the initial state; derivatives come from the implicit function theorem, not from the iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import ReceivedDoses
from nlme_sbi.individual_model.solvers import Equation, Solver, over_interval

_PLAIN_CYCLES, _NEWTON_STEPS = 8, 12  # the search for a steady state: dosing intervals first, then Newton steps
_CONVERGED = 1e-7  # relative change over an interval that counts as none
_MOST_PAST = 200  # most past doses of a steady state that may still be entering


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Points of the timelines, each ``(*batch, M)``: time, order among equal times, and change of the state."""

    time: Tensor
    rank: Tensor
    jump: Tensor  # (*batch, M, X) of the state
    flow: Tensor  # (*batch, M, X) of the inflow
    clear: Tensor


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
        equation: of the states, without the doses.
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
    nodes = _timeline(equation, state, start, times, doses, places, solver, stops)
    order = torch.argsort(nodes.rank, dim=-1, stable=True)
    order = order.gather(-1, torch.argsort(nodes.time.detach().gather(-1, order), dim=-1, stable=True))
    when, clear = nodes.time.gather(-1, order), nodes.clear.gather(-1, order)
    wide = order[..., None].expand(*order.shape, state.shape[-1])
    jump, flow = nodes.jump.gather(-2, wide), nodes.flow.gather(-2, wide)
    initial, now, inflow = state, start, torch.zeros_like(state)
    suggested = torch.full_like(start, torch.nan)
    found = []
    for place in range(when.shape[-1]):
        column = when[..., place]
        after = torch.where(column > now, column, now)  # not clamp: its gradient differs where the two are equal
        if equation.during is None:
            state, suggested = over_interval(_with_inflow(equation, inflow), state, now, after, suggested, solver)
        elif bool((after > now).any()):  # records of covariates mostly coincide with other stops
            here = _with_inflow(equation.during(now, after), inflow)
            state, suggested = over_interval(here, state, now, after, suggested, solver)
        now = after
        emptied = clear[..., place, None]
        state = torch.where(emptied, initial, state) + jump[..., place, :]
        inflow = torch.where(emptied, 0.0, inflow) + flow[..., place, :]
        found.append(state)
    measured = torch.argsort(order, dim=-1)[..., : times.shape[-1]]
    states = torch.stack(found, dim=-2)
    return states.gather(-2, measured[..., None].expand(*measured.shape, state.shape[-1]))


def _with_inflow(equation: Equation, inflow: Tensor) -> Equation:
    return Equation(lambda time, state: equation(time, state) + inflow, equation.jacobian, equation.autonomous)


# Order of events at one time.
_EMPTIED, _DOSED, _ENDED, _MEASURED, _EMPTIED_LATER, _DOSED_LATER = range(6)


def _timeline(
    equation: Equation,
    initial: Tensor,
    start: Tensor,
    times: Tensor,
    doses: ReceivedDoses,
    places: Sequence[int],
    solver: Solver,
    stops: Tensor | None,
) -> _Nodes:
    """All nodes, unsorted: measurements first, so that their states can be picked out; then resets and doses."""
    written = doses.written
    batch = tuple(sum((column[..., 0] for column in doses.start), start).shape)
    line = _Timeline(times, batch, initial.shape[-1])
    spread = (len(written), *(1,) * (len(batch) - 1))
    resets = [written.forgets[:, place].reshape(spread).to(times) for place in range(written.forgets.shape[1])]
    for place, when in enumerate(resets):
        rank = torch.where(written.reset_follows[:, place].reshape(spread), _EMPTIED_LATER, _EMPTIED)
        line.add(when, rank, torch.isfinite(when), clears=True)
    for when in () if stops is None else stops.to(times).unbind(1):
        line.add(when.reshape(spread), _EMPTIED, torch.ones_like(when, dtype=torch.bool).reshape(spread))
    for column in range(written.columns):
        if not bool(written.given[:, column].any()):
            continue
        dose = _Dose.of(doses, column, spread, places, initial, resets)
        dose.enter(line, dose.begin, dose.given & ~dose.constant)
        if bool(dose.steady.any()):
            dose.enter_steady_state(line, equation, initial, solver)
    return line.stack()


class _Timeline:
    """Collects the nodes of all individuals."""

    def __init__(self, times: Tensor, batch: tuple[int, ...], size: int) -> None:
        self.times, self.batch = times, batch
        self.last = times.detach().amax(-1)
        no = torch.zeros(batch, dtype=torch.bool, device=times.device)
        nothing = torch.zeros((*batch, size), dtype=times.dtype, device=times.device)
        self._unchanged = nothing
        measured = [(time, torch.full_like(time, _MEASURED, dtype=torch.int64)) for time in times.unbind(-1)]
        self._nodes = [(time.expand(batch), rank.expand(batch), nothing, nothing, no) for time, rank in measured]

    def add(
        self,
        time: Tensor,
        rank: Tensor | int,
        active: Tensor,
        *,
        jump: Tensor | None = None,
        flow: Tensor | None = None,
        clears: bool = False,
    ) -> None:
        """Add one node for every individual and draw; an inactive one comes last and changes nothing."""
        active = (active & (time.detach() <= self.last)).expand(self.batch)
        jump, flow = (
            self._unchanged if change is None else torch.where(active[..., None], change, 0.0)
            for change in (jump, flow)
        )
        ranked = torch.as_tensor(rank, device=time.device).expand(self.batch)
        self._nodes.append(
            (
                torch.where(active, time, self.last),
                torch.where(active, ranked, _DOSED_LATER + 1),
                jump,
                flow,
                active if clears else torch.zeros_like(active),
            )
        )

    def stack(self) -> _Nodes:
        time, rank, jump, flow, clear = zip(*self._nodes, strict=True)
        return _Nodes(
            time=torch.stack(time, dim=-1),
            rank=torch.stack(rank, dim=-1),
            jump=torch.stack(jump, dim=-2),
            flow=torch.stack(flow, dim=-2),
            clear=torch.stack(clear, dim=-1),
        )


@dataclass(frozen=True, eq=False)
class _Dose:
    """One column of doses, each field broadcastable to the batch: ``entry (I, .., X)`` marks the state that it enters,
    ``speed`` is the rate of an infusion, ``rank`` its place in the order of events at one time."""

    given: Tensor
    recorded: Tensor
    begin: Tensor
    amount: Tensor
    duration: Tensor
    infused: Tensor
    constant: Tensor
    steady: Tensor
    interval: Tensor
    entry: Tensor
    rank: Tensor
    resets: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        doses: ReceivedDoses,
        column: int,
        spread: tuple[int, ...],
        places: Sequence[int],
        like: Tensor,
        resets: Sequence[Tensor],
    ) -> _Dose:
        written = doses.written

        def column_of(name: str) -> Tensor:
            found: Tensor = getattr(written, name)[:, column].reshape(spread)
            return found

        entry = torch.zeros((*spread, like.shape[-1]), dtype=like.dtype, device=like.device)
        for number, place in enumerate(places):
            entry[..., place] += (column_of("compartment") == number + 1).to(like)
        begin, amount, duration = (
            value[column][..., 0].to(like) for value in (doses.start, doses.amount, doses.duration)
        )
        infused = column_of("rate") != 0
        constant = infused & (column_of("amount") == 0)
        steady = (column_of("steady_state") > 0) & column_of("given")
        return cls(
            given=column_of("given"),
            recorded=column_of("time").to(like),
            begin=begin,
            amount=amount,
            duration=duration,
            infused=infused,
            constant=constant,
            steady=steady,
            interval=torch.where(steady & ~constant, column_of("interval").to(like), 1.0),
            entry=entry,
            rank=torch.where(column_of("follows"), _DOSED_LATER, _DOSED),
            resets=resets,
        )

    @property
    def speed(self) -> Tensor:
        """Inflow during the infusion, amount per time."""
        lasting = self.infused & ~self.constant & (self.duration > 0)
        return torch.where(lasting, self.amount / torch.where(lasting, self.duration, 1.0), 0.0)

    def not_reset(self, time: Tensor) -> Tensor:
        """Whether no reset lies between the dose's record and a node of it."""
        found = torch.ones_like(time, dtype=torch.bool)
        for reset in self.resets:
            found = found & ~((self.recorded < reset) & (reset <= time.detach()))
        return found

    def enter(self, line: _Timeline, time: Tensor, which: Tensor) -> None:
        """A dose that begins at ``time``: a bolus, or the start and the end of an infusion."""
        jump = torch.where(self.infused, 0.0, self.amount)[..., None] * self.entry
        line.add(time, self.rank, which & self.not_reset(time), jump=jump, flow=self.speed[..., None] * self.entry)
        self.end(line, time, which)

    def end(self, line: _Timeline, time: Tensor, which: Tensor) -> None:
        """The end of an infusion that began at ``time``."""
        if bool(self.infused.any()):
            end = time + self.duration
            ends = which & self.infused & self.not_reset(end)
            line.add(end, _ENDED, ends, flow=-self.speed[..., None] * self.entry)

    def enter_steady_state(self, line: _Timeline, equation: Equation, initial: Tensor, solver: Solver) -> None:
        """Set the steady state at the record, with past doses that are still entering or, because of a lag, have not
        entered yet."""
        repeated = self.steady & ~self.constant
        dose = _Repeated(
            entry=self.entry,
            amount=torch.where(repeated, self.amount, 0.0).expand(line.batch),
            infused=self.infused & ~self.constant,
            duration=torch.where(repeated & self.infused, self.duration, 0.0).expand(line.batch),
            interval=self.interval.expand(line.batch),
            constant=torch.where(self.steady & self.constant, self.amount, 0.0).expand(line.batch),
        )
        lag = (self.begin - self.recorded).expand(line.batch)
        if equation.during is not None:  # past doses were given under the covariates of the record
            equation = equation.during(self.recorded.expand(line.batch), self.recorded.expand(line.batch))
        before = dose.state_before(equation, initial, self.recorded.expand(line.batch), lag, solver)
        running = torch.zeros(line.batch, dtype=initial.dtype, device=initial.device)
        for number in range(1, dose.past(lag) + 1):
            began = self.begin - number * self.interval
            self.enter(line, began, repeated & (began.detach() > self.recorded))
            entering = repeated & self.infused & (began <= self.recorded) & (began + self.duration > self.recorded)
            running = running + entering.to(initial)
            self.end(line, began, entering)
        flow = (running * self.speed)[..., None] * self.entry
        line.add(
            self.recorded, self.rank, self.steady & self.not_reset(self.recorded), jump=before - initial, flow=flow
        )


@dataclass(frozen=True, eq=False)
class _Repeated:
    """Equal doses since ever: ``entry (I, .., X)`` marks the state they enter; the others ``(*batch)``; ``constant`` is
    the rate of an infusion since ever, else 0."""

    entry: Tensor
    amount: Tensor
    infused: Tensor
    duration: Tensor
    interval: Tensor
    constant: Tensor

    def past(self, lag: Tensor) -> int:
        """Number of past doses that may still be entering, or not have entered yet, at the time of the record."""
        with torch.no_grad():
            count = int(torch.ceil(((self.duration + lag) / self.interval).amax()).item())
        if count > _MOST_PAST:
            raise ValueError(
                f"An infusion at steady state lasts {count} times as long as the interval between doses; at most "
                f"{_MOST_PAST} are possible. Give it as a constant infusion (AMT 0, RATE, SS 1)."
            )
        return count

    def state_before(
        self, equation: Equation, initial: Tensor, recorded: Tensor, lag: Tensor, solver: Solver
    ) -> Tensor:
        """The state at the record, before the dose itself."""

        def cycle(state: Tensor) -> Tensor:
            return self._move(equation, self._add_dose(state), recorded, self.interval, solver)

        def still(state: Tensor) -> Tensor:
            return state + equation(recorded, state) + self.constant[..., None] * self.entry

        if bool((self.constant > 0).any()):
            steady = torch.where((self.constant > 0)[..., None], _fixed_point(still, initial, _keep_state), initial)
            repeated = _fixed_point(cycle, initial, _run_cycles) if bool((self.amount > 0).any()) else initial
            steady = torch.where((self.constant > 0)[..., None], steady, repeated)
        else:
            steady = _fixed_point(cycle, initial, _run_cycles)
        with torch.no_grad():
            ahead = torch.ceil(lag / self.interval).clamp(min=1)
        since = ahead * self.interval - lag
        moved = self._move(equation, self._add_dose(steady), recorded, since, solver)
        lagged = (lag > 0) & (self.amount > 0)
        return torch.where(lagged[..., None], moved, steady)

    def _add_dose(self, state: Tensor) -> Tensor:
        return state + torch.where(self.infused, 0.0, self.amount)[..., None] * self.entry

    def _move(self, equation: Equation, state: Tensor, recorded: Tensor, length: Tensor, solver: Solver) -> Tensor:
        """The state ``length`` after the start of a dose, at most an interval, with infusions of earlier doses."""
        with torch.no_grad():
            whole = torch.floor(self.duration / self.interval)
        speed = (self.amount / torch.where(self.duration > 0, self.duration, 1.0)) * self.infused
        rest = self.duration - whole * self.interval
        first = torch.minimum(rest, length)
        suggested = torch.full_like(length, torch.nan)
        inflow = ((whole + 1) * speed)[..., None] * self.entry
        end = recorded + first
        state, suggested = over_interval(_with_inflow(equation, inflow), state, recorded, end, suggested, solver)
        inflow = (whole * speed)[..., None] * self.entry
        state, _ = over_interval(_with_inflow(equation, inflow), state, end, recorded + length, suggested, solver)
        return state


Step = Callable[[Tensor], Tensor]


def _run_cycles(function: Step, state: Tensor) -> Tensor:
    """The state after some dosing intervals."""
    for _ in range(_PLAIN_CYCLES):
        state = function(state)
    return state


def _keep_state(function: Step, state: Tensor) -> Tensor:
    """Under a constant inflow the search begins at the initial state."""
    del function
    return state


def _fixed_point(function: Step, begin: Tensor, prepare: Callable[[Step, Tensor], Tensor]) -> Tensor:
    """Fixed point of ``function`` by Newton steps, of which the last carries gradients; NaN where it is not found."""
    with torch.no_grad():
        state = prepare(function, begin.detach())
        for _ in range(_NEWTON_STEPS):
            moved = function(state)
            change = (moved - state).abs().amax(-1)
            if bool((change <= _CONVERGED * state.abs().amax(-1).clamp(min=1e-12)).all()):
                break
            state = state + torch.linalg.solve(_newton_matrix(function, state), (moved - state)[..., None])[..., 0]
        moved = function(state)
        size = state.abs().amax(-1).clamp(min=1e-12)
        lost = ~((moved - state).abs().amax(-1) <= math.sqrt(_CONVERGED) * size)
        inverse = torch.linalg.inv(_newton_matrix(function, state))
    found = state + (inverse @ (function(state) - state)[..., None])[..., 0]
    return torch.where(lost[..., None], torch.nan, found)


def _newton_matrix(function: Step, state: Tensor) -> Tensor:
    """Identity minus the Jacobian, by central differences, ``(*batch, X, X)``."""
    size = state.shape[-1]
    scale = state.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    width = scale * torch.finfo(state.dtype).eps ** (1 / 3)
    columns = []
    for place in range(size):
        unit = torch.zeros(size, dtype=state.dtype, device=state.device)
        unit[place] = 1.0
        columns.append((function(state + width * unit) - function(state - width * unit)) / (2 * width))
    identity = torch.eye(size, dtype=state.dtype, device=state.device)
    return torch.nan_to_num(identity - torch.stack(columns, dim=-1), nan=0.0) + 1e-300 * identity
