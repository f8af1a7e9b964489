"""Scales of a dosed study, from which a wide prior is derived without a fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nlme_sbi.individual_model.dosing.doses import require_events
from nlme_sbi.types import Observations


@dataclass(frozen=True)
class TypicalScales:
    """Medians over individuals, in the units of the data.

    Args:
        dose: largest single dose; of a constant infusion the amount that enters over the sampled time.
        highest: largest concentration.
        middle: median concentration.
        span: from an individual's last dose before its first measurement, or that measurement, to the last one.
        rise: from the last dose before the largest concentration to it.
    """

    dose: float
    highest: float
    middle: float
    span: float
    rise: float

    def kinetics(self, concentration_scale: float) -> dict[str, float]:
        """Rough kinetic parameters by name: the volume is a dose over the highest concentration, elimination goes on
        over the sampled time, absorption is over at the peak.

        Args:
            concentration_scale: factor from amount over volume to the data's concentrations.
        """
        volume, rate = concentration_scale * self.dose / self.highest, 2 / self.span
        return {"ka": 2 / self.rise, "rate": rate, "CL": rate * volume, "V": volume, "Q": rate * volume, "Vp": volume}


def typical_scales(observations: Observations, signal: int = 0) -> TypicalScales:
    """Scales of the doses and of one signal.

    Raises:
        ValueError: no doses, no positive concentration, or no time between doses and measurements.
    """
    events, design = require_events(observations.design), observations.design
    given = events.doses
    seen = observations.uncensored[..., signal] & (observations.values[..., signal] > 0)
    with_both = seen.any(1) & (given & ((events.amount > 0) | (events.rate > 0))).any(1)
    if not bool(with_both.any()):
        raise ValueError(
            "A prior from the data needs individuals with a dose above 0 and a positive measurement, and there are "
            "none; give the prior yourself: prior=gaussian with prior.parameters.NAME={mean: ..., sd: ...}."
        )
    values = torch.where(seen, observations.values[..., signal].double(), -torch.inf)[with_both]
    times, events, given, seen = design.times.double()[with_both], events[with_both], given[with_both], seen[with_both]
    peak = values.argmax(1, keepdim=True)
    last = torch.where(seen, times, -torch.inf).amax(1)
    first = torch.where(seen, times, torch.inf).amin(1)

    def dose_before(when: torch.Tensor) -> torch.Tensor:
        """Time of the last dose at or before ``when``, additional ones included; else of the first dose."""
        start, every = events.time.double(), events.interval.double()
        again = torch.where(every > 0, torch.floor((when[:, None] - start) / torch.where(every > 0, every, 1.0)), 0.0)
        again = torch.minimum(again.clamp(min=0), events.additional.double())
        at = torch.where(given & (start <= when[:, None]), start + again * every, -torch.inf).amax(1)
        return torch.where(torch.isfinite(at), at, torch.where(given, start, torch.inf).amin(1))

    span = last - torch.minimum(dose_before(first), first)
    positive = span[span > 0]
    if len(positive) == 0:
        raise ValueError(
            "A prior from the data needs measurements after a dose, and there are none; give the prior yourself: "
            "prior=gaussian with prior.parameters.NAME={mean: ..., sd: ...}."
        )
    typical_span = float(positive.median())
    at_peak = times.gather(1, peak)[:, 0]
    rise = (at_peak - dose_before(at_peak)).clamp(min=0)
    rising = rise[rise > 0]
    constant = (events.amount == 0) & (events.rate > 0)
    amount = torch.where(constant, events.rate.double() * typical_span, events.amount.double())
    return TypicalScales(
        dose=float(torch.where(given, amount, 0.0).amax(1).median()),
        highest=float(values.amax(1).median()),
        middle=float(values[torch.isfinite(values)].median()),
        span=typical_span,
        rise=float(rising.median()) if len(rising) else 0.1 * typical_span,
    )
