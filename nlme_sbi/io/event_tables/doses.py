"""Doses of an event table: which rows are doses, and the one that each individual gets for now."""

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
from nlme_sbi.io.tables import Table, number_option, same_form
from nlme_sbi.types import Events

_OBSERVATION, _OTHER = 0, 2
_DOSES = (1, 101)  # 101 is RxODE's "dose to compartment 1"
_CODES = {2: "another event", 3: "a reset", 4: "a reset and dose"}


@dataclass(frozen=True, eq=False)
class Kinds:
    """What each row is, ``(R,)``: a dose, a place for a measurement, or (in a plan) a time only; notes."""

    dose: Bool[np.ndarray, " R"]
    measurement: Bool[np.ndarray, " R"]
    notes: tuple[str, ...] = ()


def kinds_of(table: Table, *, evid: str, amt: str, dv: str, mdv: str, plan: bool) -> Kinds:
    """Doses and measurements by EVID or, without that column, by AMT as NONMEM does: an amount is a dose.

    Raises:
        ValueError: codes of events that are not implemented; MDV codes other than 0 and 1; without EVID, rows with an
            amount and a value.
    """
    aside = _set_aside(table, mdv)
    if not table.has(evid):
        return _kinds_by_amount(table, amt=amt, dv=dv, evid=evid, aside=aside, plan=plan)
    codes = table.complete_numbers(evid, noun="event codes")
    dose = np.isin(codes, _DOSES)
    known = dose | (codes == _OBSERVATION) | (plan & (codes == _OTHER))
    if not known.all():
        first = codes[np.argmax(~known)]
        meaning = f" ({_CODES[int(first)]})" if first in _CODES else _rxode(first)
        what = (
            f"event codes are neither 0 (measurement) nor 1 or 101 (dose), and EVID {first:g}{meaning} is not "
            "implemented yet"
        )
        leave = typed("skip", {evid: f"{first:g}"})
        if first == _OTHER:
            remedy = f"Pass {leave} to leave these rows out; they hold no measurement and no dose."
        else:
            remedy = "Leave these individuals out, or rewrite the rows as measurements and one dose."
        raise table.refusal(~known, evid, what=what, remedy=remedy)
    notes = []
    if table.has(dv):
        ignored = dose & ~aside & _is_value(table, dv)
        if ignored.any():
            notes.append(f"{dv} of {counted(ignored, 'dose')} is not read: a dose is no measurement")
        away = ~dose & aside & _is_value(table, dv)
        if away.any() and not plan:
            notes.append(f"set aside by {mdv} 1: {counted(away, 'measurement')}")
    return Kinds(dose, ~dose if plan else ~dose & ~aside, tuple(notes))


def _rxode(code: float) -> str:
    """RxODE packs infusion, compartment and steady state into one number."""
    return " (a dose in RxODE's long code)" if code >= 200 and float(code).is_integer() else ""


def _kinds_by_amount(table: Table, *, amt: str, dv: str, evid: str, aside: Bool[np.ndarray, " R"], plan: bool) -> Kinds:
    if not table.has(amt):
        table.position(evid)  # says what is missing
    dose = np.nan_to_num(table.numbers(amt, noun="amounts")) > 0
    if table.has(dv):
        both = dose & ~aside & _is_value(table, dv)
        if both.any():
            raise table.refusal(
                both,
                dv,
                what=f"rows have an amount and a value, and there is no column {quoted(evid)} that tells what they are",
                remedy=f"Add {evid}: 1 on doses, 0 on measurements; a dose and a measurement are two rows.",
            )
    note = f"no column {evid}: {counted(dose, 'row')} with {amt} above 0 taken as doses, the others as measurements"
    return Kinds(dose, ~dose if plan else ~dose & ~aside, (note,))


def _is_value(table: Table, column: str) -> Bool[np.ndarray, " R"]:
    parsed = table.parse(column)
    found: Bool[np.ndarray, " R"] = ~parsed.missing & (parsed.text | (parsed.values != 0))
    return found


