"""Differential equations through doses: every individual has a timeline of its own, and every event is hit exactly.

Measurements, starts and ends of infusions, boluses and resets of an individual are sorted by time, for each draw of its
parameters anew, because lag times and durations depend on them. The solver goes from one to the next; between two of
them the inflow is constant. All is batched over individuals and draws, and differentiable in the times of events, too.

The steady state of a repeated dose (SS) is the fixed point of one interval, found by Newton's method from some
intervals after the initial state; derivatives come from the fixed point's equation and not from the way there.
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

_PLAIN_CYCLES, _NEWTON_STEPS = 8, 12  # intervals that begin the search for a steady state, and steps that end it
_SETTLED = 1e-7  # relative change over an interval that counts as none
_MOST_PAST = 200  # past doses of a steady state that are still entering; more are refused


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Points of the timelines, each ``(*batch, M)``: when, in which order at one time, what they change."""

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
    """States at ``times``, with doses on the way; a state that cannot be followed is NaN.

    Args:
        equation: of the states, without the doses.
        state: initial, which a reset returns to.
        start: when it holds; doses before it count from it on.
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
        after = torch.where(column > now, column, now)  # not clamp, whose gradient would go to the time where equal
        if equation.during is None:
            state, suggested = over_interval(_with_inflow(equation, inflow), state, now, after, suggested, solver)
        elif bool((after > now).any()):  # records of covariates mostly fall together with other stops
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


# Order of what happens at one time.
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
    """Measurements first, so that they are found again; then what doses and resets do."""
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
            dose.enter_as_repeated(line, equation, initial, solver)
    return line.joined()


class _Timeline:
    """Nodes while they are gathered."""

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
        """One node of everybody; where it is not active it stands at the end and changes nothing."""
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

    def joined(self) -> _Nodes:
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
    """One column of doses, each field over the batch or with ones in its place; ``entry (I, .., X)`` tells which state
    it enters, ``speed`` is that of an infusion, ``rank`` where it stands among what happens at one time."""

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

        def told(name: str) -> Tensor:
            found: Tensor = getattr(written, name)[:, column].reshape(spread)
            return found

        entry = torch.zeros((*spread, like.shape[-1]), dtype=like.dtype, device=like.device)
        for number, place in enumerate(places):
            entry[..., place] += (told("compartment") == number + 1).to(like)
        begin, amount, duration = (
            value[column][..., 0].to(like) for value in (doses.start, doses.amount, doses.duration)
        )
        infused = told("rate") != 0
        constant = infused & (told("amount") == 0)
        steady = (told("steady_state") > 0) & told("given")
        return cls(
            given=told("given"),
            recorded=told("time").to(like),
            begin=begin,
            amount=amount,
            duration=duration,
            infused=infused,
            constant=constant,
            steady=steady,
            interval=torch.where(steady & ~constant, told("interval").to(like), 1.0),
            entry=entry,
            rank=torch.where(told("follows"), _DOSED_LATER, _DOSED),
            resets=resets,
        )

    @property
    def speed(self) -> Tensor:
        """Of the inflow while it is infused."""
        lasting = self.infused & ~self.constant & (self.duration > 0)
        return torch.where(lasting, self.amount / torch.where(lasting, self.duration, 1.0), 0.0)

    def remembered(self, time: Tensor) -> Tensor:
        """Whether no reset lies between the dose's record and a node of it."""
        found = torch.ones_like(time, dtype=torch.bool)
        for reset in self.resets:
            found = found & ~((self.recorded < reset) & (reset <= time.detach()))
        return found

    def enter(self, line: _Timeline, time: Tensor, which: Tensor) -> None:
        """A dose that begins at ``time``: a bolus, or the start and the end of an infusion."""
        jump = torch.where(self.infused, 0.0, self.amount)[..., None] * self.entry
        line.add(time, self.rank, which & self.remembered(time), jump=jump, flow=self.speed[..., None] * self.entry)
        self.end(line, time, which)

    def end(self, line: _Timeline, time: Tensor, which: Tensor) -> None:
        """The end of an infusion that began at ``time``."""
        if bool(self.infused.any()):
            end = time + self.duration
            ends = which & self.infused & self.remembered(end)
            line.add(end, _ENDED, ends, flow=-self.speed[..., None] * self.entry)

    def enter_as_repeated(self, line: _Timeline, equation: Equation, initial: Tensor, solver: Solver) -> None:
        """At its record the steady state of the doses before it, with those that are still entering or, for a lag, are
        yet to enter."""
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
        if equation.during is not None:  # the doses before were given under the covariates of the record
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
            self.recorded, self.rank, self.steady & self.remembered(self.recorded), jump=before - initial, flow=flow
        )


