"""Sums over many doses by stepping from event to event, one exponential after another.

Source: Abuhelwa, Foster, Upton (2015), J. Pharmacol. Toxicol. Methods 73:42, for steps between doses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.closed_forms import log_expm1_ratio
from nlme_sbi.individual_model.dosing.dispositions import Modes
from nlme_sbi.individual_model.dosing.doses import ReceivedDoses


def can_step(doses: ReceivedDoses, central: int) -> bool:
    """Whether all event times are those of the data, nothing is infused into an absorption compartment, and steady
    states are those of boluses."""
    written = doses.written
    slow = written.given & (written.rate != 0) & ((written.compartment != central) | (written.steady_state > 0))
    return doses.as_recorded and not bool(slow.any())


def step_through_events(
    doses: ReceivedDoses, times: Tensor, modes: Modes, *, central: int, absorption: Tensor | None
) -> Float[Tensor, "I *batch T K"]:
    """The part of each exponential in the sum over doses, by stepping from event to event: its work grows with doses
    plus times, not with their product."""
    steps = _Steps.of(doses, times, central)
    rates = torch.cat([rate.expand(*times.shape[:-1], 1) for rate in modes.rates], dim=-1)
    weights = torch.cat([weight.expand(*times.shape[:-1], 1) for weight in modes.weights], dim=-1)
    amounts = torch.cat([amount.expand(*times.shape[:-1], 1) for amount in doses.amount], dim=-1)
    state, inflow = torch.zeros_like(rates), torch.zeros_like(rates)
    depot = torch.zeros_like(rates[..., :1])
    ones = (1,) * (times.ndim - 2)
    found = []
    for place in range(steps.elapsed.shape[1]):
        elapsed = steps.elapsed[:, place].reshape(-1, *ones, 1)
        if steps.moves[place]:
            state = state * torch.exp(-rates * elapsed)
            if steps.is_infused:
                state = state - inflow * torch.expm1(-rates * elapsed) / rates
            if absorption is not None:
                state = state + weights * absorption * depot * _absorbed_after(absorption, rates, elapsed)
                depot = depot * torch.exp(-absorption * elapsed)
        if steps.clears[place]:
            kept = ~steps.clear[:, place].reshape(-1, *ones, 1)
            state, inflow, depot = (torch.where(kept, value, 0.0) for value in (state, inflow, depot))
        if steps.changes[place]:
            column = steps.column[:, place].reshape(-1, *ones, 1).expand(*amounts.shape[:-1], 1)
            amount = amounts.gather(-1, column)
            bolus, speed = (one[:, place].reshape(-1, *ones, 1) for one in (steps.bolus, steps.speed))
            direct = steps.direct[:, place].reshape(-1, *ones, 1)
            at_once, absorbed = bolus * direct * amount * weights, bolus * (1 - direct) * amount
            if steps.repeats[place]:
                interval = steps.interval[:, place].reshape(-1, *ones, 1)
                at_once, absorbed = _add_predecessors(at_once, absorbed, interval, rates, weights, absorption)
            state, depot = state + at_once, depot + absorbed
            inflow = inflow + speed * amount * weights if steps.is_infused else inflow
        found.append(state)
    every = torch.stack(found, dim=-2)
    places = steps.measured.reshape(-1, *ones, times.shape[-1], 1).expand(*times.shape, rates.shape[-1])
    return every.gather(-2, places)


def _absorbed_after(absorption: Tensor, rates: Tensor, elapsed: Tensor) -> Tensor:
    """What a unit amount that is absorbed leaves after ``elapsed`` for each exponential, over the absorption rate."""
    gap = (absorption - rates).abs()
    slower = torch.minimum(absorption, rates)
    return elapsed * torch.exp(log_expm1_ratio(gap * elapsed) - slower * elapsed)


def _add_predecessors(
    at_once: Tensor, absorbed: Tensor, interval: Tensor, rates: Tensor, weights: Tensor, absorption: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a bolus and its predecessors, one every ``interval``, have left in the exponentials and in the absorption
    compartment at its time; ``interval`` 0 is a bolus without predecessors."""
    steady = interval > 0
    every = torch.where(steady, interval, 1.0)
    kept = torch.where(steady, -1 / torch.expm1(-rates * every), 1.0)
    if absorption is None:
        return at_once * kept, absorbed
    absorbed = absorbed * torch.where(steady, -1 / torch.expm1(-absorption * every), 1.0)
    before = weights * absorption * absorbed * _absorbed_after(absorption, rates, every)
    return (at_once + torch.where(steady, before, 0.0)) * kept, absorbed


