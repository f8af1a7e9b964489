"""Doses of an event table: rows that are doses and resets, their amounts, rates and compartments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import counted, listed_at, quoted, typed
from nlme_sbi.io.meanings import ROUTE_COLUMNS, plain_name
from nlme_sbi.io.tables import Table, canonical_form, check_number
from nlme_sbi.types import EventKind, Events

_OBSERVATION, _DOSE, _OTHER, _RESET, _RESET_DOSE = 0, 1, 2, 3, 4
_LAST_SHORT_CODE = 9901  # EVID 101, 201, ..: RxODE's "bolus into compartment 1, 2, .."


@dataclass(frozen=True, eq=False)
class Kinds:
    """Kind of each row, ``(R,)``.

    Args:
        dose: whether it is a dose.
        reset: whether it empties the compartments, before its dose if it has one.
        measurement: whether it is a measurement or, in a plan, a time to predict.
        compartment: of the dose by RxODE's code; 0 without such a code.
        notes: of the reader, for the user.
    """

    dose: Bool[np.ndarray, " R"]
    reset: Bool[np.ndarray, " R"]
    measurement: Bool[np.ndarray, " R"]
    compartment: Int[np.ndarray, " R"]
    notes: tuple[str, ...] = ()


def read_kinds(table: Table, *, evid: str, amt: str, dv: str, mdv: str, plan: bool) -> Kinds:
    """Read the kind of each row from EVID or, without that column, from AMT as in NONMEM: an amount is a dose.

    Raises:
        ValueError: unknown event codes; MDV codes other than 0 and 1; without EVID, rows with an amount and a value.
    """
    left_out = _left_out_by_mdv(table, mdv)
    if not table.has(evid):
        return _kinds_by_amount(table, amt=amt, dv=dv, evid=evid, left_out=left_out, plan=plan)
    codes = table.complete_numbers(evid, noun="event codes")
    rxode = (codes > 100) & (codes <= _LAST_SHORT_CODE) & (codes % 100 == 1)
    dose = rxode | np.isin(codes, (_DOSE, _RESET_DOSE))
    reset = np.isin(codes, (_RESET, _RESET_DOSE))
    other = codes == _OTHER
    known = dose | reset | other | (codes == _OBSERVATION)
    if not known.all():
        first = codes[np.argmax(~known)]
        long_code = " (a dose in RxODE's long code)" if first >= 200 and float(first).is_integer() else ""
        raise table.refusal(
            ~known,
            evid,
            what="event codes are neither 0 (measurement), 1 (dose), 2 (other), 3 (reset), 4 (reset and dose) nor 101, "
            f"201, ... (RxODE's bolus into compartment 1, 2, ...), and EVID {first:g}{long_code} is unknown",
            remedy="Write these rows with EVID 1 and RATE, SS, II and CMT, as NONMEM and nlmixr2 read them.",
        )
    notes = []
    if table.has(dv):
        ignored = (dose | reset) & ~left_out & _is_value(table, dv)
        if ignored.any():
            notes.append(f"{dv} of {counted(ignored, 'dose')} is not read: a dose is not a measurement")
        away = ~dose & ~reset & left_out & _is_value(table, dv)
        if away.any() and not plan:
            notes.append(f"left out by {mdv} 1: {counted(away, 'measurement')}")
        if other.any() and not plan:
            notes.append(f"{counted(other, 'row')} with {evid} 2 are neither doses nor measurements and are left out")
    measurement = ~dose & ~reset & (True if plan else ~left_out & ~other)
    return Kinds(dose, reset, measurement, np.where(rxode, codes // 100, 0).astype(np.int64), tuple(notes))


def _kinds_by_amount(
    table: Table, *, amt: str, dv: str, evid: str, left_out: Bool[np.ndarray, " R"], plan: bool
) -> Kinds:
    if not table.has(amt):
        table.position(evid)  # raises the refusal
    dose = np.nan_to_num(table.numbers(amt, noun="amounts")) > 0
    if table.has(dv):
        both = dose & ~left_out & _is_value(table, dv)
        if both.any():
            raise table.refusal(
                both,
                dv,
                what=f"rows have an amount and a value, and there is no column {quoted(evid)} to tell which they are",
                remedy=f"Add {evid}: 1 on doses, 0 on measurements; a dose and a measurement are two rows.",
            )
    note = f"no column {evid}: {counted(dose, 'row')} with {amt} above 0 taken as doses, the others as measurements"
    nothing = np.zeros(len(table), dtype=bool)
    return Kinds(dose, nothing, ~dose if plan else ~dose & ~left_out, nothing.astype(np.int64), (note,))


def _is_value(table: Table, column: str) -> Bool[np.ndarray, " R"]:
    parsed = table.parse(column)
    found: Bool[np.ndarray, " R"] = ~parsed.missing & (parsed.text | (parsed.values != 0))
    return found


def _left_out_by_mdv(table: Table, mdv: str) -> Bool[np.ndarray, " R"]:
    """Rows that MDV 1 marks as not measured; none without that column."""
    if not table.has(mdv):
        return np.zeros(len(table), dtype=bool)
    codes = table.numbers(mdv, noun="MDV codes")
    other = ~np.isin(codes, (0, 1)) & ~np.isnan(codes)
    if other.any():
        raise table.refusal(other, mdv, what="MDV codes are neither 0 nor 1", remedy="Correct them.")
    set_aside: Bool[np.ndarray, " R"] = codes == 1
    return set_aside


@dataclass(frozen=True)
class DoseColumns:
    """The file's names of the columns of doses, and the factors of amounts and times."""

    amt: str
    evid: str
    rate: str
    tinf: str
    ii: str
    addl: str
    ss: str
    dose_scale: float | int
    time_scale: float | int

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that may be missing."""
        return (self.rate, self.tinf, self.ii, self.addl, self.ss)


def dose_events(
    table: Table,
    columns: DoseColumns,
    kinds: Kinds,
    *,
    compartments: Int[np.ndarray, " R"],
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"],
    ordered: bool,
) -> tuple[Events, tuple[str, ...]]:
    """All doses and resets of every individual, in the order of the rows, and notes.

    Args:
        table: the rows.
        columns: of doses.
        kinds: of the rows.
        compartments: that each dose enters.
        individual: ``(R,)`` codes into ``ids``.
        ids: of the individuals.
        times: ``(R,)``, scaled.
        ordered: whether rows at one time are in the order of the events.

    Raises:
        ValueError: individuals without a dose, or impossible amounts, rates, durations, intervals or codes.
    """
    factor = check_number("dose_scale", columns.dose_scale, positive=True)
    clock = check_number("time_scale", columns.time_scale, positive=True)
    read = _DoseNumbers.read(table, columns)
    read.refuse(table, columns, kinds.dose)
    given = kinds.dose | kinds.reset
    without = np.flatnonzero(np.bincount(individual[kinds.dose], minlength=len(ids)) == 0)
    if len(without):
        raise ValueError(
            f"{table.name}: {len(without)} of {len(ids)} individuals have no dose ({columns.evid} 1): "
            f"{listed_at(ids, without)}. Add it ({columns.evid} 1 and {columns.amt} 0 where nothing was given), or "
            "read tables without any dose as data=long_table."
        )
    rate = read.rates(kinds.dose)
    # A measurement in a row before a dose of the same time was taken before it.
    place = np.arange(len(table))
    follows, ties = _after_measurements(individual, times, kinds.measurement, given, place)
    rows = np.flatnonzero(given)
    rows = rows[np.lexsort((rows, times[rows], individual[rows]))]
    who = individual[rows]
    counts = np.bincount(who, minlength=len(ids))
    column = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max())

    def padded(values: np.ndarray, fill: float | int) -> torch.Tensor:
        found = np.full((len(ids), width), fill, dtype=values.dtype)
        found[who, column] = values[rows]
        return torch.from_numpy(found)

    last = np.zeros(len(ids))
    np.maximum.at(last, individual, times)
    kind = np.select(
        [kinds.dose & kinds.reset, kinds.reset, kinds.dose],
        [int(EventKind.RESET_DOSE), int(EventKind.RESET), int(EventKind.DOSE)],
        int(EventKind.NONE),
    ).astype(np.int64)
    time = padded(times.astype(np.float64), np.nan)
    events = Events(
        time=torch.where(torch.isnan(time), torch.from_numpy(last)[:, None], time),
        kind=padded(kind, int(EventKind.NONE)),
        amount=padded(np.where(kinds.dose, read.amount, 0.0) * factor, 0.0),
        rate=padded(np.where(rate > 0, rate * factor / clock, rate), 0.0),
        interval=padded(np.where(kinds.dose, read.interval, 0.0) * clock, 0.0),
        additional=padded(np.where(kinds.dose, read.additional, 0).astype(np.int64), 0),
        steady_state=padded(np.where(kinds.dose, read.steady, 0).astype(np.int64), 0),
        compartment=padded(np.where(kinds.dose, compartments, 1), 1),
        follows=padded(follows, 0) if ordered and follows.any() else None,
    )
    notes = []
    if ties.any():
        notes.append(
            f"{counted(ties, 'measurement')} at the time of a dose: "
            + ("those in rows before the dose count as before it" if ordered else "counted as after it")
        )
    return events, tuple(notes)


def _after_measurements(
    individual: np.ndarray, times: np.ndarray, measured: np.ndarray, given: np.ndarray, place: np.ndarray
) -> tuple[Bool[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
    """Doses in rows after a measurement of the same individual and time, and measurements at the time of a dose."""
    frame = pd.DataFrame({"who": individual, "when": times})
    groups = frame.groupby(["who", "when"], sort=False)
    first = pd.Series(np.where(measured, place, len(place))).groupby(groups.ngroup()).transform("min").to_numpy()
    dosed = pd.Series(given).groupby(groups.ngroup()).transform("any").to_numpy()
    follows: Bool[np.ndarray, " R"] = given & (first < place)
    return follows, measured & dosed


@dataclass(frozen=True, eq=False)
class _DoseNumbers:
    """Numbers of the rows, ``(R,)``, 0 where a column or cell is missing; ``amount`` is NaN there."""

    amount: Float[np.ndarray, " R"]
    rate: Float[np.ndarray, " R"]
    duration: Float[np.ndarray, " R"]
    interval: Float[np.ndarray, " R"]
    additional: Float[np.ndarray, " R"]
    steady: Float[np.ndarray, " R"]

    @classmethod
    def read(cls, table: Table, columns: DoseColumns) -> _DoseNumbers:
        def numbers(column: str, noun: str) -> Float[np.ndarray, " R"]:
            if not table.has(column):
                return np.zeros(len(table))
            found: Float[np.ndarray, " R"] = np.nan_to_num(table.numbers(column, noun=noun), nan=0.0)
            return found

        return cls(
            amount=table.numbers(columns.amt, noun="amounts"),
            rate=numbers(columns.rate, "rates"),
            duration=numbers(columns.tinf, "durations of infusions"),
            interval=numbers(columns.ii, "intervals between doses"),
            additional=numbers(columns.addl, "numbers of additional doses"),
            steady=numbers(columns.ss, "steady-state codes"),
        )

    def rates(self, dose: Bool[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """RATE, or the amount over the duration."""
        lasting = dose & (self.duration > 0)
        over = np.divide(np.nan_to_num(self.amount), self.duration, out=np.zeros(len(dose)), where=lasting)
        found: Float[np.ndarray, " R"] = np.where(lasting, over, np.where(dose, self.rate, 0.0))
        return found

    def refuse(self, table: Table, columns: DoseColumns, dose: Bool[np.ndarray, " R"]) -> None:
        constant = dose & (self.rate > 0) & (self.steady > 0) & ~(np.nan_to_num(self.amount) > 0)
        evid, amt = columns.evid, columns.amt
        rules: list[tuple[Bool[np.ndarray, " R"], str, str, str]] = [
            (
                dose & np.isnan(self.amount) & ~constant,
                amt,
                "rows are doses without an amount",
                f"Fill in {amt} on every row with {evid} 1.",
            ),
            (np.nan_to_num(self.amount) < 0, amt, "amounts are negative", "Correct them; a dose is 0 or more."),
            (
                ~dose & (np.nan_to_num(self.amount) > 0),
                amt,
                f"rows have an amount but {evid} 0, so that they are neither doses nor measurements",
                f"Set {evid} 1 on doses, or {amt} 0 on measurements.",
            ),
            *(
                (
                    ~dose & (values != 0),
                    column,
                    f"rows are not doses but have a {column}, which belongs to a dose",
                    f"Set {evid} 1 on doses, or {column} 0 on the others.",
                )
                for column, values in (
                    (columns.rate, self.rate),
                    (columns.tinf, self.duration),
                    (columns.addl, self.additional),
                    (columns.ss, self.steady),
                )
            ),
            (
                dose & (self.rate < 0) & ~np.isin(self.rate, (-1, -2)),
                columns.rate,
                "rates are negative and neither -1 (modelled rate) nor -2 (modelled duration)",
                "Correct them.",
            ),
            (
                dose & (self.rate > 0) & (np.nan_to_num(self.amount) == 0) & ~constant,
                columns.rate,
                "infusions have no amount",
                f"Give {amt}; only at steady state ({columns.ss} 1) is an infusion without an amount a constant one.",
            ),
            (dose & (self.duration < 0), columns.tinf, "durations are negative", "Correct them."),
            (
                dose & (self.duration > 0) & (self.rate != 0),
                columns.tinf,
                f"infusions have both {columns.rate} and {columns.tinf}",
                f"Give one of them, or pass {typed('unused', [columns.tinf])} to use {columns.rate}.",
            ),
            (dose & (self.interval < 0), columns.ii, "intervals are negative", "Correct them."),
            (
                dose & ((self.additional < 0) | (self.additional != np.floor(self.additional))),
                columns.addl,
                "numbers of additional doses are negative or not whole",
                "Correct them.",
            ),
            (
                dose & (self.additional > 0) & (self.interval == 0),
                columns.addl,
                f"doses have additional ones ({columns.addl}) but no interval ({columns.ii})",
                f"Give {columns.ii}, the time between doses.",
            ),
            (
                dose & ~np.isin(self.steady, (0, 1, 2)),
                columns.ss,
                "steady-state codes are neither 0, 1 nor 2",
                "Correct them: 1 is a steady state that replaces earlier doses, 2 one that is added to them.",
            ),
            (
                dose & (self.steady > 0) & (self.interval == 0) & ~constant,
                columns.ss,
                f"doses are at steady state ({columns.ss}) without an interval ({columns.ii})",
                f"Give {columns.ii}, the time between the doses before.",
            ),
        ]
        for bad, column, what, remedy in rules:
            if bad.any():
                raise table.refusal(bad, column, what=what, remedy=remedy)


def dose_compartments(
    table: Table, kinds: Kinds, compartments: Mapping[Any, int]
) -> tuple[Int[np.ndarray, " R"], tuple[str, ...]]:
    """The simulator's compartment that each dose enters, counted from 1, and the columns it was read from.

    Args:
        table: the rows.
        kinds: of the rows.
        compartments: number of the simulator's compartment for levels of CMT, ADM or ROUTE; numbers that are not listed
            are taken as they are, and 0 or an empty cell as 1.

    Raises:
        ValueError: a compartment has a name without a number, or two columns contradict each other.
    """
    numbers = {
        canonical_form(str(level).strip()): _check_compartment(level, goal) for level, goal in compartments.items()
    }
    routes = [name for name in table.columns if plain_name(name) in ROUTE_COLUMNS]
    found = np.where(kinds.compartment > 0, kinds.compartment, 1)
    decided = kinds.compartment > 0
    found_levels: set[str] = set()
    for name in routes:
        levels = table.levels(name)
        found_levels |= {str(level) for level in levels[kinds.dose]}
        goals = np.array([_compartment_number(level, numbers) for level in levels])
        word = kinds.dose & (goals < 0)
        if word.any():
            level = str(levels[int(np.argmax(word))])
            raise table.refusal(
                word,
                name,
                what=f"rows are doses into a compartment without a number ({name})",
                remedy=f"Give the number of the simulator's compartment: {typed('compartments', {level: 1})}.",
            )
        says = kinds.dose & (goals > 0)
        other = says & decided & (goals != found)
        if other.any():
            raise table.refusal(
                other,
                name,
                what=f"doses have another compartment in {name} than in the columns before it or in EVID",
                remedy=f"Pass {typed('unused', [name])} to leave {name} out, or map its levels, "
                f"{typed('compartments', {str(levels[int(np.argmax(other))]): int(found[int(np.argmax(other))])})}.",
            )
        found = np.where(says, goals, found)
        decided |= says
    unknown = [level for level in numbers if level not in found_levels]
    if unknown and routes:
        raise ValueError(
            f"data.compartments names {quoted(unknown[0])}, but the doses of {table.name} have "
            f"{', '.join(sorted(found_levels))} in {', '.join(routes)}."
        )
    return found.astype(np.int64), tuple(routes)


def _check_compartment(level: object, goal: object) -> int:
    if isinstance(goal, bool) or not isinstance(goal, int) or goal < 1:
        raise ValueError(f"data.compartments.{level} must be the number of a compartment, 1 or more; got {goal!r}.")
    return goal


def _compartment_number(level: object, numbers: Mapping[str, int]) -> int:
    """Number of a compartment; 0 for an empty cell, -1 for an unknown name."""
    text = str(level)
    if text in numbers:
        return numbers[text]
    if text in ("", "0"):
        return 0
    return int(text) if text.isdigit() else -1
