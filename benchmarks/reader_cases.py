"""Small files that once gave a wrong number, a silent loss or a misleading sentence, and what is right for each."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import openpyxl

EVENT = "ID,TIME,DV,AMT,EVID"
DOSE, FIRST, LAST = "1,0,.,320,1", "1,1,7.5,.,0", "1,8,4.1,.,0"
READ = {("1", 1.0, "DV"): 7.5, ("1", 8.0, "DV"): 4.1}


@dataclass(frozen=True)
class Case:
    """A file, how it is read, and what is right.

    Args:
        name: of the file.
        content: of the file.
        reader: "event_table", "long_table" or "wide_sheet".
        options: of the reader.
        refused: a pattern that the refusal must match; "" where the file must be read.
        values: the measurements under (id, time, signal) that must be read, with bounds where they are censored.
        said: a pattern that the notes must match.
        plan: whether the file is read as a plan: ``values`` then has None for every time.
    """

    name: str
    content: bytes
    reader: str = "event_table"
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    values: Mapping[tuple[str, float, str], Any] = field(default_factory=dict)
    said: str = ""
    plan: bool = False


def table(*rows: str) -> bytes:
    """Rows as the bytes of a text file."""
    return ("\n".join(rows) + "\n").encode()


def book(fill: Callable[[Any], None]) -> bytes:
    """The bytes of a workbook whose first sheet ``fill`` has filled."""
    workbook, file = openpyxl.Workbook(), io.BytesIO()
    fill(workbook.active)
    workbook.save(file)
    return file.getvalue()


def _rows(*rows: tuple[Any, ...]) -> Callable[[Any], None]:
    def fill(sheet: Any) -> None:
        for row in rows:
            sheet.append(row)

    return fill


def _planned(*places: tuple[str, float]) -> dict[tuple[str, float, str], Any]:
    return {(name, time, ""): None for name, time in places}


def _dated() -> bytes:
    from datetime import datetime

    rows = [("id", "time", "value"), ("a", datetime(2020, 1, 1, 8), 1), ("a", datetime(2020, 1, 1, 9), 2)]
    return book(_rows(*rows))


def cases() -> list[Case]:
    """Every case once."""
    flagged = table("C," + EVENT, ".,1,0,.,320,1", ".,1,1,7.5,.,0", "C,1,2,999,.,0", ".,1,8,4.1,.,0")
    coded = table(EVENT + ",YTYPE", DOSE + ",.", FIRST + ",1", LAST + ",1", "1,24,98,.,0,2", "1,36,80,.,0,2")
    worded = table(EVENT + ",DVID", DOSE + ",cp", FIRST + ",cp", LAST + ",cp", "1,24,98,.,0,pca")
    censored = table(EVENT + ",CENS,LIMIT", DOSE + ",0,.", FIRST + ",0,.", "1,24,2.0,.,0,1,0", "1,30,9,.,0,-1,.")
    thousands = table("id\ttime\tvalue", "a\t0\t950", "a\t1\t1,200", "a\t2\t1,350")
    grouped = {("a", 0.0, "value"): 950.0, ("a", 1.0, "value"): 1200.0, ("a", 2.0, "value"): 1350.0}
    routed = table(EVENT + ",ADM", DOSE + ",2", FIRST + ",.", LAST + ",.")
    return [
        Case(
            "cens_limit.csv",
            censored,
            values={
                ("1", 1.0, "DV"): 7.5,
                ("1", 24.0, "DV"): (0.0, 2.0),
                ("1", 30.0, "DV"): (9.0, float("inf")),
            },
        ),
        Case("ytype.csv", coded, options={"signals": ["c"]}, refused=r'\(YTYPE\).*"1", "2".*signal_levels=\{1: c\}'),
        Case(
            "ytype_one.csv",
            coded,
            options={"signals": ["c"], "signal_levels": {1: "c"}},
            values={("1", 1.0, "c"): 7.5, ("1", 8.0, "c"): 4.1},
            said=r"left out: 2 measurements of YTYPE 2",
        ),
        Case(
            "ytype_both.csv",
            coded,
            options={"signal_levels": {1: "c", 2: "e"}},
            values={
                ("1", 1.0, "c"): 7.5,
                ("1", 8.0, "c"): 4.1,
                ("1", 24.0, "e"): 98.0,
                ("1", 36.0, "e"): 80.0,
            },
        ),
        Case("dvidtext2.csv", worded, options={"signals": ["c"]}, refused=r'\(DVID\).*"cp", "pca".*\{cp: c\}'),
        Case("adm.csv", routed, values=READ),  # compartment 2: whoever has no such compartment refuses it
        Case("adm_declared.csv", routed, options={"compartments": {2: 1}}, values=READ),
        Case("cflag.csv", flagged, refused=r'row 4, column "C".*skip=\{C: C\}'),
        Case("cflag_skip.csv", flagged, options={"skip": {"C": "C"}}, values=READ, said="left out: 1 of 4 rows"),
        Case("cflag_unused.csv", flagged, options={"unused": ["C"]}, values={**READ, ("1", 2.0, "DV"): 999.0}),
        Case(
            "clock.csv",
            table(EVENT, "1,08:00,.,320,1", "1,09:30,7.5,.,0"),
            values={("1", 1.5, "DV"): 7.5},
            said="since each individual's first record, in h",
        ),
        Case("dates.xlsx", _dated(), "long_table", values={("a", 0.0, "value"): 1.0, ("a", 1.0, "value"): 2.0}),
        Case("noevid.csv", table("ID,TIME,DV,AMT", "1,0,.,320", "1,1,7.5,.", "1,8,4.1,."), values=READ, said="EVID"),
        Case(
            "plan_dot.csv",
            table(EVENT, DOSE, "1,2,.,.,0", "1,12,.,.,0"),
            plan=True,
            values=_planned(("1", 2), ("1", 12)),
        ),
        Case(
            "plan_evid2.csv",
            table(EVENT + ",MDV", DOSE + ",1", "1,2,.,.,2,1", "1,12,.,.,2,1"),
            plan=True,
            values=_planned(("1", 2), ("1", 12)),
        ),
        Case(
            "plan_mdv.csv",
            table(EVENT + ",MDV", "1,0,0,400,1,1", "1,2,0,.,0,1", "1,12,0,.,0,1"),
            plan=True,
            values=_planned(("1", 2), ("1", 12)),
        ),
        Case(
            "plan_nodv.csv",
            table("ID,TIME,AMT,EVID", "1,0,400,1", "1,2,.,0", "1,12,.,0"),
            plan=True,
            values=_planned(("1", 2), ("1", 12)),
        ),
        Case(
            "formula_one.xlsx",
            book(_rows(("t", "c1", "c2"), (0, 10, 11), (1, "=AVERAGE(B2,B4)", 13), (2, 14, 15))),
            "wide_sheet",
            refused="no stored result; first in cell B3",
        ),
        Case(
            "formula_time.xlsx",
            book(_rows(("id", "time", "value"), ("a", 0, 1), ("a", "=B2+1", 2), ("a", "=B3+1", 3))),
            "long_table",
            refused="2 of 2 formulas have no stored result; first in cell B3",
        ),
        Case("thou.tsv", thousands, "long_table", refused=r"data\.thousands=comma"),
        Case("thou_commas.tsv", thousands, "long_table", options={"decimal": "comma"}, refused="1200 or 1.2"),
        Case("thou_declared.tsv", thousands, "long_table", options={"thousands": "comma"}, values=grouped),
        Case("theo_semicolon.csv", _semicolons(), refused=r"data\.separator=semicolon data\.decimal=comma"),
        Case(
            "theo_semicolon_declared.csv",
            _semicolons(),
            options={"separator": "semicolon", "decimal": "comma"},
            values={("1", 0.25, "DV"): 2.84, ("1", 1.5, "DV"): 10.5},
        ),
        Case("idfloat.csv", table(EVENT, "1.0,0,.,320,1", "1,1,7.5,.,0"), refused='"1.0", "1"'),
        Case(
            "restart_long.csv",
            table("id,time,value,plate", "1,0,1,A", "1,1,2,A", "2,0,3,A", "2,1,4,A", "1,0.5,9,B", "1,1.5,8,B"),
            "long_table",
            refused="times go back .*row 6.*data.sort=true",
        ),
    ]


def _semicolons() -> bytes:
    return table("ID;TIME;DV;AMT;EVID", "1;0,0;.;319,992;1", "1;0,25;2,84;0,0;0", "1;1,5;10,5;0,0;0")


def verdict(case: Case, found: Any) -> str:
    """What is wrong with what a reader made of a case, "" where nothing is; ``found`` is a refusal or observations."""
    if isinstance(found, Exception):
        if not isinstance(found, ValueError):
            return f"traceback: {type(found).__name__}: {found}"
        if not case.refused:
            return f"refused: {found}"
        return "" if re.search(case.refused, str(found)) else f"misleading: {found}"
    if case.refused:
        return "read, though it must be refused"
    values, notes = found
    if values != dict(case.values):
        return f"read as {values}"
    return "" if re.search(case.said, "\n".join(notes)) else f"not told: {case.said}; told: {notes}"