def _set_aside(table: Table, mdv: str) -> Bool[np.ndarray, " R"]:
    """Rows whose DV is declared no measurement by MDV 1; none without that column."""
    if not table.has(mdv):
        return np.zeros(len(table), dtype=bool)
    codes = table.numbers(mdv, noun="MDV codes")
    other = ~np.isin(codes, (0, 1)) & ~np.isnan(codes)
    if other.any():
        raise table.refusal(other, mdv, what="MDV codes are neither 0 nor 1", remedy="Correct them.")
    set_aside: Bool[np.ndarray, " R"] = codes == 1
    return set_aside


def single_doses(
    table: Table,
    *,
    amt: str,
    evid: str,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    times: Float[np.ndarray, " R"],
    is_dose: Bool[np.ndarray, " R"],
    scale: float | int,
) -> Events:
    """The one dose of every individual, times ``scale``.

    Raises:
        ValueError: individuals with none or more, and impossible amounts.
    """
    factor = number_option("dose_scale", scale, positive=True)
    amounts = table.numbers(amt, noun="amounts")
    _refuse_amounts(table, amt, amounts, is_dose)
    counts = np.bincount(individual[is_dose], minlength=len(ids))
    if (counts > 1).any():
        again = is_dose.copy()
        again[is_dose] = pd.Series(individual[is_dose]).duplicated().to_numpy()
        raise table.refusal(
            again,
            amt,
            what=f"rows are second or later doses of an individual (of {listed_at(ids, np.flatnonzero(counts > 1))})",
            remedy="One dose per individual for now; keep only the first and the measurements until the next.",
        )
    without = np.flatnonzero(counts == 0)
    if len(without):
        raise ValueError(
            f"{table.name}: {len(without)} of {len(ids)} individuals have no dose ({evid} 1): "
            f"{listed_at(ids, without)}. Add it ({evid} 1 and {amt} 0 where nothing was given), or read tables without "
            "any dose as data=long_table."
        )
    order = np.argsort(individual[is_dose])
    return Events.single_dose(
        torch.from_numpy(times[is_dose][order]), torch.from_numpy(amounts[is_dose][order] * factor), compartment=1
    )


def _refuse_amounts(table: Table, amt: str, amounts: Float[np.ndarray, " R"], is_dose: Bool[np.ndarray, " R"]) -> None:
    rules = (
        (is_dose & np.isnan(amounts), "rows are doses without an amount", f"Fill in {amt} on every row with EVID 1."),
        (amounts < 0, "amounts are negative", "Correct them; a dose is 0 or more."),
        (
            ~is_dose & (amounts > 0),
            "rows have an amount but EVID 0, so neither a dose nor a measurement is meant",
            f"Set EVID 1 on doses, or {amt} 0 on measurements.",
        ),
    )
    for bad, what, remedy in rules:
        if bad.any():
            raise table.refusal(bad, amt, what=what, remedy=remedy)


def refuse_other_compartments(
    table: Table, is_dose: Bool[np.ndarray, " R"], compartments: Mapping[Any, int]
) -> tuple[str, ...]:
    """Refuse doses that go elsewhere than into the simulator's compartment 1; the columns that tell.

    Args:
        table: the rows.
        is_dose: which of them are doses.
        compartments: for levels of CMT, ADM or ROUTE the number of the simulator's compartment.

    Raises:
        ValueError: another compartment or route, or one by a word that nobody gave a number for.
    """
    numbers = {same_form(str(level).strip()): goal for level, goal in compartments.items()}
    told = [name for name in table.columns if plain_name(name) in ROUTE_COLUMNS]
    for name in told:
        levels = table.levels(name)
        goals = np.array([str(numbers.get(level, level)) for level in levels], dtype=object)
        bad = is_dose & ~np.isin(goals, ("", "0", "1"))
        if bad.any():
            level = str(levels[int(np.argmax(bad))])
            raise table.refusal(
                bad,
                name,
                what=f"rows dose another {'compartment' if plain_name(name)[:1] == 'c' else 'way'} ({name})",
                remedy=f"If {name} {quoted(level)} is where the simulator's dose goes, pass "
                f"{typed('compartments', {level: 1})}; other places are not implemented yet.",
            )
    return tuple(told)
