"""Dose regimens that a network was trained on, and sentences on what lies beyond them in a regimen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.designs.coverage import RANGE_SLACK, count_of
from nlme_sbi.individual_model.dosing.doses import MODELLED_DURATION, MODELLED_RATE, WrittenDoses, write_out_doses
from nlme_sbi.types import Design

RegimenRule = tuple[Bool[Tensor, " B"], Callable[[int], str]]
Range = tuple[float, float]


@dataclass(frozen=True)
class RegimenRanges:
    """Kinds and ranges of the doses of training designs, additional ones (ADDL) written out.

    Args:
        doses: numbers of doses of an individual.
        amounts: smallest and largest amount; None where no dose has one.
        rates: of infusions; None where there was none.
        durations: of infusions with an amount.
        modelled: those of RATE -1 and -2 that occur.
        compartments: that doses enter.
        steady_states: codes of SS other than 0.
        steady_intervals: II of doses at steady state.
        resets: whether there are resets.
        intervals: between doses at different times; None where no individual has several.
    """

    doses: frozenset[int] = frozenset({0})
    amounts: Range | None = None
    rates: Range | None = None
    durations: Range | None = None
    modelled: frozenset[float] = frozenset()
    compartments: frozenset[int] = frozenset()
    steady_states: frozenset[int] = frozenset()
    steady_intervals: Range | None = None
    resets: bool = False
    intervals: Range | None = None

    @classmethod
    def of(cls, pool: Design) -> RegimenRanges:
        """Kinds and ranges in a pool of designs."""
        if pool.events is None:
            return cls()
        written = write_out_doses(pool)
        given, steady = written.given, written.given & (written.steady_state > 0)
        infused = given & (written.rate > 0)
        return cls(
            doses=frozenset(given.sum(1).tolist()),
            amounts=_range(written.amount[given & (written.amount > 0)]),
            rates=_range(written.rate[infused]),
            durations=_range((written.amount / written.rate)[infused & (written.amount > 0)]),
            modelled=frozenset(written.rate[given & (written.rate < 0)].tolist()),
            compartments=frozenset(written.compartment[given].tolist()),
            steady_states=frozenset(written.steady_state[steady].tolist()),
            steady_intervals=_range(written.interval[steady & (written.interval > 0)]),
            resets=bool(torch.isfinite(written.forgets).any()),
            intervals=_range(_intervals(written)[1]),
        )

    def union(self, other: RegimenRanges) -> RegimenRanges:
        """Kinds and ranges that occur in either."""
        return RegimenRanges(
            **{item.name: _union(getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        )

    def kind_rules(self, design: Design) -> list[RegimenRule]:
        """Rules for rows with doses of a kind that training did not have, or infusions and steady states beyond its
        ranges."""
        if design.events is None:
            return []
        written = write_out_doses(design)
        given, steady = written.given, written.given & (written.steady_state > 0)
        infused = given & (written.rate > 0)
        lasting = written.amount / torch.where(infused, written.rate, 1.0)
        routes = torch.tensor(sorted(self.compartments), dtype=torch.int64, device=given.device)
        listed = ", ".join(str(place) for place in sorted(self.compartments)) or "none"
        rules: list[RegimenRule] = [
            (
                (given & ~torch.isin(written.compartment, routes)).any(1),
                lambda row: (
                    "a dose into compartment "
                    f"{int(written.compartment[row][given[row] & ~torch.isin(written.compartment[row], routes)][0])}, "
                    f"but the network was trained on doses into {listed}"
                ),
            ),
            *(
                _never((given & (written.rate == code)).any(1), f"a modelled {word} (RATE {code:g})")
                for code, word in ((MODELLED_RATE, "rate"), (MODELLED_DURATION, "duration"))
                if code not in self.modelled
            ),
        ]
        if self.rates is None:
            rules.append(_never(infused.any(1), "an infusion"))
        else:
            rules.append(_outside(written.rate, infused, self.rates, "an infusion at the rate"))
            measured = infused & (written.amount > 0)
            rules.append(_outside(lasting, measured, self.durations, "an infusion that lasts"))
        rules += [
            _never((steady & (written.steady_state == code)).any(1), f"a steady state (SS {code})")
            for code in (1, 2)
            if code not in self.steady_states
        ]
        repeated = steady & (written.interval > 0)
        rules.append(_outside(written.interval, repeated, self.steady_intervals, "a steady state with the interval"))
        if not self.resets:
            rules.append(_never(torch.isfinite(written.forgets).any(1), "a reset (EVID 3 or 4, or SS 1)"))
        return rules

    def count_and_amount_rules(self, design: Design) -> list[RegimenRule]:
        """Rules for rows with a number of doses that training did not have, or amounts beyond its range."""
        given, amounts = _given(design)
        counts = given.sum(1)
        known = torch.tensor(sorted(self.doses), device=counts.device)
        trained = ", ".join(str(count) for count in sorted(self.doses))
        return [
            (
                ~torch.isin(counts, known),
                lambda row: f"{count_of(int(counts[row]), 'dose')}, but the network was trained with {trained}",
            ),
            _outside(amounts, given & (amounts > 0), self.amounts, "a dose of"),
        ]

    def range_rules(self, design: Design) -> list[RegimenRule]:
        """As :meth:`count_and_amount_rules` for designs that were varied in training: they allow every number of doses
        between the smallest and the largest, and pauses up to the longest between two doses."""
        given, amounts = _given(design)
        counts = given.sum(1)
        least, most = min(self.doses), max(self.doses)
        rules: list[RegimenRule] = [
            (
                (counts < least) | (counts > most),
                lambda row: f"{count_of(int(counts[row]), 'dose')}, but the network was trained with {least} to {most}",
            ),
            _outside(amounts, given & (amounts > 0), self.amounts, "a dose of"),
        ]
        if design.events is not None and self.intervals is not None:
            longest = self.intervals[1]
            paused = _longest_pause(write_out_doses(design))
            rules.append(
                (
                    paused > (1 + RANGE_SLACK) * longest,
                    lambda row: (
                        f"{paused[row]:.6g} between two doses, but the network was trained on at most {longest:.6g}"
                    ),
                )
            )
        return rules


PLAIN_BOLUS = RegimenRanges(doses=frozenset({1}), compartments=frozenset({1}))


def _given(design: Design) -> tuple[Bool[Tensor, "B E"], Float[Tensor, "B E"]]:
    if design.events is None:
        nothing = torch.zeros((len(design), 0), dtype=torch.float64, device=design.times.device)
        return nothing.bool(), nothing
    written = write_out_doses(design)
    return written.given, written.amount


def _intervals(written: WrittenDoses) -> tuple[Bool[Tensor, "B E"], Float[Tensor, " n"]]:
    """Times between consecutive doses, without those at one time: a mask, and their values."""
    times = torch.where(written.given, written.time, torch.inf).sort(1).values
    gaps = times.diff(dim=1)
    there = torch.isfinite(gaps) & (gaps > 0)
    return there, gaps[there]


def _longest_pause(written: WrittenDoses) -> Float[Tensor, " B"]:
    """Longest time between consecutive doses, 0 where there are none."""
    times = torch.where(written.given, written.time, torch.inf).sort(1).values
    gaps = torch.nan_to_num(times.diff(dim=1), nan=0.0, posinf=0.0)
    return gaps.amax(1) if gaps.shape[1] else torch.zeros(len(times), dtype=torch.float64, device=times.device)


def _union(one: Any, other: Any) -> Any:
    """Union of two sets, the range of two ranges, or the disjunction of two flags."""
    if isinstance(one, frozenset):
        return one | other
    if isinstance(one, bool):
        return one or other
    if one is None or other is None:
        return other if one is None else one
    return min(one[0], other[0]), max(one[1], other[1])


def _range(values: Tensor) -> Range | None:
    return (float(values.min()), float(values.max())) if len(values) else None


def _never(broken: Bool[Tensor, " B"], what: str) -> RegimenRule:
    return broken, lambda _: f"{what}, but the network was trained without"


def _outside(
    values: Float[Tensor, "B E"], chosen: Bool[Tensor, "B E"], trained: Range | None, what: str
) -> RegimenRule:
    """Rule for rows with a chosen value outside a range, which is widened by a tenth; without one, all are outside."""
    low, high = (0.0, 0.0) if trained is None else trained
    outside = chosen & ((values < (1 - RANGE_SLACK) * low) | (values > (1 + RANGE_SLACK) * high))
    return (
        outside.any(dim=1),
        lambda row: (
            f"{what} {values[row][outside[row]][0]:.6g}, but the network was trained on {low:.6g} to {high:.6g}"
        ),
    )
