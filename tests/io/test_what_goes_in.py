"""What goes in is what was meant: columns that change what a row means are read or refused, and the rest is named.

Oracles: small files whose meaning was worked out by hand (``benchmarks/reader_cases.py``), and a slow checker that
reads every random table row by row without any of the readers' code (``benchmarks/readers.py``).
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from reader_cases import Case, cases, verdict
from readers import READERS, checked, composes, contents, fuzzed, judged, measured, outcome, typed_together

from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.io import EventTable, LongTable, WideSheet, describe
from nlme_sbi.types import Censoring

EVENT = "ID,TIME,DV,AMT,EVID"
ROWS = ("1,0,.,320,1", "1,1,7.5,.,0", "1,8,4.1,.,0", "2,0,.,300,1", "2,2,3.5,.,0")


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def with_column(name: str, cells: list[str]) -> str:
    """The small table with one more column."""
    return "\n".join([f"{EVENT},{name}", *(f"{row},{cell}" for row, cell in zip(ROWS, cells, strict=True))]) + "\n"


def refusal(reader: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        reader.read()
    return str(caught.value)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_cases_that_once_went_wrong_are_right(tmp_path: Path, case: Case) -> None:
    (tmp_path / case.name).write_bytes(case.content)
    found = outcome(READERS[case.reader](tmp_path / case.name, **case.options), plan=case.plan)
    assert verdict(case, found if isinstance(found, Exception) else (measured(found[0]), found[1])) == ""


@pytest.mark.slow
def test_random_event_tables_are_read_as_a_slow_checker_reads_them(tmp_path: Path) -> None:
    kinds = {"read": 0, "refused": 0}
    for seed in range(150):
        written = fuzzed(random.Random(10_000 + seed))
        found = outcome(EventTable(write(tmp_path, written.text), **written.options))
        assert judged(written, found) == "", (written, found, checked(written))
        kinds["refused" if isinstance(found, Exception) else "read"] += 1
    assert min(kinds.values()) > 20  # the fuzz has tables of both kinds


def test_the_slow_checker_rejects_a_reader_that_ignores_a_column() -> None:
    tables = [fuzzed(random.Random(seed)) for seed in range(60)]
    asking = [table for table in tables if checked(table).asking]
    assert asking
    for table in asking:
        assert judged(table, (checked(table).values, [])) == "silently dropped"


ASKING = [
    ("RATE", ["0", "10", "0", "0", "0"], r"are not doses but have a RATE.*; first at row 3"),
    ("rate", ["-3", "0", "0", "0", "0"], r"neither -1 .*; first at row 2"),
    ("DUR", ["2", ".", ".", ".", "."], r"infusions \(DUR\).* data\.columns\.tinf"),
    ("TINF", ["-0.5", "", "", "", ""], r"durations are negative"),
    ("ADDL", ["3", "", "", "", ""], r"additional ones \(ADDL\) but no interval"),
    ("SS", ["1", "", "", "", ""], r"steady state \(SS\) without an interval"),
    ("EXCLUDE", ["0", "0", "1", "0", "0"], r"data\.skip=\{EXCLUDE: 1\}"),
    ("Flag", ["N", "N", "Y", "N", "N"], r'data\.skip=\{Flag: "?Y'),
    ("#C", [".", "#", ".", ".", "."], r'row 3, column "#C"'),
    ("KEEP", ["1", "0", "1", "1", "1"], r"data\.only=\{KEEP: 1\}"),
    ("BLQ", ["0", "0", "1", "0", "0"], r"data\.columns\.cens=BLQ"),
    ("LLOQ", ["5", "5", "5", "5", "5"], r"at or below the limit of quantification in \"LLOQ\"; first at row 4"),
    ("ULOQ", ["5", "5", "5", "5", "5"], r"at or above the limit of quantification in \"ULOQ\"; first at row 3"),
    ("LIMIT", [".", "0", ".", ".", "."], r"only with a column of censoring codes"),
    ("OCC", ["1", "1", "2", "1", "1"], r"another occasion .*row 4"),
    ("DATE", ["2020-01-01", "2020-01-01", "2020-01-02", "x", "x"], r"another day .*row 4"),
    ("DVUNIT", ["", "mg/L", "ug/L", "", "mg/L"], r"another unit than the first .*row 4"),
    ("ROUTE", ["iv", ".", ".", "iv", "."], r"data\.compartments=\{iv: 1\}"),
    ("CMT", ["1", "2", "2", "1", "3"], r"measure another signal \(CMT\).*\"2\", \"3\""),
    ("YTYPE", [".", "1", ".", ".", "1"], r"YTYPE"),
    ("L2", ["1", "2", "2", "1", "2"], r"share their residual error"),
    ("CENS", ["1", "0", "0", "0", "0"], r"doses and marked as censored"),
    ("CENS", ["0", "2", "0", "0", "0"], r"CENS codes are neither 0 .* 1 .* nor -1"),
    ("MDV", ["1", "0", "2", "1", "0"], r"MDV codes are neither 0 nor 1"),
]


@pytest.mark.parametrize(("name", "cells", "pattern"), ASKING)
def test_a_column_that_asks_for_more_is_refused_with_its_row(
    tmp_path: Path, name: str, cells: list[str], pattern: str
) -> None:
    path = write(tmp_path, with_column(name, cells))
    message = refusal(EventTable(path))
    assert message.endswith(".")
    assert re.search(pattern, message), message
    if "unused" in message:  # what the remedy says leads to reading, and the column is named
        observations = EventTable(path, unused=[name]).read()
        assert len(contents(observations)) == 5
        assert f"not used, by data.unused: {name}" in describe(observations)


QUIET = [
    ("EXCLUDE", ["0", "0", "N", ".", "false"]),
    ("C", ["C", "C", "C", "C", "C"]),
    ("LLOQ", ["0.1", "0.1", "0.1", "0.1", "0.1"]),
    ("OCC", ["1", "1", "1.0", "2", "2"]),
    ("DAY", ["1", "", "1", "3", "3"]),
    ("L2", ["1", "2", "3", "4", "5"]),
    ("SEX", ["m", "f", "x", "", "1"]),
    ("DVUNIT", ["", "mg/L", "mg/L", "", "mg/L"]),
]


@pytest.mark.parametrize(("name", "cells"), QUIET)
def test_a_column_that_asks_for_nothing_is_named(tmp_path: Path, name: str, cells: list[str]) -> None:
    observations = EventTable(write(tmp_path, with_column(name, cells))).read()
    assert describe(observations).splitlines()[-1] == f"not used: {name}"


@pytest.mark.parametrize(
    ("name", "cells"), [("RATE", ["0", "0.0", "", ".", "NA"]), ("II", ["24", "0", "0", "24", "0"])]
)
def test_columns_of_doses_that_ask_for_nothing_change_nothing(tmp_path: Path, name: str, cells: list[str]) -> None:
    plain = EventTable(write(tmp_path, with_column("SEX", cells))).read()
    found = EventTable(write(tmp_path, with_column(name, cells))).read()
    assert contents(found).keys() == contents(plain).keys()
    assert found.notes == ()
    assert found.design.events is not None
    assert not bool(found.design.events.rate.any())
    assert not bool(found.design.events.additional.any())


def test_columns_that_are_read_are_not_called_unused(tmp_path: Path) -> None:
    text = f"{EVENT},MDV,CMT,WT,CENS,DVID\n1,0,.,320,1,1,1,70,0,.\n1,1,7.5,.,0,0,2,70,0,1\n"
    observations = EventTable(write(tmp_path, text), covariates=["WT"]).read()
    assert observations.notes == ()


def test_limits_are_scaled_and_transformed_like_values(tmp_path: Path) -> None:
    rows = ["1,0,.,9,1,0,.", "1,1,8,.,0,0,.", "1,2,2,.,0,1,0", "1,3,4,.,0,1,1", "1,4,6,.,0,-1,.", "1,5,6,.,0,-1,7"]
    text = "\n".join([f"{EVENT},CENS,LIMIT", *rows]) + "\n"
    path = write(tmp_path, text)
    plain = EventTable(path).read()
    assert plain.censoring is not None
    kinds = [Censoring.NONE, Censoring.INTERVAL, Censoring.INTERVAL, Censoring.RIGHT, Censoring.INTERVAL]
    assert plain.censoring.flatten().tolist() == [int(kind) for kind in kinds]
    assert plain.lower.flatten().tolist()[1:] == [0.0, 1.0, 6.0, 6.0]
    assert plain.upper.flatten().tolist()[1:] == [2.0, 4.0, np.inf, 7.0]
    logs = EventTable(path, transform="log", signal_scale={"DV": 0.5}).read()
    # The log of a limit of 0 bounds nothing: what is left is "below 2".
    assert logs.censoring.flatten().tolist()[1] == int(Censoring.LEFT)
    np.testing.assert_allclose(logs.upper.flatten()[1:], np.log(np.array([2.0, 4.0, np.inf, 7.0]) / 2))
    np.testing.assert_allclose(logs.lower.flatten()[1:], [-np.inf, *np.log(np.array([1.0, 6.0, 6.0]) / 2)])
    np.testing.assert_allclose(logs.values.flatten(), np.log(np.array([8.0, 2, 4, 6, 6]) / 2))
    assert "censored: 1 above 6, 3 within limits up to 2 to 7" in describe(plain)


@pytest.mark.parametrize(
    ("row", "pattern"),
    [
        ("1,2,.,.,0,1,.", r"censored \(CENS\) without the limit in DV; first at row 4"),
        ("1,2,2,.,0,1,3", r"LIMIT is not below that limit; first at row 4"),
        ("1,2,2,.,0,-1,1", r"LIMIT is not above that limit; first at row 4"),
    ],
)
def test_impossible_limits_are_refused(tmp_path: Path, row: str, pattern: str) -> None:
    path = write(tmp_path, f"{EVENT},CENS,LIMIT\n1,0,.,9,1,0,.\n1,1,8,.,0,0,.\n{row}\n")
    assert re.search(pattern, refusal(EventTable(path)))


def test_repeated_censored_measurements_have_no_mean(tmp_path: Path) -> None:
    path = write(tmp_path, f"{EVENT},CENS\n1,0,.,9,1,0\n1,1,8,.,0,0\n1,1,2,.,0,1\n")
    assert "repeated measurements have no mean" in refusal(EventTable(path, replicates="mean"))
    assert EventTable(path, replicates="keep").read().censoring.flatten().tolist() == [0, int(Censoring.LEFT)]


def test_long_tables_read_limits_and_refuse_doses_and_signals_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, "id,time,value,CENS\na,0,5,0\na,1,2,1\n")
    assert contents(LongTable(path).read()) == {("a", 0.0, "value"): 5.0, ("a", 1.0, "value"): (-np.inf, 2.0)}
    assert "data=event_table" in refusal(LongTable(write(tmp_path, "id,time,value,AMT\na,0,5,100\na,1,2,0\n")))
    message = refusal(LongTable(write(tmp_path, "id,time,value,DVID\na,0,5,1\na,1,2,2\n")))
    assert "data.columns.signal=DVID" in message
    assert "not used: plate" in describe(LongTable(write(tmp_path, "id,time,value,plate\na,0,5,1\na,1,2,2\n")).read())


def test_rows_are_taken_and_left_out_by_level_whatever_its_form(tmp_path: Path) -> None:
    path = write(tmp_path, "id,time,value,study,ok\na,0,5,1.0,TRUE\nb,0,6,2,TRUE\nb,1,7,2,FALSE\n")
    assert contents(LongTable(path, only={"study": 1}).read()) == {("a", 0.0, "value"): 5.0}
    kept = LongTable(path, skip={"ok": False}).read()
    assert sorted(contents(kept)) == [("a", 0.0, "value"), ("b", 0.0, "value")]
    assert kept.notes[0] == 'left out: 1 of 3 rows (skip ok "False")'
    message = refusal(LongTable(path, only={"study": 3}))
    assert 'no row of t.csv has "3" in column "study"; its levels are "1", "2"' in message
    assert "no column" in refusal(LongTable(path, skip={"stdy": 1}))
    assert "leave none of its 3 rows" in refusal(LongTable(path, skip={"study": [1, 2]}))


def test_ids_in_several_forms_are_named_together(tmp_path: Path) -> None:
    path = write(tmp_path, "id,time,value\n01,0,1\n1,0,2\n2,0,3\n2.0,0,4\n 1.0,0,2\n")
    message = refusal(LongTable(path))
    assert '"01", "1", "1.0"; "2", "2.0"' in message
    # Words that differ in case may well be different individuals: they are named, not refused.
    told = LongTable(write(tmp_path, "id,time,value\nA1,0,1\na1,0,2\nA 1,0,2\nb,0,1\n")).read()
    assert told.ids == ("A1", "a1", "A 1", "b")
    assert told.notes == ('ids that differ only in form are different individuals: "A1", "a1", "A 1"',)


def test_long_tables_say_that_rows_of_an_individual_were_joined(tmp_path: Path) -> None:
    observations = LongTable(write(tmp_path, "id,time,value\na,0,1\nb,0,2\na,1,3\nb,1,4\nc,0,5\n")).read()
    assert contents(observations)["a", 1.0, "value"] == 3.0
    assert observations.notes == ("rows of 2 individuals are not adjacent; they are combined by the id",)


def test_rows_that_return_to_an_individual_are_refused_in_event_tables(tmp_path: Path) -> None:
    text = f"{EVENT}\n1,0,.,9,1\n1,1,2,.,0\n2,0,.,9,1\n2,1,3,.,0\n1,2,4,.,0\n"
    message = refusal(EventTable(write(tmp_path, text)))
    assert 'return to an individual after rows of another ("1" first)' in message
    assert "first at row 6" in message
    sorted_ones = EventTable(write(tmp_path, text), sort=True).read()
    assert contents(sorted_ones)["1", 2.0, "DV"] == 4.0


TYPED = [
    (LongTable, "id;time;value\na;0;1,5\n"),
    (LongTable, 'id,time,value\na,0,"1,2e3"\n'),
    (LongTable, 'id,time,value\na,0,"1,200"\n'),
    (LongTable, "id,time,value\na,0,1'200\n"),
    (LongTable, "id,time,value\na,0,1 200\n"),
    (LongTable, "id,time,value,FLAG\na,0,1,\na,1,1,x y\n"),
    (LongTable, "id,time,value,FLAG\na,0,1,\na,1,1,it's\n"),
    (LongTable, "id,time,value,FLAG\na,0,1,\na,1,1,true\n"),
    (LongTable, 'id,time,value,FLAG\na,0,1,\na,1,1,"a ""b"", [c]"\n'),
    (LongTable, "id,time,value,OCC\na,0,1,1\na,1,1,2\n"),
    (LongTable, "id,time,value,ex cluded\na,0,1,0\na,1,1,2\n"),
    (LongTable, "id,time,value\na,1,1\na,0,1\n"),
    (LongTable, "id,time,value\na,1,1\na,1,2\n"),
    (WideSheet, "t;a;b\n0;1;2\n"),
    (EventTable, with_column("CMT", ["depot", "central", "central", "depot", "central"])),
    (EventTable, with_column("CMT", ["1", "2", "3", "1", "2"])),
]


@pytest.mark.parametrize(("reader", "text"), TYPED)
def test_a_remedy_can_be_typed_as_printed_and_helps(tmp_path: Path, reader: Any, text: str) -> None:
    path = write(tmp_path, text)
    groups = {LongTable: "long_table", WideSheet: "wide_sheet", EventTable: "event_table"}
    given: list[str] = [f"data={groups[reader]}", f"data.path={path}"]
    told: list[str] = []
    while len(told) < 4:
        config = compose_config("fit_population", given)
        try:
            assert len(instantiate(config.data, where="data").read())
            return
        except ValueError as problem:
            message = str(problem)
        assert message not in told  # a remedy that was taken does not come back
        told.append(message)
        given += typed_together(message)[0]
    raise AssertionError(told)


@pytest.mark.slow
def test_every_group_of_data_takes_the_options_of_its_reader() -> None:
    for group in ("event_table", "theophylline"):
        for option in ("data.separator=semicolon", 'data.separator=";"', "data.skip={C: C}", "data.unused=[C]"):
            assert composes(option, group), (group, option)
    for group in ("wide_sheet", "mrna_two_rate_cells", "egfp"):
        for option in ("data.separator=semicolon", "data.decimal=comma", "data.thousands=point", "data.sort=true"):
            assert composes(option, group), (group, option)
