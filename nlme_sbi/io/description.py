"""A summary of the data in words: counts, ranges and units, which shows a wrong column or unit before any long work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from nlme_sbi.types import Censoring, Covariates, Design, Events, Observations


def describe(observations: Observations) -> str:
    """Summarize observations in a few lines: individuals, observations and missing values; ranges of signals, times,
    doses and covariates; and the reader's notes on unused columns and rows that were left out."""
    design = observations.design
    individuals, measured = len(observations), int(design.observed.sum())
    missing = int((~design.observed & ~_padding(design)[..., None]).sum())
    lines = [f"{_count(individuals, 'individual')}, {_count(measured, 'observation')} ({missing} missing)"]
    for position, (signal, unit) in enumerate(zip(observations.signals, observations.signal_units, strict=True)):
        seen = observations.values[..., position][design.observed[..., position]]
        share = "" if len(observations.signals) == 1 else f", {_count(len(seen), 'observation')}"
        lines.append(f"signal {signal}: {_range(seen, unit)}{share}{_censored(observations, position, unit)}")
    lines.append(_times(design, observations.time_unit))
    if design.events is not None:
        lines.append(_doses(design, design.events, observations.time_unit, observations.dose_unit))
    if design.covariates is not None:
        lines += _covariates(design.covariates, observations.covariate_units)
    lines += observations.notes
    return "\n".join(lines)


def _censored(observations: Observations, position: int, unit: str) -> str:
    """Number and limits of a signal's censored measurements."""
    if observations.censoring is None:
        return ""
    codes = observations.censoring[..., position][observations.design.observed[..., position]]
    parts = []
    for kind, words, bounds in (
        (Censoring.LEFT, "below", observations.upper),
        (Censoring.RIGHT, "above", observations.lower),
        (Censoring.INTERVAL, "within limits up to", observations.upper),
    ):
        marked = codes == int(kind)
        if bounds is not None and bool(marked.any()):
            own = bounds[..., position][observations.design.observed[..., position]][marked]
            parts.append(f"{int(marked.sum())} {words} {_range(own, unit)}")
    return f"; censored: {', '.join(parts)}" if parts else ""


def _padding(design: Design) -> Bool[Tensor, "I T"]:
    """Padding: unobserved repeats of the last time, up to the end."""
    fills = (design.times == design.times[:, -1:]) & ~design.observed.any(dim=-1)
    trailing = fills.flip(1).long().cumprod(dim=1).flip(1).bool()
    # The first of them may be a time whose values are missing; it is padding only where it repeats the time before.
    repeats = torch.zeros_like(trailing)
    repeats[:, 1:] = design.times[:, 1:] == design.times[:, :-1]
    return trailing & repeats


def _times(design: Design, unit: str) -> str:
    measured = design.observed.any(dim=-1)
    counts = measured.sum(dim=1)
    fewest, most = int(counts.min()), int(counts.max())
    each = str(fewest) if fewest == most else f"{fewest} to {most}"
    kind = "the same for all individuals" if design.has_shared_times else "individual"
    return f"times: {_range(design.times[measured], unit)}, {each} an individual, {kind}"


def _doses(design: Design, events: Events, time_unit: str, unit: str) -> str:
    given = events.doses
    counts = given.sum(dim=1)
    fewest, most = int(counts.min()), int(counts.max())
    each = str(fewest) if fewest == most else f"{fewest} to {most}"
    amounts, times = events.amount[given], events.time[given]
    if len(amounts) == 0:
        return "doses: none"
    text = f"doses: {each} an individual, amount {_range(amounts, unit)}, at {_range(times, time_unit)}"
    return text + "".join(f"; {part}" for part in _kinds_of_doses(design, events, given))


def _kinds_of_doses(design: Design, events: Events, given: Bool[Tensor, "I E"]) -> list[str]:
    """Kinds of doses other than plain boluses, with their numbers."""
    last = torch.where(design.observed.any(2), design.times, -torch.inf).amax(1, keepdim=True)
    further = int(torch.where(given, events.additional, 0).sum())
    counts = (
        (given & (events.rate > 0), "infusion"),
        (given & (events.rate == -1), "infusion of modelled rate"),
        (given & (events.rate == -2), "infusion of modelled duration"),
        (given & (events.steady_state > 0), "steady state"),
        (events.resets, "reset"),
    )
    parts = [_count(int(found.sum()), noun) for found, noun in counts if bool(found.any())]
    if further:
        parts.append(f"{_count(further, 'additional dose')} (ADDL)")
    places = sorted(set(events.compartment[given].tolist()))
    if places != [1]:
        parts.append(f"into {'compartment' if len(places) == 1 else 'compartments'} {', '.join(map(str, places))}")
    late = int((given & (events.time > last)).sum())
    return [*parts, f"{late} after the last measurement"] if late else parts


def _covariates(covariates: Covariates, units: Mapping[str, str]) -> list[str]:
    lines = []
    for name in covariates.names:
        values = covariates.column(name)
        if name not in covariates.levels:
            lines.append(f"covariate {name}: {_range(values, units.get(name, ''))}")
            continue
        levels = covariates.levels[name]
        counts = torch.bincount(values.long(), minlength=len(levels)).tolist()
        shown = ", ".join(f"{level} ({count})" for level, count in list(zip(levels, counts, strict=True))[:12])
        lines.append(f"covariate {name}: {len(levels)} levels: {shown}{', ...' if len(levels) > 12 else ''}")
    return lines


def _range(values: Tensor, unit: str) -> str:
    if values.numel() == 0:
        return "nothing measured"
    low, high = float(values.min()), float(values.max())
    span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return f"{span} {unit}".rstrip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
