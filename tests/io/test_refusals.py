"""Every refusal tells what was needed, how many broke it, the first one's row and column, and a remedy."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nlme_sbi.io import EventTable, LongTable, WideSheet

LONG = "id,time,signal,value\n"
EVENT = "ID,TIME,DV,AMT,EVID\n"
DOSE = "1,0,.,9,1\n"

# Content, options, and what the sentence says.
LONG_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, r"t\.csv is empty \(0 bytes\)"),
    ("\n \n", {}, r"t\.csv is empty \(blank lines only\)"),
    (",,,\n,,,\n", {}, r"t\.csv is empty \(blank rows only\)"),
    (LONG, {}, "has a header but no rows below it"),
    ("id,hours,signal,value\na,0,x,1\n", {}, r'no column "time"; it has "id", "hours", "signal", "value"\.'),
    ("id,Tme,signal,value\na,0,x,1\n", {}, r'no column "time".* Did you mean "Tme"\?'),
    ("id,time,time,value\na,0,0,1\n", {}, '2 columns "time"; rename all but one'),
    ("id;time;value\na;0;1\n", {}, r"Pass data\.separator=semicolon\."),
    (
        LONG + "a,0,x,1\na,0,x,high\nb,0,x,low\n",
        {},
        r'2 of 3 values are not numbers; first at row 3, column "value": "high"',
    ),
    (LONG + 'a,0,x,"1,2e3"\n', {}, r'"1,2e3"\. Decimal commas\? Pass data\.decimal=comma'),
    (
        LONG + "a,0,x,1,5\n",
        {},
        r"1 of 2 rows do not have the 4 fields of the first row; first at row 2: 5.*data\.decimal",
    ),
    (LONG + "a,0,x,1\nb,0,x\n", {}, r"1 of 3 rows do not have the 4 fields of the first row; first at row 3: 3"),
    (LONG.replace(",", ";") + "a;0;x;1.5\n", {"decimal": ","}, r'"1\.5"\. Decimal points\? Pass data\.decimal=point'),
    (LONG + "a,0,x,1_000\n", {}, r'1 of 1 values are not numbers; first at row 2, column "value": "1_000"'),
    (LONG + "a,0,x,inf\n", {}, r'1 of 1 values are not finite numbers; first at row 2, column "value": "inf"'),
    (LONG + "a,0,x,1e999\n", {}, "not finite numbers"),
    (LONG + "a,noon,x,1\n", {}, r'1 of 1 times are not numbers; first at row 2, column "time": "noon"'),
    (LONG + "a,0,x,1\n\na,,x,1\n", {}, r'1 of 2 times are missing; first at row 4, column "time": ""'),
    (LONG + "a,-inf,x,1\n", {}, "times are not finite numbers"),
    (LONG + "a,1e300,x,1\n", {"time_scale": 1e10}, "1 of 1 times overflow when they are scaled; first at row 2"),
    (LONG + "NA,0,x,1\n", {}, r'1 of 1 ids are missing; first at row 2, column "id": "NA"'),
    (LONG + "a,0,,1\n", {}, "1 of 1 signals are missing"),
    (
        LONG + "a,0,x,1\na,0.0,x,2\n",
        {},
        r"1 of 2 measurements repeat .* row 3: .*data\.replicates=keep or data\.replicates=mean",
    ),
    (LONG + "a,0,x,1\nb,0,x,\n", {}, r'1 of 2 individuals have no observation: "b"'),
    (LONG + "a,0,x,1\nb,0,y,1\n", {"signals": ["x"]}, r'1 of 2 individuals have no observation: "b"'),
    (LONG + "a,0,gfp,1\n", {"signals": ["gpf"]}, r'no signal "gpf"; it has "gfp"\. Did you mean "gfp"\?'),
    (LONG + "a,0,gfp,1\n", {"signals": ["gfp", "gfp"]}, "signals names something twice"),
    ("id,time,value\na,0,1\n", {"signals": ["x", "y"]}, "one signal without a name"),
    ("id,time,value\na,0,1\n", {"columns": {"signal": "channel"}}, 'no column "channel"'),
    (
        LONG + "a,0,x,1\n",
        {"columns": {"vlaue": "y"}},
        r'columns maps "vlaue", but the roles are .* Did you mean "value"\?',
    ),
    (LONG + "a,0,x,1\n", {"signal_units": {"y": "V"}}, r'signal_units names "y", but the signals are "x"'),
    (
        LONG + "a,0,x,0\na,1,x,-1\n",
        {"transform": "log"},
        r'2 of 2 values have no logarithm .* row 2, column "value": "0"',
    ),
    (LONG + "a,0,x,1\n", {"transform": "ln"}, r'transform "ln" is not one of none, log'),
    (LONG + "a,0,x,1\n", {"replicates": "means"}, r'replicates "means" is not one of .* Did you mean "mean"\?'),
    (LONG + "a,0,x,1\n", {"decimal": ";"}, r'decimal ";" is not one of \., ,'),
    (LONG + "a,0,x,1\n", {"decimal": ",", "separator": ","}, r'both ","'),
    (LONG + "a,0,x,1\n", {"time_scale": 0}, "time_scale must be a positive finite number; got"),
    (LONG + "a,0,x,1\n", {"covariates": ["wt"]}, 'no column "wt"'),
    ("id,time,value,wt\na,0,1,7\na,1,1,8\n", {"covariates": ["wt"]}, r'covariate "wt" differ .*"a".* row 3.*"8"'),
    ("id,time,value,wt\na,0,1,7\nb,1,1,\n", {"covariates": ["wt"]}, r'covariate "wt" is missing for 1 of 2 .*"b"'),
    ("id,time,value,wt\na,0,1,7\nb,1,1,7O\n", {"covariates": ["wt"]}, r'are text and the others numbers.*row 3.*"7O"'),
    ("id,time,value,wt\na,0,1,7\nb,1,1,inf\n", {"covariates": ["wt"]}, 'values of the covariate "wt" are not finite'),
    (
        "id,time,value,d\na,0,1,x\n",
        {"covariates": "d", "categorical": {"d": ["y"]}},
        r'none of its levels "y"; first .*"x"',
    ),
    ("id,time,value,d\na,0,1,x\n", {"categorical": ["d"]}, r'categorical names "d", but the covariates are '),
    (LONG + 'a,0,x,"1\n', {}, "unclosed quotation mark"),
    (LONG + "a,0,x,1\0\n", {}, "row 2 holds a NUL character"),
]

EVENT_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("ID,TIME,DV\n1,0,1\n", {}, r'no column "AMT"'),
    ("ID,TIME,DV,AMT\n1,0,1,0\n", {}, r"1 of 1 individuals have no dose \(EVID 1\)"),
    ("ID,TIME,DV,AMT\n1,0,1,9\n", {}, r'an amount and a value, and there is no column "EVID".*row 2, column "DV"'),
    (EVENT + DOSE + "1,1,2,0,2\n", {}, r'1 of 1 individuals have no observation: "1"'),
    (EVENT + DOSE + "1,1,2,0,102\n", {}, r"EVID 102 is unknown; first at row 3"),
    (EVENT + DOSE + "1,1,2,0,\n", {}, "1 of 2 event codes are missing"),
    (EVENT + "1,0,.,-9,1\n1,1,2,0,0\n", {}, r'1 of 2 amounts are negative; first at row 2, column "AMT": "-9"'),
    (EVENT + "1,0,.,.,1\n1,1,2,0,0\n", {}, r"1 of 2 rows are doses without an amount; first at row 2"),
    (EVENT + DOSE + "1,1,2,5,0\n", {}, "an amount but EVID 0"),
    (EVENT + "1,0,.,ten,1\n1,1,2,0,0\n", {}, "amounts are not numbers"),
    (EVENT + DOSE + "1,1,2,0,0\n2,1,2,0,0\n", {}, r'1 of 2 individuals have no dose \(EVID 1\): "2".*data=long_table'),
    (EVENT + DOSE, {}, r'1 of 1 individuals have no observation: "1"'),
    (EVENT + DOSE + "1,1,2,0,0\n1,1,3,0,0\n", {}, r"1 of 2 measurements repeat .* row 4"),
    (EVENT + DOSE + "1,1,2,0,0\n", {"columns": {"mdv": "SKIP"}}, 'no column "SKIP"'),
    ("ID,TIME,DV,AMT,EVID,MDV\n1,0,.,9,1,1\n1,1,2,0,0,5\n", {}, "MDV codes are neither 0 nor 1; first at row 3"),
    ("ID,TIME,DV,AMT,EVID,RATE\n1,0,.,9,1,-3\n1,1,2,0,0,0\n", {}, r"neither -1 .* nor -2 .*; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,RATE\n1,0,.,9,1,0\n1,1,2,0,0,3\n", {}, r"are not doses but have a RATE.*first at row 3"),
    ("ID,TIME,DV,AMT,EVID,RATE\n1,0,.,0,1,3\n1,1,2,0,0,0\n", {}, r"infusions have no amount; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,RATE,TINF\n1,0,.,9,1,3,2\n1,1,2,0,0,0,0\n", {}, r"both RATE and TINF; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,TINF\n1,0,.,9,1,-1\n1,1,2,0,0,0\n", {}, r"durations are negative; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,ADDL\n1,0,.,9,1,3\n1,1,2,0,0,0\n", {}, r"additional ones \(ADDL\) but no interval \(II\)"),
    ("ID,TIME,DV,AMT,EVID,ADDL,II\n1,0,.,9,1,2.5,12\n1,1,2,0,0,0,0\n", {}, r"negative or not whole; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,ADDL,II\n1,0,.,9,1,2,-12\n1,1,2,0,0,0,0\n", {}, r"intervals are negative; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,SS\n1,0,.,9,1,1\n1,1,2,0,0,0\n", {}, r"steady state \(SS\) without an interval \(II\)"),
    ("ID,TIME,DV,AMT,EVID,SS,II\n1,0,.,9,1,3,12\n1,1,2,0,0,0,0\n", {}, r"neither 0, 1 nor 2; first at row 2"),
    ("ID,TIME,DV,AMT,EVID,CMT\n1,0,.,9,1,gut\n1,1,2,0,0,2\n", {}, r"into a compartment without a number .*\{gut: 1\}"),
    ("ID,TIME,DV,AMT,EVID,CMT,ADM\n1,0,.,9,1,1,2\n1,1,2,0,0,1,1\n", {}, r"another compartment in ADM .*row 2"),
    ("ID,TIME,DV,AMT,EVID,CMT\n1,0,.,9,1,1\n1,1,2,0,0,2\n1,2,2,0,0,3\n", {}, r"measure another signal \(CMT\).* row 4"),
    ("ID,TIME,DV,AMT,EVID,DVID\n1,0,.,9,1,1\n1,1,2,0,0,1\n1,2,2,0,0,2\n", {}, r"measure another signal \(DVID\)"),
]

WIDE_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("time\n1\n", {}, "has one column"),
    ("t,a,b\n0,1,2\n1,x,2\n", {}, r'1 of 4 values are not numbers; first at row 3, column "a": "x"'),
    ("0,1,2\n1,1,y\n", {}, r'1 of 4 values are not numbers; first at row 2, column 3: "y"'),
    ("6OO,7.2,7.1\n1200,7,7\n", {}, r'row 1 starts with "6OO", like a header, but continues with fractions'),
    ("0,a,b\n1,1,2\n", {}, r'2 of 4 values are not numbers; first at row 1, column 2: "a"'),
    ("t,a,a\n0,1,2\n", {}, r'1 of 2 individuals repeat the name of another column: "a"'),
    ("t,a,\n0,1,2\n", {}, r"1 of 2 individuals have no name in the header; first: column 3"),
    ("t,a,b\n0,1,\n1,2,\n", {}, r'1 of 2 individuals have no observation: "b"'),
    ("t,a\n0,1\n,2\n", {}, r'1 of 2 times are missing; first at row 3, column "t"'),
    ("t,a\n0,1\n1,0\n", {"transform": "log"}, r'1 of 2 values have no logarithm .* row 3, column "a": "0"'),
    ("t,a\n0,1\n", {"header": "yes"}, r'header "yes" is not one of auto, true, false'),
    ("t,a\n", {}, "has a header but no rows below it"),
]


def refusal(reader: Callable[..., Any], path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        reader(path, **options).read()
    return str(caught.value)


def check(message: str, pattern: str) -> None:
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert message.endswith((".", "?")), message


@pytest.mark.parametrize(("content", "options", "pattern"), LONG_CASES)
def test_long_tables(tmp_path: Path, content: str, options: dict[str, Any], pattern: str) -> None:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    check(refusal(LongTable, tmp_path / "t.csv", **options), pattern)


@pytest.mark.parametrize(("content", "options", "pattern"), EVENT_CASES)
def test_event_tables(tmp_path: Path, content: str, options: dict[str, Any], pattern: str) -> None:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    check(refusal(EventTable, tmp_path / "t.csv", **options), pattern)


@pytest.mark.parametrize(("content", "options", "pattern"), WIDE_CASES)
def test_wide_sheets(tmp_path: Path, content: str, options: dict[str, Any], pattern: str) -> None:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    check(refusal(WideSheet, tmp_path / "t.csv", **options), pattern)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("cells.csv", "id,time,value\nµ,0,1\n".encode("latin-1"), "is not UTF-8 text; first wrong byte in row 2"),
        ("cells.csv", "id,time,value\na,0,1\n".encode("utf-16"), "is not UTF-8 text"),
        ("cells.csv", b"PK\x03\x04....", "holds an Excel workbook or archive"),
        ("cells.xlsx", b"id,time,value\na,0,1\n", "cannot be read as an Excel workbook"),
        ("cells.xlsx", b"PK\x03\x04....", "cannot be read as an Excel workbook"),
        ("cells.xls", b"\xd0\xcf\x11\xe0", "old .xls format"),
        ("cells.dat", b"id,time,value\na,0,1\n", r'extension "\.dat" is not one of \.csv, \.tsv, \.xlsx, \.xlsm'),
        ("cells.csv.gz", b"id,time,value\na,0,1\n", "not a complete gzip file"),
        ("cells.csv.gz", gzip.compress(b"id,time,value\n" * 99, mtime=0)[:-9], "not a complete gzip file"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: bytes, pattern: str) -> None:
    (tmp_path / name).write_bytes(content)
    check(refusal(LongTable, tmp_path / name), pattern)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text("id,time,value\na,0,1\n")
    check(refusal(LongTable, tmp_path / "cels.csv"), r'There is no file cels\.csv in .*\. Did you mean "cells\.csv"\?')
    check(refusal(LongTable, tmp_path), "is a directory")
    check(refusal(LongTable, tmp_path / ("x" * 5000)), "not a path that can be opened")


def test_workbooks_without_data_or_sheet(tmp_path: Path) -> None:
    pd.DataFrame().to_excel(tmp_path / "empty.xlsx", sheet_name="one")
    check(refusal(LongTable, tmp_path / "empty.xlsx"), "is empty")
    check(refusal(LongTable, tmp_path / "empty.xlsx", sheet="two"), r'no sheet "two"; it has "one"')
    frame = pd.DataFrame({"id": ["a", "b"], "time": [0, 1], "value": [True, pd.Timestamp("2024-01-01")]})
    frame.to_excel(tmp_path / "typed.xlsx", index=False)
    check(refusal(LongTable, tmp_path / "typed.xlsx"), r'2 of 2 values are not numbers; first at row 2, .*"True"')


def test_a_table_that_cannot_be_held_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    # One individual with 30,000 times, 30,000 individuals with one: 900 million cells if it were padded.
    many = "".join(f"a,{t},1\n" for t in range(30_000)) + "".join(f"c{k},0,1\n" for k in range(30_000))
    (tmp_path / "t.csv").write_text("id,time,value\n" + many)
    check(refusal(LongTable, tmp_path / "t.csv"), "30001 individuals x 30000 times x 1 signals are too many")
