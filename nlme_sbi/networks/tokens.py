"""One individual as tokens: every measurement, dose, reset and change of a covariate, in a canonical order.

Event tables and arrays hold the same individual in many ways: rows in another order, additional doses (ADDL) written
out or not, records of covariates that repeat what holds anyway, padding. All of them give the same tokens here, in the
same order, so that networks treat them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.designs.censoring import censoring_codes
from nlme_sbi.designs.courses import informative_records
from nlme_sbi.individual_model.dosing.doses import write_out_doses
from nlme_sbi.individual_model.time_covariates import course_of, values_at
from nlme_sbi.types import Censoring, Design

# Order at one time: changes of covariates, resets, doses, measurements, then resets and doses that are recorded as
# following measurements.
_CHANGED, _RESET_FIRST, _DOSE_FIRST, _MEASURED, _RESET_AFTER, _DOSE_AFTER = range(6)
_NEVER = torch.inf


class TokenKind(IntEnum):
    """Kind of a token."""

    MEASUREMENT = 0
    DOSE = 1
    RESET = 2
    COVARIATE = 3


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens ``(B, N)`` in order of time, padding last; 0 where a column does not apply to a token.

    Args:
        present: False for padding.
        time: float64.
        kind: codes of :class:`TokenKind`.
        channel: the signal of a measurement, the compartment of a dose, the covariate of a record, all from 0.
        value: of a measurement, or of a censored one its limit: the upper one, else the lower one; of a record of a
            covariate.
        other: the lower limit of a measurement that has two, else ``value``.
        censoring: codes of :class:`nlme_sbi.types.Censoring`.
        amount: of a dose, as recorded.
        rate: of an infusion; 0 a bolus, -1 and -2 a modelled rate or duration.
        interval: between the past doses of a steady state.
        steady_state: 0, 1 or 2 (SS).
        along: for every token, the values of the covariates in time at its time.
    """

    present: Bool[Tensor, "B N"]
    time: Float[Tensor, "B N"]
    kind: Int[Tensor, "B N"]
    channel: Int[Tensor, "B N"]
    value: Float[Tensor, "B N"]
    other: Float[Tensor, "B N"]
    censoring: Int[Tensor, "B N"]
    amount: Float[Tensor, "B N"]
    rate: Float[Tensor, "B N"]
    interval: Float[Tensor, "B N"]
    steady_state: Int[Tensor, "B N"]
    along: Float[Tensor, "B N K"]

    def of_kind(self, kind: TokenKind) -> Bool[Tensor, "B N"]:
        """Which tokens are of a kind."""
        return self.present & (self.kind == int(kind))

    def __len__(self) -> int:
        return self.present.shape[0]


_WHOLE = ("present", "time", "kind", "channel", "censoring", "steady_state", "phase")
_NUMBERS = ("value", "other", "amount", "rate", "interval")


def tokens_of(
    values: Float[Tensor, "B T C"], design: Design, *, takes_doses: bool, along: Sequence[str] = ()
) -> Tokens:
    """The tokens of individuals.

    Args:
        values: measured; of a value that ``design.limits`` hide, only the limits are used.
        design: times, mask, doses, limits.
        takes_doses: whether doses are read.
        along: names of the covariates in time that are read.

    Raises:
        ValueError: doses or covariates in time are read and the design has none.
    """
    parts = [_measurements(values, design)]
    if takes_doses:
        parts += _events(design)
    if along:
        parts += _changes(design, along)
    concatenated = [torch.cat([part[name] for part in parts], dim=1) for name in parts[0]]
    columns = dict(zip(parts[0], concatenated, strict=True))
    order = _canonical_order(columns)
    width = max(1, int(columns["present"].sum(1).max()) if len(values) else 1)
    ordered = {name: column.gather(1, order)[:, :width] for name, column in columns.items()}
    del ordered["phase"]
    there = ordered["present"]
    zeroed = {name: torch.where(there, column, torch.zeros_like(column)) for name, column in ordered.items()}
    held = torch.zeros((*there.shape, 0), device=there.device)
    if along:
        found = values_at(course_of(design, along), zeroed["time"], along)
        held = torch.stack([torch.where(there, found[name], 0.0).float() for name in along], dim=2)
    return Tokens(**zeroed, along=held)


def last_before(
    mark: Bool[Tensor, "B N"], *columns: Float[Tensor, "B N"], inclusive: bool = False
) -> tuple[Bool[Tensor, "B N"], tuple[Tensor, ...]]:
    """For every token, whether a marked one comes before it, and ``columns`` at the last such one (0 without one).

    Args:
        mark: tokens to look for.
        columns: to look up.
        inclusive: whether a marked token counts as before itself.
    """
    place = torch.arange(mark.shape[1], device=mark.device).expand(mark.shape)
    last = torch.where(mark, place, -1).cummax(dim=1).values
    if not inclusive:
        last = torch.cat((torch.full_like(last[:, :1], -1), last[:, :-1]), dim=1)
    known = last >= 0
    source = last.clamp(min=0)
    return known, tuple(torch.where(known, column.gather(1, source), 0.0) for column in columns)


