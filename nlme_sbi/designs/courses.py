"""Covariates in time: which records are informative, and whether courses of data lie in the range of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.designs.coverage import RANGE_SLACK, TIME_TOLERANCE, count_of
from nlme_sbi.types import Design, TimeCovariates

CourseRule = tuple[Bool[Tensor, " B"], Callable[[int], str]]
Range = tuple[float, float]


def informative_records(
    course: TimeCovariates, name: str, last: Float[Tensor, " B"]
) -> tuple[Bool[Tensor, "B V"], Float[Tensor, "B V"]]:
    """Which records of a covariate its course depends on, and the values of all records.

    Padding, and records that repeat the value that holds anyway, are not informative: two tables of the same course
    have the same informative records.

    Args:
        course: of individuals.
        name: of the covariate.
        last: time after which the course does not matter.
    """
    place = course.names.index(name)
    values, times = course.values[..., place], course.times
    between, count = course.between[place], times.shape[1]
    none = torch.zeros_like(times[:, :1], dtype=torch.bool)
    same_time = times[:, 1:] == times[:, :-1]
    begins, ends = ~torch.cat([none, same_time], 1), ~torch.cat([same_time, none], 1)
    sorted_times = times.contiguous()
    if between == "previous":
        before = torch.searchsorted(sorted_times, sorted_times, right=False) - 1
        repeats = (before >= 0) & (values.gather(1, before.clamp(min=0)) == values)
        return ends & ~repeats & ((before < 0) | (times <= last[:, None])), values
    if between == "next":
        after = torch.searchsorted(sorted_times, sorted_times, right=True)
        repeats = (after < count) & (values.gather(1, after.clamp(max=count - 1)) == values)
        return begins & ~repeats, values
    repeated = torch.cat([none, same_time & (values[:, 1:] == values[:, :-1])], 1)
    return ~repeated, values


@dataclass(frozen=True)
class CourseRanges:
    """Ranges of the covariates in time of training designs, each by name.

    Args:
        between: interpolation between records.
        values: smallest and largest value.
        records: largest number of informative records of an individual.
        steps: largest change from one informative record to the next.
    """

    between: dict[str, str]
    values: dict[str, Range]
    records: dict[str, int]
    steps: dict[str, float]

    @classmethod
    def of(cls, *designs: Design) -> CourseRanges:
        """Ranges over designs with the same covariates."""
        between: dict[str, str] = {}
        values: dict[str, Range] = {}
        records: dict[str, int] = {}
        steps: dict[str, float] = {}
        for design in designs:
            course = design.time_covariates
            for place, name in enumerate(() if course is None else course.names):
                counts, change, low, high = (number.tolist() for number in _summarize(design, name))
                between[name] = course.between[place] if course is not None else ""
                known = values.get(name, (torch.inf, -torch.inf))
                values[name] = min(known[0], *low), max(known[1], *high)
                records[name] = max(records.get(name, 0), *counts)
                steps[name] = max(steps.get(name, 0.0), *change)
        return cls(between, values, records, steps)

    def rules(self, design: Design) -> list[CourseRule]:
        """Rules for rows whose courses are missing or outside the training ranges, widened by a tenth."""
        course, found = design.time_covariates, []
        for name, trained in self.between.items():
            if course is None or name not in course.names:
                found.append(_reject_all(design, f'the covariate "{name}" in time is missing (data.time_covariates)'))
                continue
            given = course.between[course.names.index(name)]
            if given != trained:
                remedy = f"'data.time_covariates={{{name}: {trained}}}'"
                found.append(
                    _reject_all(design, f'"{name}" is read as {given}, but the network was trained on {remedy}')
                )
                continue
            found += self._rules_of(name, design)
        return found

    def _rules_of(self, name: str, design: Design) -> list[CourseRule]:
        counts, change, lowest, highest = _summarize(design, name)
        (low, high), most, step = self.values[name], self.records[name], self.steps[name]
        slack = RANGE_SLACK * (high - low) + TIME_TOLERANCE * max(abs(low), abs(high))
        shown = torch.where(lowest < low - slack, lowest, highest)
        return [
            (
                (lowest < low - slack) | (highest > high + slack),
                lambda row: (
                    f'"{name}" is {shown[row]:.6g} at a time, but the network was trained on {low:.6g} to {high:.6g}'
                ),
            ),
            (
                counts > most,
                lambda row: (
                    f'"{name}" has {count_of(int(counts[row]), "record")} that change its course, but the network was '
                    f"trained with at most {most}"
                ),
            ),
            (
                change > (1 + RANGE_SLACK) * step + TIME_TOLERANCE * max(abs(low), abs(high)),
                lambda row: (
                    f'"{name}" changes by {change[row]:.6g} from one record to the next, but the network was trained '
                    f"on at most {step:.6g}"
                ),
            ),
        ]


def _summarize(design: Design, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number of informative records, largest change between two, smallest and largest value, ``(B,)`` each."""
    if design.time_covariates is None:
        raise ValueError("The design has no covariates in time.")
    kept, values = informative_records(design.time_covariates, name, design.times.amax(1))
    values = values.double()
    order = (~kept).long().argsort(dim=1, stable=True)
    there, ordered = kept.gather(1, order), values.gather(1, order)
    steps = torch.where(there[:, 1:], ordered.diff(dim=1).abs(), 0.0)
    change = steps.amax(1) if steps.shape[1] else torch.zeros_like(values[:, 0])
    low, high = torch.where(kept, values, torch.inf).amin(1), torch.where(kept, values, -torch.inf).amax(1)
    return kept.sum(1), change, low, high


def _reject_all(design: Design, words: str) -> CourseRule:
    return torch.ones(len(design), dtype=torch.bool, device=design.times.device), lambda _: words
