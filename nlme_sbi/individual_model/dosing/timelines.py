"""Timelines of individuals with doses: all events sorted by time, separately for each draw of the parameters.

Measurements, starts and ends of infusions, boluses and resets of an individual are sorted once its parameters are
known, because lag times and durations depend on them. All is batched over individuals and draws, and differentiable in
event times, too. States at steady state (SS) come from a function of the caller, which knows the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import ReceivedDoses

_MOST_PAST = 200  # most past doses of a steady state that may still be entering


@dataclass(frozen=True, eq=False)
class Nodes:
    """Points of the timelines, each ``(*batch, M)``: time, order among equal times, and change of the state."""

    time: Tensor
    rank: Tensor
    jump: Tensor  # (*batch, M, X) of the state
    flow: Tensor  # (*batch, M, X) of the inflow
    clear: Tensor


# Order of events at one time.
_EMPTIED, _DOSED, _ENDED, _MEASURED, _EMPTIED_LATER, _DOSED_LATER = range(6)


StatesBefore = Callable[[Sequence["RepeatedDose"]], Sequence[Tensor]]


def build_timeline(
    initial: Float[Tensor, "*batch X"],
    start: Float[Tensor, " *batch"],
    times: Float[Tensor, "*batch T"],
    doses: ReceivedDoses,
    places: Sequence[int],
    states_before: StatesBefore,
    stops: Float[Tensor, "I V"] | None,
) -> tuple[Nodes, Int[Tensor, "*batch T"]]:
    """Sort measurements, doses, resets and stops.

    Args:
        initial: state that a reset returns to.
        start: any tensor of the batch; gives its shape.
        times: of measurements, non-decreasing along the last dimension.
        doses: of the individuals, the first dimension of the batch.
        places: for each compartment, counted from 1, the state that its doses enter.
        states_before: finds the states ``(*batch, X)`` at the records of doses at steady state, before these doses.
        stops: times of other changes, such as records of covariates; None without.

    Returns:
        The points in order, and the positions of the measurements among them.

    Raises:
        ValueError: infusions at steady state that overlap too often.
    """
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
    steady: list[_Dose] = []
    for column in range(written.columns):
        if not bool(written.given[:, column].any()):
            continue
        dose = _Dose.of(doses, column, spread, places, initial, resets)
        dose.enter(line, dose.begin, dose.given & ~dose.constant)
        if bool(dose.steady.any()):
            steady.append(dose)
    repeated = [dose.past_doses(line) for dose in steady]
    for dose, past, before in zip(steady, repeated, states_before(repeated) if repeated else (), strict=True):
        dose.enter_steady_state(line, past, before - initial)
    nodes = line.stack()
    order = torch.argsort(nodes.rank, dim=-1, stable=True)
    order = order.gather(-1, torch.argsort(nodes.time.detach().gather(-1, order), dim=-1, stable=True))
    wide = order[..., None].expand(*order.shape, initial.shape[-1])
    ordered = Nodes(
        time=nodes.time.gather(-1, order),
        rank=nodes.rank.gather(-1, order),
        jump=nodes.jump.gather(-2, wide),
        flow=nodes.flow.gather(-2, wide),
        clear=nodes.clear.gather(-1, order),
    )
    return ordered, torch.argsort(order, dim=-1)[..., : times.shape[-1]]


@dataclass(frozen=True, eq=False)
class RepeatedDose:
    """Equal doses since ever, the next of them at ``recorded``; each field ``(*batch)``.

    Args:
        entry: ``(*batch, X)``, 1 for the state that they enter.
        recorded: time of the record of the next one.
        lag: time from a dose's record to its entry.
        amount: of each dose; 0 for a constant infusion.
        infused: whether they are infusions.
        duration: of infusions, else 0.
        interval: between doses.
        constant: the rate of an infusion since ever, else 0.
        matters: where the state before the next dose is needed.
    """

    entry: Tensor
    recorded: Tensor
    lag: Tensor
    amount: Tensor
    infused: Tensor
    duration: Tensor
    interval: Tensor
    constant: Tensor
    matters: Tensor

    def past(self) -> int:
        """Number of past doses that may still be entering, or not have entered yet, at the time of the record."""
        with torch.no_grad():
            count = int(torch.ceil(((self.duration + self.lag) / self.interval).amax()).item())
        if count > _MOST_PAST:
            raise ValueError(
                f"An infusion at steady state lasts {count} times as long as the interval between doses; at most "
                f"{_MOST_PAST} are possible. Give it as a constant infusion (AMT 0, RATE, SS 1)."
            )
        return count

    @property
    def bolus(self) -> Float[Tensor, "*batch X"]:
        """Change of the state at each dose; 0 for infusions."""
        return torch.where(self.infused, 0.0, self.amount)[..., None] * self.entry

    def inflows(self, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inflows from the start of a dose over ``length``, at most an interval, with infusions of earlier doses.

        Returns:
            The duration of the first inflow, the first and the second inflow ``(*batch, X)``.
        """
        with torch.no_grad():
            whole = torch.floor(self.duration / self.interval)
        speed = (self.amount / torch.where(self.duration > 0, self.duration, 1.0)) * self.infused
        rest = self.duration - whole * self.interval
        early, later = (((whole + count) * speed)[..., None] * self.entry for count in (1, 0))
        return torch.minimum(rest, length), early, later

    def since_entry(self) -> Tensor:
        """Time from the entry of the last dose before the record to the record, at most an interval."""
        with torch.no_grad():
            ahead = torch.ceil(self.lag / self.interval).clamp(min=1)
        return ahead * self.interval - self.lag


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

    def stack(self) -> Nodes:
        time, rank, jump, flow, clear = zip(*self._nodes, strict=True)
        return Nodes(
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

    def past_doses(self, line: _Timeline) -> RepeatedDose:
        """The doses before this one, which is at steady state."""
        repeated = self.steady & ~self.constant
        recorded = self.recorded.expand(line.batch)
        matters = self.steady & self.not_reset(self.recorded) & (self.recorded <= line.last)
        return RepeatedDose(
            entry=self.entry.expand(*line.batch, -1),
            recorded=recorded,
            lag=(self.begin - self.recorded).expand(line.batch),
            amount=torch.where(repeated, self.amount, 0.0).expand(line.batch),
            infused=(self.infused & ~self.constant).expand(line.batch),
            duration=torch.where(repeated & self.infused, self.duration, 0.0).expand(line.batch),
            interval=self.interval.expand(line.batch),
            constant=torch.where(self.steady & self.constant, self.amount, 0.0).expand(line.batch),
            matters=matters.expand(line.batch),
        )

    def enter_steady_state(self, line: _Timeline, past: RepeatedDose, jump: Tensor) -> None:
        """Set the steady state at the record, with past doses that are still entering or, because of a lag, have not
        entered yet."""
        repeated = self.steady & ~self.constant
        running = torch.zeros(line.batch, dtype=jump.dtype, device=jump.device)
        for number in range(1, past.past() + 1):
            began = self.begin - number * self.interval
            self.enter(line, began, repeated & (began.detach() > self.recorded))
            entering = repeated & self.infused & (began <= self.recorded) & (began + self.duration > self.recorded)
            running = running + entering.to(jump)
            self.end(line, began, entering)
        flow = (running * self.speed)[..., None] * self.entry
        line.add(self.recorded, self.rank, past.matters, jump=jump, flow=flow)
