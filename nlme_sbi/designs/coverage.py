"""Comparison of the data's designs with simulated designs, in chunks of rows, with a reason for each row that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.dosing.doses import write_out_doses
from nlme_sbi.types import Design

Reasons = dict[int, str]
# Float32 keeps seven digits of a time; comparing four allows for rounded files.
TIME_TOLERANCE = 1e-4
# Amounts, rates and covariates may lie beyond the trained range by this share of it.
RANGE_SLACK = 0.1
_CELLS_AT_ONCE = 4_000_000


def reasons_by_chunk(design: Design, reasons_of: Callable[[Design], Reasons]) -> Reasons:
    """``reasons_of`` applied to chunks of rows, so that memory stays bounded; once where all rows are equal."""
    if _is_one_row(design):
        found = reasons_of(design[:1])
        return dict.fromkeys(range(len(design)), found[0]) if found else {}
    size = max(1, _CELLS_AT_ONCE // max(1, design.observed[0].numel()))
    return {
        start + row: reason
        for start in range(0, len(design), size)
        for row, reason in reasons_of(design[start : start + size]).items()
    }


def without_covariates(design: Design) -> Design:
    """The design's times, mask and doses only."""
    return Design(design.times, design.observed, events=design.events)


def first_reason(rules: Iterable[tuple[Bool[Tensor, " B"], Callable[[int], str]]]) -> Reasons:
    """For every row that breaks a rule, the sentence of the first rule that it breaks."""
    reasons: Reasons = {}
    for broken, words in rules:
        for row in torch.nonzero(broken).flatten().tolist():
            if row not in reasons:
                reasons[row] = f"{words(row)}."
    return reasons


def time_counts(design: Design) -> tuple[Bool[Tensor, "B T"], list[int]]:
    """Times with any measurement, and their number in every row."""
    measured = design.observed.any(dim=-1)
    return measured, measured.sum(dim=1).tolist()


def dose_records(design: Design) -> tuple[Bool[Tensor, "B E"], Float[Tensor, "B E"], Float[Tensor, "B E"]]:
    """Which entries are doses, their times and their amounts, float64, additional doses (ADDL) written out; of width 0
    where the design has no events."""
    if design.events is None:
        nothing = torch.zeros((len(design), 0), dtype=torch.float64, device=design.times.device)
        return nothing.bool(), nothing, nothing
    written = write_out_doses(design)
    return written.given, written.time, written.amount


def signals_rule(design: Design, signals: int) -> tuple[Bool[Tensor, " B"], Callable[[int], str]]:
    """Rule that every row breaks where the number of signals differs from that of training."""
    measured = design.observed.shape[2]
    every = torch.full((len(design),), measured != signals, device=design.times.device)
    return every, lambda _: f"{measured} signals, but the network was trained with {signals}"


def count_of(number: int, noun: str) -> str:
    """A number with its noun: ``3 times``, ``1 time``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_one_row(design: Design) -> bool:
    events, course = design.events, design.time_covariates
    others = (design.covariates, design.groups, design.occasion, events, design.limits, course)
    shared = design.times.stride(0) == 0 and design.observed.stride(0) == 0
    return len(design) > 1 and shared and all(other is None for other in others)