@dataclass(frozen=True, eq=False)
class _Steps:
    """Events of each individual in their order, ``(I, M)`` each; ``measured (I, T)`` has the places of the times."""

    elapsed: Tensor
    column: Tensor
    bolus: Tensor  # share of the dose's amount that enters at once: 0 or 1
    speed: Tensor  # change of the inflow for each unit of the amount
    direct: Tensor  # 1 into the central compartment, 0 into the absorption
    clear: Tensor
    interval: Tensor  # between a bolus and its predecessors in a steady state, 0 without
    measured: Tensor
    moves: list[bool]
    clears: list[bool]
    changes: list[bool]
    repeats: list[bool]
    is_infused: bool

    @classmethod
    @torch.no_grad()
    def of(cls, doses: ReceivedDoses, times: Tensor, central: int) -> _Steps:
        written = doses.written
        measured = times.reshape(times.shape[0], -1, times.shape[-1])[:, 0]  # the same for all draws
        last = measured.amax(1, keepdim=True)
        infused = written.given & (written.rate > 0)
        end = written.time + torch.where(infused, written.amount / torch.where(infused, written.rate, 1.0), 0.0)
        # An infusion that was ended by a reset does not end again.
        ended = infused
        for when in written.forgets.unbind(1):
            ended = ended & ~((written.time < when[:, None]) & (when[:, None] <= end))
        size, columns = written.given.shape
        number = torch.arange(columns, device=times.device).expand(size, -1)
        per_amount = torch.where(infused, written.rate / torch.where(infused, written.amount, 1.0), 0.0)
        here = (written.compartment == central).to(times)
        no_reset, no_time = torch.zeros_like(written.forgets), torch.zeros_like(measured)
        no_dose = torch.zeros_like(written.time)

        def concatenate(resets: Tensor, starts: Tensor, ends: Tensor, measurements: Tensor) -> Tensor:
            return torch.cat([resets, starts, ends, measurements], dim=1)

        when = concatenate(written.forgets, written.time, end, measured)
        rank = concatenate(
            torch.where(written.reset_follows, 4, 0),
            torch.where(written.follows, 5, 1),
            torch.full_like(number, 2),
            torch.full(measured.shape, 3, device=times.device),
        )
        when = torch.minimum(when, last)
        order = torch.argsort(rank, dim=1, stable=True)
        order = order.gather(1, torch.argsort(when.gather(1, order), dim=1, stable=True))

        def in_order(*parts: Tensor) -> Tensor:
            return concatenate(*parts).gather(1, order)

        when = when.gather(1, order)
        elapsed = torch.diff(when, dim=1, prepend=when[:, :1])
        bolus = in_order(no_reset, (written.given & (written.rate == 0)).to(times), no_dose, no_time)
        speed = in_order(no_reset, per_amount, -per_amount * ended.to(times), no_time)
        steady = written.given & (written.steady_state > 0)
        interval = in_order(no_reset, torch.where(steady, written.interval, 0.0), no_dose, no_time)
        clear = in_order(torch.isfinite(written.forgets), no_dose.bool(), no_dose.bool(), no_time.bool())
        return cls(
            elapsed=elapsed,
            column=in_order(no_reset.long(), number, number, no_time.long()),
            bolus=bolus,
            speed=speed,
            direct=in_order(no_reset, here, here, no_time),
            clear=clear,
            interval=interval,
            measured=torch.argsort(order, dim=1)[:, -measured.shape[1] :],
            moves=(elapsed > 0).any(0).tolist(),
            clears=clear.any(0).tolist(),
            changes=((bolus != 0) | (speed != 0)).any(0).tolist(),
            repeats=(interval > 0).any(0).tolist(),
            is_infused=bool(infused.any()),
        )
