"""Clock times and dates are hours since the individual's first record, and dates of several meanings are refused.

Oracles: NONMEM's own example of time translation (worked out by hand), and random moments that Python's ``datetime``
writes and subtracts.
"""

from __future__ import annotations

import random
import re
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlme_sbi.io import EventTable, LongTable, describe

DAY, HEAD = "ID,DATE,TIME,DV,AMT,EVID", "1,{0},8:00,.,100,1\n1,{0},9:30,5,.,0\n"


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def hours(path: Path, **options: Any) -> list[list[float]]:
    return EventTable(path, **options).read().design.times.numpy().round(9).tolist()


def refusal(reader: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        reader.read()
    return str(caught.value)


def test_the_example_of_nonmem(tmp_path: Path) -> None:
    rows = "1,10-1-86,9:15,.,50,1\n1,10-1-86,14:40,3,.,0\n1,10-2-86,8:30,2,.,0\n"
    later = "2,10-12-86,8:00,.,50,1\n2,10-14-86,10:00,3,.,0\n"
    path = write(tmp_path, f"{DAY}\n{rows}{later}")
    observations = EventTable(path, date_format="mdy").read()
    assert observations.design.times.numpy().round(2).tolist() == [[5.42, 23.25], [50.0, 50.0]]
    assert observations.time_unit == "h"
    assert "years 00 to 50 from 2000 on" in describe(observations)
    assert hours(path, date_format="mdy", time_unit="h") == hours(path, date_format="mdy")


@pytest.mark.parametrize(
    ("column", "written"),
    [
        ("DATE", "%Y-%m-%d"),
        ("DATE", "%d-%b-%Y"),
        ("DATE", "%Y%m%d"),
        ("DAT1", "%d/%m/%Y"),
        ("DAT1", "%d.%m.%y"),
        ("dat2", "%y-%m-%d"),
        ("DAT3", "%Y/%d/%m"),
    ],
)
@pytest.mark.parametrize("clock", ["%H:%M", "%H:%M:%S", "%I:%M %p"])
def test_random_moments_are_as_far_apart_as_datetime_says(
    tmp_path: Path, column: str, written: str, clock: str
) -> None:
    draw = random.Random(f"{column}{written}{clock}")
    rows, truth = [], []
    for individual in range(12):
        start = datetime(1990 + draw.randrange(55), 1 + draw.randrange(12), 1 + draw.randrange(28), draw.randrange(24))
        later = sorted(start + timedelta(minutes=draw.randrange(1, 90_000)) for _ in range(3))
        for moment in (start, *later):
            measured = "1,.,0" if moment in later else ".,10,1"
            rows.append(f"{individual},{moment.strftime(written)},{moment.strftime(clock)},{measured}")
        truth.append([(moment - start).total_seconds() / 3600 for moment in later])
    path = write(tmp_path, "\n".join([f"ID,{column},TIME,DV,AMT,EVID", *rows]))
    np.testing.assert_allclose(EventTable(path, replicates="keep").read().design.times.numpy(), truth, atol=1e-9)


@pytest.mark.parametrize("written", ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S.250Z"])
def test_date_times_in_one_column(tmp_path: Path, written: str) -> None:
    start = datetime(2020, 2, 28, 22, 30)
    moments = [start, start + timedelta(hours=3), start + timedelta(days=2)]  # 2020 has a 29 February
    rows = [f"a,{moment.strftime(written)},{k}" for k, moment in enumerate(moments)]
    observations = LongTable(write(tmp_path, "\n".join(["id,time,value", *rows]))).read()
    assert observations.design.times.tolist() == [[0.0, 3.0, 48.0]]
    assert observations.time_unit == "h"


def test_time_zones_are_taken_off(tmp_path: Path) -> None:
    text = "id,time,value\na,2020-03-02T08:00+01:00,1\na,2020-03-02T08:00Z,2\n"
    assert LongTable(write(tmp_path, text)).read().design.times.tolist() == [[0.0, 1.0]]
    assert "no time zone" in refusal(LongTable(write(tmp_path, text.replace("Z", ""))))


def test_hours_of_the_day_beside_a_column_of_dates_that_was_named(tmp_path: Path) -> None:
    path = write(tmp_path, f"{DAY}\n1,2020-03-02,8,.,100,1\n1,2020-03-03,9.5,5,.,0\n")
    message = refusal(EventTable(path))
    assert "data.columns.date=DATE" in message
    assert hours(path, columns={"date": "DATE"}) == [[25.5]]
    assert hours(path, unused=["DATE"]) == [[9.5]]
    late = write(tmp_path, f"{DAY}\n1,2020-03-02,8,.,100,1\n1,2020-03-03,30,5,.,0\n")
    assert re.search(r"not hours of a day .*; first at row 3", refusal(EventTable(late, columns={"date": "DATE"})))


def test_days_by_number(tmp_path: Path) -> None:
    path = write(tmp_path, "ID,DAY,TIME,DV,AMT,EVID\n1,-1,20:00,.,100,1\n1,3,8:00,5,.,0\n")
    assert hours(path) == [[84.0]]


def test_intervals_between_doses_are_in_hours_or_scaled_with_the_times(tmp_path: Path) -> None:
    path = write(tmp_path, "ID,TIME,DV,AMT,EVID,II,ADDL\n1,8:00,.,100,1,12,3\n1,20:00,5,.,0,.,.\n")
    plain = EventTable(path).read()
    days = EventTable(path, time_scale=1 / 24, time_unit="d").read()
    assert plain.design.events is not None
    assert days.design.events is not None
    assert (plain.design.times.tolist(), plain.design.events.interval.tolist()) == ([[12.0]], [[12.0]])
    assert (days.design.times.tolist(), days.design.events.interval.tolist()) == ([[0.5]], [[0.5]])
    for options in ({"time_unit": "min"}, {"time_unit": "d"}, {"time_scale": 60}, {"time_unit": "elsewhere"}):
        assert "data.time_scale=1 data.time_unit=h" in refusal(EventTable(path, **options))


def test_a_date_of_two_meanings_is_refused_with_both(tmp_path: Path) -> None:
    text = f"{DAY}\n1,02/03/2020,8:00,.,100,1\n1,04/03/2020,9:00,5,.,0\n"
    path = write(tmp_path, text)
    message = refusal(EventTable(path))
    assert re.search(r"1 of 2 dates can be read in several orders.*; first at row 3, column \"DATE\"", message)
    assert "2020-04-03 (mdy) and 2020-03-04 (dmy)" in message
    assert "data.date_format=mdy or data.date_format=dmy" in message
    assert hours(path, date_format="dmy") == [[49.0]]
    assert hours(path, date_format="mdy") == [[24.0 * (date(2020, 4, 3) - date(2020, 2, 3)).days + 1]]
    # One date that allows one order only decides for its column.
    assert hours(write(tmp_path, text + "1,13/03/2020,8:00,5,.,0\n")) == [[49.0, 264.0]]
    # Whatever the order, nobody's times depend on it here.
    assert hours(write(tmp_path, f"{DAY}\n{HEAD.format('02/03/2020')}")) == [[1.5]]
    short = write(tmp_path, text.replace("2020", "01").replace("02/", "01/"))
    assert "2001-04-03 (mdy), 2001-03-04 (dmy) and 2004-03-01 (ymd)" in refusal(EventTable(short))


REFUSED = [
    (
        "1,{},8:00,.,100,1\n1,30/02/2020,9:00,5,.,0\n",
        {},
        r'cannot be read.*first at row 3, column "DATE": "30/02/2020"',
    ),
    ("1,{},8:00,.,100,1\n1,.,9:00,5,.,0\n", {}, "dates are missing; first at row 3"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,.,5,.,0\n", {}, "times are missing; first at row 3"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,9.5,5,.,0\n", {}, "1 of 2 times are not clock times, but others are"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,9:75,5,.,0\n", {}, r'not clock times \(0:00 to 24:00.*: "9:75"'),
    ("1,{},8:00,.,100,1\n1,2020-03-02,13:00 pm,5,.,0\n", {}, r'not clock times \(0:00 to 24:00.*: "13:00 pm"'),
    ("1,{},8:00,.,100,1\n1,2020-03-01,9:00,5,.,0\n", {}, "times go back within an individual"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,9:00,5,.,0\n", {"date_format": "mdy"}, r"do not have the order month/day/year"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,9:00,5,.,0\n", {"date_format": "my"}, r"not one of mdy, dmy, ymd, ydm"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,9:00,5,.,0\n", {"columns": {"date": "WHEN"}}, r'no column "WHEN"'),
    ("1,{},8,.,100,1\n1,2020-03-02,9,5,.,0\n", {"date_format": "ymd"}, "data.columns.date=DATE"),
    ("1,{},8:00,.,100,1\n1,2020-03-02,2020-03-02 9:00,5,.,0\n", {}, "times have no date, but others have one"),
]


@pytest.mark.parametrize(("rows", "options", "pattern"), REFUSED)
def test_what_is_not_known_is_refused_with_its_row(
    tmp_path: Path, rows: str, options: dict[str, Any], pattern: str
) -> None:
    message = refusal(EventTable(write(tmp_path, f"{DAY}\n{rows.format('2020-03-02')}"), **options))
    assert re.search(pattern, message), message


def test_a_clock_that_passes_midnight_needs_dates(tmp_path: Path) -> None:
    text = "ID,TIME,DV,AMT,EVID\n1,22:00,.,100,1\n1,1:00,5,.,0\n"
    assert "a column DATE" in refusal(EventTable(write(tmp_path, text)))
    assert "whether a day has passed" in refusal(EventTable(write(tmp_path, text), sort=True))
    two = "ID,DATE,DAY,TIME,DV,AMT,EVID\n1,2020-01-01,1,22:00,.,100,1\n1,2020-01-02,2,1:00,5,.,0\n"
    path = write(tmp_path, two)
    assert re.search(r"data\.columns\.date=DATE, and pass .*DAY", refusal(EventTable(path)))
    assert hours(path, columns={"date": "DATE"}, unused=["DAY"]) == [[3.0]]


def test_signals_that_are_left_out_still_tell_when_an_individual_began(tmp_path: Path) -> None:
    text = "id,time,signal,value\na,08:00,x,1\na,09:00,y,2\n"
    assert LongTable(write(tmp_path, text), signals="y").read().design.times.tolist() == [[1.0]]


def test_plans_count_from_their_first_record_where_they_hold_the_doses(tmp_path: Path) -> None:
    plan = EventTable(write(tmp_path, "ID,TIME,AMT,EVID\n1,8:00,100,1\n1,9:30,.,0\n")).plan()
    assert plan.design.times.tolist() == [[1.5]]
    assert plan.time_unit == "h"
    with pytest.raises(ValueError, match="no record that its clock times could count from"):
        LongTable(write(tmp_path, "id,time\na,8:00\na,9:00\n")).plan()


def test_a_workbook_keeps_dates_and_times_of_day(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ("ID", "DATE", "TIME", "DV", "AMT", "EVID"),
        (1, datetime(2020, 3, 2), time(8, 0), None, 100, 1),
        (1, datetime(2020, 3, 3), time(9, 30), 5, None, 0),
    ):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert hours(tmp_path / "t.xlsx") == [[25.5]]