@dataclass(frozen=True, eq=False)
class _Repeated:
    """Equal doses for ever: ``entry (I, .., X)`` where they go; the others ``(*batch)``; ``constant`` is the rate of an
    infusion that has lasted for ever, else 0."""

    entry: Tensor
    amount: Tensor
    infused: Tensor
    duration: Tensor
    interval: Tensor
    constant: Tensor

    def past(self, lag: Tensor) -> int:
        """How many past doses may still be entering, or yet to enter, when the dose is recorded."""
        with torch.no_grad():
            count = int(torch.ceil(((self.duration + lag) / self.interval).amax()).item())
        if count > _MOST_PAST:
            raise ValueError(
                f"An infusion at steady state lasts {count} times as long as the interval between doses; at most "
                f"{_MOST_PAST} are followed. Give it as a constant infusion (AMT 0, RATE, SS 1)."
            )
        return count

    def state_before(
        self, equation: Equation, initial: Tensor, recorded: Tensor, lag: Tensor, solver: Solver
    ) -> Tensor:
        """The state at the record, before the dose itself."""

        def cycle(state: Tensor) -> Tensor:
            return self._moved(equation, self._dosed(state), recorded, self.interval, solver)

        def still(state: Tensor) -> Tensor:
            return state + equation(recorded, state) + self.constant[..., None] * self.entry

        if bool((self.constant > 0).any()):
            settled = torch.where((self.constant > 0)[..., None], _fixed_point(still, initial, _unmoved), initial)
            repeated = _fixed_point(cycle, initial, _cycled) if bool((self.amount > 0).any()) else initial
            settled = torch.where((self.constant > 0)[..., None], settled, repeated)
        else:
            settled = _fixed_point(cycle, initial, _cycled)
        with torch.no_grad():
            ahead = torch.ceil(lag / self.interval).clamp(min=1)
        since = ahead * self.interval - lag
        moved = self._moved(equation, self._dosed(settled), recorded, since, solver)
        lagged = (lag > 0) & (self.amount > 0)
        return torch.where(lagged[..., None], moved, settled)

    def _dosed(self, state: Tensor) -> Tensor:
        return state + torch.where(self.infused, 0.0, self.amount)[..., None] * self.entry

    def _moved(self, equation: Equation, state: Tensor, recorded: Tensor, length: Tensor, solver: Solver) -> Tensor:
        """From the start of a dose over ``length``, at most an interval, with its predecessors' infusions."""
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


def _cycled(function: Step, state: Tensor) -> Tensor:
    """Some intervals in a row."""
    for _ in range(_PLAIN_CYCLES):
        state = function(state)
    return state


def _unmoved(function: Step, state: Tensor) -> Tensor:
    """A constant inflow begins where it is."""
    del function
    return state


def _fixed_point(function: Step, begin: Tensor, prepare: Callable[[Step, Tensor], Tensor]) -> Tensor:
    """Where ``function`` changes nothing, by Newton's steps, the last with gradients; NaN where it is not found."""
    with torch.no_grad():
        state = prepare(function, begin.detach())
        for _ in range(_NEWTON_STEPS):
            moved = function(state)
            change = (moved - state).abs().amax(-1)
            if bool((change <= _SETTLED * state.abs().amax(-1).clamp(min=1e-12)).all()):
                break
            state = state + torch.linalg.solve(_one_less(function, state), (moved - state)[..., None])[..., 0]
        moved = function(state)
        size = state.abs().amax(-1).clamp(min=1e-12)
        lost = ~((moved - state).abs().amax(-1) <= math.sqrt(_SETTLED) * size)
        inverse = torch.linalg.inv(_one_less(function, state))
    found = state + (inverse @ (function(state) - state)[..., None])[..., 0]
    return torch.where(lost[..., None], torch.nan, found)


def _one_less(function: Step, state: Tensor) -> Tensor:
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
