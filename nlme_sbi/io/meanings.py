"""Columns that are not read but would change the meaning of a row: they are refused, never ignored.

The names are those of NONMEM, Monolix, nlmixr2/rxode2 and common data sets; letter case and punctuation do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import listed, quoted, typed
from nlme_sbi.io.tables import Cells, Table

SIGNAL_COLUMNS = (
    "dvid",
    "ytype",
    "dvtype",
    "dvname",
    "yname",
    "dvn",
    "obsid",
    "obsname",
    "analyte",
    "endpoint",
    "paramcd",
)
ROUTE_COLUMNS = ("cmt", "compartment", "adm", "admid", "admin", "administration", "route", "admroute")
_FLAGS = (
    *(
        "c",
        "ignore",
        "ignored",
        "ign",
        "exclude",
        "excluded",
        "excl",
        "exclusion",
        "exclfl",
        "excfl",
        "omit",
        "omitted",
    ),
    *("drop", "dropped", "flag", "flagged", "outlier", "outliers", "outfl", "delete", "deleted", "skip", "reject"),
    *("rejected", "bad", "invalid"),
)
_KEEPS = ("include", "included", "incl", "inclfl", "keep", "kept", "use", "used", "valid", "ok", "anlfl", "anl01fl")
_BEYOND = (
    *("blq", "bloq", "bql", "blqfl", "bloqfl", "bqlfl", "blqflag", "bloqflag", "lloqfl", "lloqflag", "loqfl", "blod"),
    *("alq", "aloq", "aloqfl", "auloq", "uloqfl", "censor", "censored", "censoring", "censfl", "cen"),
)
_LOW_LIMITS = ("lloq", "loq", "lod", "lloqn", "lloqval", "loqval", "quantlimit")
_HIGH_LIMITS = ("uloq", "uloqn")
# Meaning of a column of this name in other programs, where it is not 0.
_NOT_ZERO = {
    **dict.fromkeys(("rate",), "infusions"),
    **dict.fromkeys(("dur", "duration", "tinf", "tinfusion", "infdur", "infusionduration"), "infusions"),
    **dict.fromkeys(("addl", "ndose", "ndoses", "nd"), "additional doses"),
    **dict.fromkeys(("ss", "steadystate"), "steady-state doses"),
    **dict.fromkeys(("alag", "alag1", "tlag", "lagtime"), "lagged doses"),
    **dict.fromkeys(("cont", "pcmt", "call"), "another way of reading this record"),
}
_ROLE_OF = {
    **dict.fromkeys(("rate",), "data.columns.rate"),
    **dict.fromkeys(("dur", "duration", "tinf", "tinfusion", "infdur", "infusionduration"), "data.columns.tinf"),
    **dict.fromkeys(("addl", "ndose", "ndoses", "nd"), "data.columns.addl"),
    **dict.fromkeys(("ss", "steadystate"), "data.columns.ss"),
}
_OCCASIONS = ("occ", "occasion", "occasions", "iov", "period", "cycle", "visit", "visitn", "visitnum", "sequence")
_DATES = ("date", "dat1", "dat2", "dat3", "dat", "day", "studyday", "datetime", "visitdate", "visday")
_UNITS = ("unit", "units", "dvu", "dvunit", "dvunits", "amtu", "amtunit", "amtunits", "timeunit", "timeunits", "timu")
_CORRELATED = ("l2",)
_NOTHING = ("", "0", "n", "no", "f", "false")


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table, for rules that depend on individuals and measurements."""

    individual: Int[np.ndarray, " R"]
    ids: Sequence[str]
    measured: Bool[np.ndarray, " R"]
    value: str

    @property
    def all_rows(self) -> Bool[np.ndarray, " R"]:
        return np.ones(len(self.individual), dtype=bool)


def plain_name(column: str) -> str:
    """A column's name without case and punctuation: ``DVID``, ``dv_id`` and ``#DVID`` are the same."""
    return re.sub(r"[^a-z0-9]", "", column.casefold())


def refuse_other_meanings(table: Table, rows: Rows, *, used: Sequence[str], doses: bool) -> list[str]:
    """Refuse unused columns that would change the meaning of rows, and list the others in a note.

    Args:
        table: the rows that are read.
        rows: their individuals and measurements.
        used: columns that the reader uses.
        doses: whether rows may be doses; if not, amounts are refused.

    Returns:
        A note with the names of unused columns; empty where there are none.

    Raises:
        ValueError: a column changes the meaning of a row; with column, row and remedy.
    """
    positions = {table.position(column) for column in used}
    unused = []
    for place, column in enumerate(table.columns):
        if place in positions or not column:
            continue
        if table.columns.count(column) > 1:  # it cannot be looked up by name
            raise ValueError(f"{table.name} has several columns {quoted(column)}; rename all but one.")
        rule = _rule_of(plain_name(column), doses=doses)
        if rule is not None:
            rule(table, column, rows)
        unused.append(column)
    return [f"not used: {', '.join(unused)}"] if unused else []


