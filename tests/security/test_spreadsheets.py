"""No cell of ours is a formula in a spreadsheet, numbers stay numbers, and ids come back as they were."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from nlme_sbi.runs.csv_files import cell_text, cell_value, csv_text, read_csv, records_text

IDS = [
    *("=1+1", "=cmd|' /C calc'!A0", "+x", "-x", "@SUM(A1)", "\t=1", " =1", "'=1", "''=1", "-", "＝1"),
    *("\ufeff=1", "\u200b+1+1", "\x01@x", "﹦1"),
    *("-1", "+2e3", "007", "NA", "nan", "", "a=b", "'a", "true", "1_000"),
]
signs = st.characters(codec="utf-8", exclude_characters="\r\x00")
text = st.text(alphabet=st.one_of(st.sampled_from("=+-@'\t 1.e,;"), signs))


def runs_in_a_spreadsheet(cell: str) -> bool:
    """What a spreadsheet takes for a formula: an oracle of its own, by the first sign that is seen, numbers apart."""
    stripped = "".join(itertools.dropwhile(lambda sign: sign.isspace() or not sign.isprintable(), cell)).rstrip()
    if not stripped or stripped[0] not in "=+-@＝＋－＠﹦﹢﹣﹫":
        return False
    try:
        float(stripped)
    except ValueError:
        return True
    return "_" in stripped


@given(text)
def test_no_text_is_a_formula_and_all_come_back(value: str) -> None:
    written = cell_text(value)
    assert not runs_in_a_spreadsheet(written)
    assert cell_value(written) == value


def test_ids_and_headers_of_a_table_come_back_and_numbers_stay(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": IDS, "=header": np.linspace(-2, 2, len(IDS)), "n": range(len(IDS))})
    path = tmp_path / "table.csv"
    path.write_text(csv_text(frame))
    with path.open(newline="") as file:
        cells = list(csv.reader(file))
    assert not [cell for row in cells for cell in row if runs_in_a_spreadsheet(cell)]
    assert [float(row[1]) for row in cells[1:]] == frame["=header"].tolist()
    found = read_csv(path)
    assert found["id"].tolist() == IDS
    assert list(found.columns) == list(frame.columns)
    np.testing.assert_array_equal(found["=header"], frame["=header"])


def test_records_are_written_by_the_same_rule() -> None:
    made = records_text([{"name": "=1+1", "@value": -1.5}, {"name": "b", "@value": None}])
    assert made == "name,'@value\n'=1+1,-1.5\nb,\n"


def test_nothing_of_ours_writes_a_csv_by_other_means() -> None:
    """One place: whoever writes a table calls csv_text or records_text."""
    source = Path(__file__).resolve().parents[2] / "nlme_sbi"
    others = [
        path.name
        for path in source.rglob("*.py")
        if path.name != "csv_files.py"
        and any(word in path.read_text() for word in (".to_csv(", "csv.writer", "DictWriter"))
    ]
    assert others == []