def _measurements(values: Float[Tensor, "B T C"], design: Design) -> dict[str, Tensor]:
    """One token for each measurement, with times and signals flattened."""
    shape = values.shape
    upper, lower, kind = values, values, torch.zeros(shape, dtype=torch.int64, device=values.device)
    if design.limits is not None:
        limits, hidden = design.limits, design.limits.hide(values)
        kind = torch.where(hidden, censoring_codes(limits), kind)
        upper = torch.where(hidden, limits.substitute.to(values.dtype), values)
        both = hidden & (kind == int(Censoring.INTERVAL))
        lower = torch.where(both, limits.lower.to(values.dtype), upper)
    count = torch.arange(shape[2], device=values.device).expand(shape)
    known = {
        "present": design.observed,
        "time": design.times.double()[..., None].expand(shape),
        "kind": torch.full_like(kind, int(TokenKind.MEASUREMENT)),
        "phase": torch.full_like(kind, _MEASURED),
        "channel": count,
        "value": upper.float(),
        "other": lower.float(),
        "censoring": kind,
    }
    return _fill_columns({name: column.flatten(1) for name, column in known.items()})


def _events(design: Design) -> list[dict[str, Tensor]]:
    """One token for each dose, additional ones written out, and one for each reset."""
    written = write_out_doses(design)
    doses = {
        "present": written.given,
        "time": written.time,
        "kind": torch.full_like(written.compartment, int(TokenKind.DOSE)),
        "phase": torch.where(written.follows, _DOSE_AFTER, _DOSE_FIRST),
        "channel": written.compartment - 1,
        "amount": written.amount.float(),
        "rate": written.rate.float(),
        "interval": torch.where(written.steady_state > 0, written.interval, 0.0).float(),
        "steady_state": written.steady_state,
    }
    there = torch.isfinite(written.forgets)
    zero = torch.zeros_like(there, dtype=torch.int64)
    resets = {
        "present": there,
        "time": torch.where(there, written.forgets, 0.0),
        "kind": zero + int(TokenKind.RESET),
        "phase": torch.where(written.reset_follows, _RESET_AFTER, _RESET_FIRST),
    }
    return [_fill_columns(doses), _fill_columns(resets)]


def _changes(design: Design, along: Sequence[str]) -> list[dict[str, Tensor]]:
    """One token for each informative record of a covariate in time."""
    course = course_of(design, along)
    found = []
    for channel, name in enumerate(along):
        kept, values = informative_records(course, name, design.times.amax(1))
        whole = torch.zeros_like(kept, dtype=torch.int64)
        found.append(
            _fill_columns(
                {
                    "present": kept,
                    "time": course.times.double(),
                    "kind": whole + int(TokenKind.COVARIATE),
                    "phase": whole + _CHANGED,
                    "channel": whole + channel,
                    "value": values.float(),
                }
            )
        )
    return found


def _fill_columns(known: dict[str, Tensor]) -> dict[str, Tensor]:
    """All columns, 0 where one is not given."""
    like = known["present"]
    whole = torch.zeros_like(like, dtype=torch.int64)
    columns = {**dict.fromkeys(_WHOLE, whole), **dict.fromkeys(_NUMBERS, whole.float())}
    return {**columns, **known}


def _canonical_order(columns: dict[str, Tensor]) -> Int[Tensor, "B N"]:
    """Order by time, then phase, then content, so that only equal tokens keep their original order."""
    time = torch.where(columns["present"], columns["time"], _NEVER)
    order = _sort_order([time, columns["phase"]])
    ordered, phase = time.gather(1, order), columns["phase"].gather(1, order)
    tied = (ordered[:, 1:] == ordered[:, :-1]) & (phase[:, 1:] == phase[:, :-1]) & (ordered[:, 1:] < _NEVER)
    if not bool(tied.any()):
        return order
    rest = ("channel", "value", "other", "censoring", "amount", "rate", "interval", "steady_state")
    return _sort_order([time, columns["phase"], *(columns[name] for name in rest)])


def _sort_order(keys: Sequence[Tensor]) -> Int[Tensor, "B N"]:
    """Lexicographic order of rows by the keys."""
    order = torch.arange(keys[0].shape[1], device=keys[0].device).expand(keys[0].shape)
    for key in reversed(keys):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order