Rule = Callable[[Table, str, Rows], None]


def _rule_of(name: str, *, doses: bool) -> Rule | None:
    rules: list[tuple[Sequence[str], Rule]] = [
        (_FLAGS, _refuse_flags),
        (_KEEPS, _refuse_keeps),
        (_BEYOND, _refuse_beyond),
        (("cens", "limit"), _refuse_censoring),
        (_LOW_LIMITS, _refuse_below),
        (_HIGH_LIMITS, _refuse_above),
        (tuple(_NOT_ZERO), _refuse_not_zero),
        (_OCCASIONS, _refuse_occasions),
        (_DATES, _refuse_dates),
        (_UNITS, _refuse_several_units),
        (_CORRELATED, _refuse_correlated),
        (("mdv", "evid"), _refuse_flags),
    ]
    if not doses:
        rules += [(("amt", "amount", "dose"), _refuse_amounts), (SIGNAL_COLUMNS, _refuse_signals)]
    return next((rule for names, rule in rules if name in names), None)


def _unused(column: str) -> str:
    return f"{typed('unused', [column])} if it means nothing here"


def _levels(table: Table, column: str) -> Cells:
    return table.levels(column)


def _is_nothing(levels: Cells) -> Bool[np.ndarray, " R"]:
    return np.isin(pd.Series(levels, dtype=object).str.casefold().to_numpy(dtype=object), _NOTHING)


def _refuse_flags(table: Table, column: str, rows: Rows) -> None:
    del rows
    levels = _levels(table, column)
    bad = ~_is_nothing(levels)
    if bad.any():
        marks = [str(level) for level in pd.unique(levels[bad])]
        if bad.all() and len(marks) == 1:
            return  # the same mark on every row distinguishes nothing
        skip = typed("skip", {column: marks[0] if len(marks) == 1 else marks[:8]})
        raise table.refusal(
            bad,
            column,
            what=f"rows are marked in the column {quoted(column)}, and it is unknown whether to use them",
            remedy=f"Pass {skip} to leave them out, or {_unused(column)}.",
        )


def _refuse_keeps(table: Table, column: str, rows: Rows) -> None:
    del rows
    levels = _levels(table, column)
    bad = _is_nothing(levels)
    if bad.any() and not bad.all():
        marks = [str(level) for level in pd.unique(levels[~bad])]
        only = typed("only", {column: marks[0] if len(marks) == 1 else marks[:8]})
        raise table.refusal(
            bad,
            column,
            what=f"rows are not marked in the column {quoted(column)}, and it is unknown whether to use them",
            remedy=f"Pass {only} to leave them out, or {_unused(column)}.",
        )


def _refuse_beyond(table: Table, column: str, rows: Rows) -> None:
    bad = ~_is_nothing(_levels(table, column)) & rows.all_rows
    if bad.any():
        levels = [str(level) for level in pd.unique(_levels(table, column)[bad])]
        raise table.refusal(
            bad,
            column,
            what=f"rows are marked as beyond a limit of quantification ({column})",
            remedy=f"Where {rows.value} holds the limit on these rows and {column} is 1 (below) or -1 (above), pass "
            f"{typed('columns.cens', column)}; to leave them out, {typed('skip', {column: levels})}; or "
            f"{_unused(column)}.",
        )


def _refuse_censoring(table: Table, column: str, rows: Rows) -> None:
    """Refuse columns CENS or LIMIT that are not read as such."""
    bad = ~_is_nothing(_levels(table, column)) & rows.measured
    if plain_name(column) == "limit":
        bad = (_levels(table, column) != "") & rows.measured
    if bad.any():
        raise table.refusal(
            bad,
            column,
            what=f"rows have a {column}, which has a meaning only with a column of censoring codes",
            remedy=f"Name that column, {typed('columns.cens', 'NAME')}, or pass {_unused(column)}.",
        )


def _limit_rule(table: Table, column: str, rows: Rows, *, below: bool) -> None:
    parsed = table.parse(column)
    limits = np.where(parsed.text | parsed.infinite, np.nan, parsed.values)
    values = table.parse(rows.value).values if table.has(rows.value) else np.full(len(table), np.nan)
    beyond = values <= limits if below else values >= limits
    bad: Bool[np.ndarray, " R"] = beyond & rows.measured
    if bad.any():
        side = "below" if below else "above"
        raise table.refusal(
            bad,
            rows.value,
            what=f"values are at or {side} the limit of quantification in {quoted(column)}",
            remedy=f"Write {1 if below else -1} into a column CENS on these rows, with the limit in {rows.value}, or "
            f"pass {typed('unused', [column])} if they were measured as they stand.",
        )


