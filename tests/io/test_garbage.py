"""Whatever a file holds, reading it ends in the right observations or in one clear sentence, never in another error."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlme_sbi.io import EventTable, LongTable, WideSheet, describe
from nlme_sbi.types import Observations

READERS = [LongTable, WideSheet, EventTable]
MISSING = {"", "NA", "NaN", "nan", "."}
CELLS = [
    *("0", "1", "2", "-1", "0.0", "1.5", "1e3", " 4 ", "+7", ".5", "5.", "1e-320", "-0"),
    *("", "NA", "NaN", "nan", "."),
    *("inf", "-Infinity", "1e999", "1,5", "1_0", "0x1f", "word", "µ", "101", "True", "--1", "1e", "٣x"),
]
cell = st.sampled_from(CELLS)
tidy = st.sampled_from(["0", "1", "2", "1.5"])


def outcome(reader: Any, path: Path, **options: Any) -> Observations | str:
    """The observations, or the refusal; any other exception fails the test."""
    try:
        observations: Observations = reader(path, **options).read()
    except ValueError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert message.endswith((".", "?")), message
        return message
    assert bool(torch.isfinite(observations.values).all() & torch.isfinite(observations.design.times).all())
    assert bool(observations.design.observed.flatten(1).any(dim=1).all())
    assert describe(observations)
    return observations


def number(text: str) -> float | None:
    """None where a cell is missing; raises ``ValueError`` where it is no finite number."""
    stripped = text.strip()
    if stripped in MISSING:
        return None
    if "_" in stripped or not math.isfinite(float(stripped)):
        raise ValueError
    return float(stripped) + 0.0


def long_oracle(rows: list[tuple[str, str, str, str]]) -> dict[tuple[str, float, str], float] | None:
    """The measurements by the rules of the documentation, one row after another; None where they refuse."""
    content: dict[tuple[str, float, str], float | None] = {}
    last: dict[tuple[str, str], float] = {}
    for name, time, signal, value in rows:
        if not (name or time or signal or value):
            continue
        try:
            when, what = number(time), number(value)
        except ValueError:
            return None
        key = (name.strip(), when, signal.strip())
        if when is None or key[0] in MISSING or key[2] in MISSING or key in content:
            return None
        if when < last.get((key[0], key[2]), when):  # times that go back are refused
            return None
        last[key[0], key[2]] = when
        content[(key[0], when, key[2])] = what
    measured = {key: value for key, value in content.items() if value is not None}
    return measured if measured and {key[0] for key in content} == {key[0] for key in measured} else None


good_row = st.tuples(
    st.sampled_from(["a", "b", "b "]),
    st.sampled_from(["0", " 1", "2.0", "1e1", "-.5"]),
    st.sampled_from(["x", "y", " x"]),
    st.sampled_from(["1", "2.5", "-3e-2", "NA", "", " 7 "]),
)
odd_row = st.tuples(st.sampled_from(["a", "b ", "NA", ""]), cell, st.sampled_from(["x", " y", "."]), cell)
good_rows = st.lists(good_row, max_size=6, unique_by=lambda row: (row[0].strip(), float(row[1]), row[2].strip()))


@pytest.mark.slow
@given(rows=st.one_of(good_rows, st.tuples(good_rows, odd_row).map(lambda pair: [*pair[0], pair[1]])))
@settings(max_examples=300)
def test_long_tables_are_read_rightly_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.tsv"
    path.write_text("\n".join("\t".join(row) for row in [("id", "time", "signal", "value"), *rows]), encoding="utf-8")
    result, expected = outcome(LongTable, path), long_oracle(rows)
    if expected is None or isinstance(result, str):
        assert expected is None, (rows, result)
        assert isinstance(result, str), rows
        return
    found = {
        (result.ids[i], float(result.design.times[i, t]), result.signals[c]): float(result.values[i, t, c])
        for i, t, c in torch.nonzero(result.design.observed).tolist()
    }
    assert found == expected


@pytest.mark.parametrize("reader", READERS)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".xlsx", ".csv.gz"]))
@settings(max_examples=80)
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, reader: Any, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(data)
    outcome(reader, path)


@pytest.mark.parametrize("reader", READERS)
@given(
    text=st.text(alphabet=st.sampled_from("0123.,;\t\n\r \"'-eNA idtvb\u2028\x0b\x1c"), max_size=120),
    head=st.sampled_from(["", "id,time,value\n", "ID,TIME,DV,AMT,EVID\n1,0,.,5,1\n", "t,a\n"]),
    decimal=st.sampled_from([".", ","]),
)
@settings(max_examples=150)
def test_random_text(tmp_path_factory: pytest.TempPathFactory, reader: Any, text: str, head: str, decimal: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.csv"
    path.write_bytes((head + text).encode("utf-8"))
    outcome(reader, path, decimal=decimal)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["none", "log"])
@given(
    grid=st.lists(st.lists(cell, min_size=3, max_size=3), min_size=1, max_size=5),
    header=st.sampled_from(["auto", True, False]),
    replicates=st.sampled_from(["refuse", "keep", "mean"]),
)
@settings(max_examples=100)
def test_wide_sheets_of_odd_cells(
    tmp_path_factory: pytest.TempPathFactory, transform: str, grid: list[list[str]], header: Any, replicates: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "wide.tsv"
    path.write_text("\n".join("\t".join(row) for row in grid), encoding="utf-8")
    outcome(WideSheet, path, header=header, replicates=replicates, transform=transform)


@pytest.mark.slow
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["1", "2", ""]),
            st.one_of(tidy, cell),
            st.one_of(tidy, cell),
            st.sampled_from(["0", "0", "5", ".", "-1", "x"]),
            st.sampled_from(["0", "0", "1", "101", "4", ""]),
            st.sampled_from(["1", "1", "2", "", "w"]),
            st.sampled_from(["60", "60", "x", ""]),
        ),
        max_size=4,
    )
)
@settings(max_examples=200)
def test_event_tables_of_odd_cells(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]) -> None:
    path = tmp_path_factory.getbasetemp() / "events.tsv"
    table = [("ID", "TIME", "DV", "AMT", "EVID", "CMT", "WT"), ("1", "0", ".", "9", "1", "1", "60")]
    path.write_text("\n".join("\t".join(row) for row in [*table, *rows]), encoding="utf-8")
    result = outcome(EventTable, path, covariates=["WT"])
    if isinstance(result, Observations):
        assert result.design.events is not None
        assert result.design.events.amount.shape == (len(result), 1)
        kept = [row for row in rows if any(row)]
        assert int(result.design.observed.sum()) == sum(row[4] == "0" and row[2].strip() not in MISSING for row in kept)


@pytest.mark.slow
@given(
    rows=st.lists(
        st.lists(
            st.one_of(
                st.none(), st.integers(-5, 5), st.floats(-1e3, 1e3), st.booleans(), st.sampled_from(["x", "1", "#N/A"])
            ),
            max_size=4,
        ),
        max_size=4,
    )
)
@settings(max_examples=40)
def test_workbooks_of_odd_cells(tmp_path_factory: pytest.TempPathFactory, rows: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    path = tmp_path_factory.getbasetemp() / "odd.xlsx"
    path.write_bytes(buffer.getvalue())
    for reader in READERS:
        outcome(reader, path)


def test_a_cut_workbook_is_refused(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in range(50):
        book.active.append([row, row * 0.5])
    book.save(tmp_path / "whole.xlsx")
    whole = (tmp_path / "whole.xlsx").read_bytes()
    for share in (0.2, 0.5, 0.9, 0.99):
        (tmp_path / "cut.xlsx").write_bytes(whole[: int(len(whole) * share)])
        message = outcome(WideSheet, tmp_path / "cut.xlsx")
        assert isinstance(message, str)
        assert re.search(r"cut\.xlsx cannot be read as an Excel workbook", message)
