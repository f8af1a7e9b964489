"""Ranges of designs that are varied in training, from their pool and many variations, and what lies beyond them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.designs.censoring import limit_rules
from nlme_sbi.designs.courses import CourseRanges
from nlme_sbi.designs.covariates import covariate_rules
from nlme_sbi.designs.coverage import (
    RANGE_SLACK,
    TIME_TOLERANCE,
    Reasons,
    count_of,
    dose_records,
    first_reason,
    signals_rule,
    time_counts,
)
from nlme_sbi.designs.regimens import RegimenRanges
from nlme_sbi.types import Covariates, Design


@dataclass(frozen=True, eq=False)
class VariedRanges:
    """Ranges of a pool's varied designs.

    Args:
        pool: the designs before variation.
        counts: fewest and most times of an individual.
        times: first time of a measurement or dose, last one of a measurement.
        after_dose: longest time from a dose to a measurement with no dose in between; None without doses.
        regimens: doses.
        covariates: of the pool and of variations.
        courses: of covariates in time.
    """

    pool: Design
    counts: tuple[int, int]
    times: tuple[float, float]
    after_dose: float | None
    regimens: RegimenRanges
    covariates: Covariates | None
    courses: CourseRanges

    @classmethod
    def of(cls, pool: Design, drawn: Design) -> VariedRanges:
        """Ranges of a pool and of random variations of it."""
        designs = (pool, drawn)
        counts = [count for design in designs for count in time_counts(design)[1]]
        spans = [_spans(design) for design in designs]
        after = [time for time in map(_after_dose, designs) if time is not None]
        covariates = pool.covariates
        if covariates is not None and drawn.covariates is not None:
            both = torch.cat((covariates.values.double(), drawn.covariates.values.double()))
            covariates = replace(covariates, values=both)
        return cls(
            pool=pool,
            counts=(min(counts), max(counts)),
            times=(min(float(first.min()) for first, _ in spans), max(float(last.max()) for _, last in spans)),
            after_dose=max(float(time.max()) for time in after) if after else None,
            regimens=RegimenRanges.of(pool).union(RegimenRanges.of(drawn)),
            covariates=covariates,
            courses=CourseRanges.of(*designs),
        )

    def to(self, device: torch.device) -> VariedRanges:
        """The ranges, for designs on another device."""
        covariates = self.covariates
        if covariates is not None:
            covariates = replace(covariates, values=covariates.values.to(device))
        return replace(self, pool=self.pool.to(device), covariates=covariates)

    def reasons(self, design: Design) -> Reasons:
        """Rows beyond the ranges, with the reason."""
        signals = self.pool.observed.shape[2]
        if design.observed.shape[2] != signals:
            return first_reason([signals_rule(design, signals)])
        return first_reason(
            [
                *self.regimens.range_rules(design),
                *self.regimens.kind_rules(design),
                *self._time_rules(design),
                *limit_rules(design, self.pool, RANGE_SLACK),
                *covariate_rules(design.covariates, self.covariates, len(design)),
                *self.courses.rules(design),
            ]
        )

    def _time_rules(self, design: Design) -> list[tuple[Bool[Tensor, " B"], Callable[[int], str]]]:
        measured, counts = time_counts(design)
        sizes = measured.sum(1)
        low, high = self.counts
        times = design.times.double()
        earliest, latest = self.times
        slack = RANGE_SLACK * (latest - earliest) + TIME_TOLERANCE * abs(latest)
        outside = measured & ((times < earliest - slack) | (times > latest + slack))
        unseen = (design.observed.any(1) & ~self.pool.observed.flatten(0, 1).any(0)).any(1)
        rules: list[tuple[Bool[Tensor, " B"], Callable[[int], str]]] = [
            (
                (sizes < low) | (sizes > high),
                lambda row: f"{count_of(counts[row], 'observed time')}, but the network was trained on {low} to {high}",
            ),
            (
                outside.any(1),
                lambda row: (
                    f"a measurement at {times[row][outside[row]][0]:.6g}, but the network was trained on times from "
                    f"{earliest:.6g} to {latest:.6g}"
                ),
            ),
            (unseen, lambda _: "a signal that no design of the training measured"),
        ]
        after = _after_dose(design)
        if after is not None and self.after_dose is not None:
            longest = self.after_dose
            rules.append(
                (
                    after > (1 + RANGE_SLACK) * longest,
                    lambda row: (
                        f"a measurement {after[row]:.6g} after the dose before, but the network was trained on at most "
                        f"{longest:.6g}"
                    ),
                )
            )
        return rules


def _spans(design: Design) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """First time of a measurement or a dose, and last one of a measurement."""
    measured, times = design.observed.any(dim=2), design.times.double()
    given, dose_times, _ = dose_records(design)
    first = torch.where(measured, times, torch.inf).amin(1)
    if given.shape[1]:
        first = torch.minimum(first, torch.where(given, dose_times, torch.inf).amin(1))
    return first, torch.where(measured, times, -torch.inf).amax(1)


def _after_dose(design: Design) -> Float[Tensor, " B"] | None:
    """Longest time from a dose to a measurement with no dose in between, 0 where there is none; None without doses."""
    measured = design.observed.any(dim=2)
    given, dose_times, _ = dose_records(design)
    if not given.shape[1]:
        return None
    known = torch.where(given, dose_times, torch.inf).sort(dim=1).values
    times = design.times.double().contiguous()
    place = torch.searchsorted(known, times, right=True) - 1
    last = known.gather(1, place.clamp(min=0))
    since = torch.where(measured & (place >= 0) & torch.isfinite(last), times - last, 0.0)
    return since.amax(1)