def _refuse_below(table: Table, column: str, rows: Rows) -> None:
    if not table.has("CENS"):  # with codes, the column is only information
        _limit_rule(table, column, rows, below=True)


def _refuse_above(table: Table, column: str, rows: Rows) -> None:
    if not table.has("CENS"):
        _limit_rule(table, column, rows, below=False)


def _refuse_not_zero(table: Table, column: str, rows: Rows) -> None:
    del rows
    bad = ~_is_nothing(_levels(table, column))
    if bad.any():
        feature = _NOT_ZERO[plain_name(column)]
        raise table.refusal(
            bad,
            column,
            what=f"rows have {feature} ({column})",
            remedy=f"{_remedy_for(plain_name(column))}, or pass {_unused(column)}.",
        )


def _remedy_for(name: str) -> str:
    if name in _ROLE_OF:
        return f"Read the table as data=event_table with {_ROLE_OF[name]} naming this column"
    return "Leave these individuals out, or include it in the model"


def _refuse_occasions(table: Table, column: str, rows: Rows) -> None:
    bad = _differs_from_first(_levels(table, column), rows)
    if bad.any():
        raise table.refusal(
            bad,
            column,
            what=f"rows are of another occasion than the first of their individual ({column}), and nothing says what "
            "differs between occasions",
            remedy=f"Pass {typed('time_covariates', [column])} and, for parameters that vary between occasions, such "
            f"as CL of a simulator with doses, 'simulator.time_covariates.CL={{{column}: {{form: occasion, occasions: "
            f"{len(set(_levels(table, column)))}}}}}'; or {typed('unused', [column])} to treat all rows of an "
            f"individual alike; or keep one occasion, for example "
            f"{typed('only', {column: str(_levels(table, column)[0])})}.",
        )


def _refuse_dates(table: Table, column: str, rows: Rows) -> None:
    bad = _differs_from_first(_levels(table, column), rows)
    if bad.any():
        raise table.refusal(
            bad,
            column,
            what=f"rows are of another day than the first of their individual ({column}), and it is unknown whether "
            "times count over days or start again every day",
            remedy=f"Pass {typed('unused', [column])} if they count over days. If they are hours of that day, pass "
            f"{typed('columns.date', column)}; else write the time since the first record into the column of times.",
        )


def _refuse_several_units(table: Table, column: str, rows: Rows) -> None:
    levels = _levels(table, column)
    given = levels != ""
    bad = given & (levels != levels[int(np.argmax(given))])
    if bad.any():
        raise table.refusal(
            bad,
            column,
            what=f"rows have another unit than the first ({column})",
            remedy=f"Write all of them in one unit, or pass {_unused(column)}.",
        )
    del rows


def _refuse_correlated(table: Table, column: str, rows: Rows) -> None:
    levels, parsed = _levels(table, column), table.parse(column)
    groups = pd.DataFrame({"who": rows.individual, "level": levels})
    bad = (groups.duplicated().to_numpy() | groups.duplicated(keep="last").to_numpy()) & rows.measured & (levels != "0")
    bad &= ~parsed.missing
    if bad.any():
        raise table.refusal(
            bad,
            column,
            what=f"rows share their residual error with others ({column}), which is not implemented",
            remedy=f"Pass {typed('unused', [column])} to take their errors as independent.",
        )


def _refuse_amounts(table: Table, column: str, rows: Rows) -> None:
    """Refuse doses in a table without doses; a column DOSE that is constant within individuals only describes them."""
    if plain_name(column) == "dose" and not _differs_from_first(_levels(table, column), rows).any():
        return
    bad = ~_is_nothing(_levels(table, column))
    if bad.any():
        raise table.refusal(
            bad,
            column,
            what=f"rows have an amount ({column}), and this kind of table has no doses",
            remedy=f"Read it as data=event_table, or pass {_unused(column)}.",
        )


def _refuse_signals(table: Table, column: str, rows: Rows) -> None:
    levels = _levels(table, column)
    different = [str(level) for level in pd.unique(levels[rows.measured])]
    if len(different) > 1:
        bad = rows.measured & (levels != different[0])
        raise table.refusal(
            bad,
            column,
            what=f"rows measure another signal than the first ({column} has {listed(different)})",
            remedy=f"Pass {typed('columns.signal', column)} to read it as the signal, or {_unused(column)}.",
        )


def _differs_from_first(levels: Cells, rows: Rows) -> Bool[np.ndarray, " R"]:
    """Rows whose level differs from the first one of their individual; missing cells do not."""
    codes, _ = pd.factorize(levels)
    numbers: Float[np.ndarray, " R"] = np.where(levels == "", np.nan, codes.astype(np.float64))
    first = pd.Series(numbers).groupby(rows.individual).transform("first").to_numpy()
    found: Bool[np.ndarray, " R"] = ~np.isnan(numbers) & (numbers != first)
    return found
