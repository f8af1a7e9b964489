"""Random times for every individual."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.designs.coverage import (
    TIME_TOLERANCE,
    Reasons,
    count_of,
    dose_records,
    first_reason,
    reasons_by_chunk,
    signals_rule,
    time_counts,
    without_covariates,
)
from nlme_sbi.designs.regimens import PLAIN_BOLUS
from nlme_sbi.types import Design, Events

_DOSE_KEYS = ("lowest", "highest", "time")


@dataclass(frozen=True)
class RandomTimes:
    """Between ``fewest`` and ``most`` times, uniform between ``earliest`` and ``latest``, sorted; optionally one dose.

    Args:
        earliest: lower end of the times, in the simulator's time unit.
        latest: upper end of the times.
        fewest: smallest number of times of an individual; every number up to ``most`` is equally likely.
        most: largest number of times; shorter rows are padded with their last time, unobserved.
        signals: number of measured signals, all measured at every time.
        dose: None, or ``lowest`` and ``highest`` amount (log-uniform between them) and ``time`` (0 if left out).

    Raises:
        ValueError: a range is empty, or a dose is not positive.
    """

    earliest: float | int
    latest: float | int
    fewest: int
    most: int
    signals: int = 1
    dose: Mapping[str, float | int] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.earliest) and math.isfinite(self.latest) and self.earliest < self.latest):
            raise ValueError(f"RandomTimes needs finite earliest < latest; got {self.earliest} and {self.latest}.")
        if not 1 <= self.fewest <= self.most:
            raise ValueError(f"RandomTimes needs 1 <= fewest <= most; got {self.fewest} and {self.most}.")
        if self.signals < 1:
            raise ValueError(f"RandomTimes needs at least one signal; got signals={self.signals}.")
        if self.dose is not None:
            unknown = [key for key in self.dose if key not in _DOSE_KEYS]
            if unknown or "lowest" not in self.dose or "highest" not in self.dose:
                raise ValueError(f"dose needs lowest and highest, and may have time; got {sorted(self.dose)}.")
            lowest, highest, time = self._dose_range(self.dose)
            if not (0 < lowest <= highest < math.inf and math.isfinite(time)):
                raise ValueError(
                    f"dose needs 0 < lowest <= highest (log-uniform) and a finite time; got {lowest}, {highest} and "
                    f"{time}."
                )

    @staticmethod
    def _dose_range(dose: Mapping[str, float | int]) -> tuple[float, float, float]:
        return float(dose["lowest"]), float(dose["highest"]), float(dose.get("time", 0.0))

    def sample(self, count: int, generator: torch.Generator) -> Design:
        """``count`` individuals, each with its own times and, with ``dose``, its own amount."""
        device = generator.device
        span = self.latest - self.earliest
        draws = self.earliest + span * torch.rand((count, self.most), generator=generator, device=device)
        sizes = torch.randint(self.fewest, self.most + 1, (count, 1), generator=generator, device=device)
        kept = torch.arange(self.most, device=device) < sizes
        # Draws are selected before they are sorted: the smallest of many would not be uniform.
        times = torch.where(kept, draws, torch.inf).sort(dim=1).values
        times = torch.where(kept, times, times.gather(1, sizes - 1))
        observed = kept[..., None].expand(-1, -1, self.signals).contiguous()
        return Design(times, observed, events=self._doses(count, generator))

    def _doses(self, count: int, generator: torch.Generator) -> Events | None:
        if self.dose is None:
            return None
        lowest, highest, time = self._dose_range(self.dose)
        draws = torch.rand(count, generator=generator, device=generator.device)
        amounts = lowest * (draws * math.log(highest / lowest)).exp()
        return Events.single_dose(torch.full_like(amounts, time), amounts)

    def covers(self, design: Design) -> Reasons:
        """Rows whose times, number of times, signals or dose lie outside the simulated range."""
        return reasons_by_chunk(without_covariates(design), self._reasons)

    def _reasons(self, design: Design) -> Reasons:
        measured, counts = time_counts(design)
        sizes = measured.sum(dim=1)
        slack = TIME_TOLERANCE * (self.latest - self.earliest)
        times = design.times.double()
        outside = measured & ((times < self.earliest - slack) | (times > self.latest + slack))
        partly = (measured & ~design.observed.all(dim=-1)).sum(dim=1)

        def where_outside(row: int) -> str:
            first = times[row][outside[row]][0]
            return (
                f"{count_of(int(outside[row].sum()), 'time')} outside the {self.earliest:.4g} to {self.latest:.4g} "
                f"that the network was trained on; first {first:.6g}"
            )

        return first_reason(
            [
                signals_rule(design, self.signals),
                (outside.any(dim=1), where_outside),
                (
                    (sizes < self.fewest) | (sizes > self.most),
                    lambda row: (
                        f"{count_of(counts[row], 'observed time')}, but the network was trained on {self.fewest} to "
                        f"{self.most}"
                    ),
                ),
                (
                    partly > 0,
                    lambda row: (
                        f"{count_of(int(partly[row]), 'time')} where some signals are missing, but the network was "
                        "trained with all signals at every time"
                    ),
                ),
                *self._dose_rules(design),
            ]
        )

    def _dose_rules(self, design: Design) -> list[tuple[Bool[Tensor, " B"], Callable[[int], str]]]:
        given, times, amounts = dose_records(design)
        counts = given.sum(dim=1)
        if self.dose is None:
            return [(counts > 0, lambda _: "it has a dose, but the network was trained without doses")]
        lowest, highest, time = self._dose_range(self.dose)
        amount, when = _where_given(amounts, given), _where_given(times, given)
        low, high = lowest * (1 - TIME_TOLERANCE), highest * (1 + TIME_TOLERANCE)
        return [
            (
                counts != 1,
                lambda row: f"{count_of(int(counts[row]), 'dose')}, but the network was trained with one",
            ),
            (
                (amount < low) | (amount > high),
                lambda row: (
                    f"a dose of {amount[row]:.6g}, but the network was trained on {lowest:.6g} to {highest:.6g}"
                ),
            ),
            (
                (when - time).abs() > TIME_TOLERANCE * (self.latest - self.earliest),
                lambda row: f"a dose at {when[row]:.6g}, but the network was trained with doses at {time:.6g}",
            ),
            *PLAIN_BOLUS.kind_rules(design),
        ]


def _where_given(values: Float[Tensor, "B E"], given: Bool[Tensor, "B E"]) -> Float[Tensor, " B"]:
    """The value of the only dose; rows without one or with several are refused before it is used."""
    return torch.where(given, values, 0.0).sum(dim=1)
