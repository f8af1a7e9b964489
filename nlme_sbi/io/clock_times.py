"""Clock times and dates: they become hours since the first record of each individual, as in NM-TRAN.

A cell of the time column is a clock time (``8:30``, ``08:30:00``, ``8:30 pm``), a date, or both (``2020-03-02T08:30``);
a second column may hold the dates. The order of day, month and year must be known: from the column's name as in NONMEM
(DAT1 day-month-year, DAT2 year-month-day, DAT3 year-day-month), from ``date_format``, from a month in letters or a year
in front, or because the column's dates can be read in one order only. Else the table is refused where the orders give
different times. Daylight saving time is not taken into account, unless clock times have a time zone.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from nlme_sbi.config.wording import check_choice, first_true, in_words, listed, quoted, typed
from nlme_sbi.io.records import Scales
from nlme_sbi.io.tables import Cells, Table
from nlme_sbi.units import conversion

DATE_FORMATS = ("mdy", "dmy", "ymd", "ydm")
# NONMEM's names of formats. A plain DATE is month-day-year there and day-month-year in most files from elsewhere.
_BY_NAME = {"dat1": "dmy", "dat2": "ymd", "dat3": "ydm"}
_DATE_COLUMNS = ("date", *_BY_NAME, "day")
_TRIED = ("mdy", "dmy", "ymd")
_ORDERS = {"mdy": "month/day/year", "dmy": "day/month/year", "ymd": "year/month/day", "ydm": "year/day/month"}
_LAST20 = 50
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"  # of English, whatever the locale
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}(?:[.,]\d+)?))?\s*([AaPp])?\.?(?:[Mm]\.?)?\s*(Z|[+-]\d{2}:?\d{2})?")
_THREE = re.compile(r"(\d{1,4})\s*([-/. ])\s*(\d{1,2})\s*\2\s*(\d{1,4})")
_COMPACT = re.compile(r"((?:19|20)\d{2})(\d{2})(\d{2})")
_DAY_NUMBER = re.compile(r"[+-]?\d{1,5}(?:\.0*)?")
_LETTERS = re.compile(r"(\d{1,2})[-/. ]?([A-Za-z]{3})[a-z]*\.?[-/., ]*(\d{4}|\d{2})")
_BOTH = re.compile(r"(.*?)(?:[Tt]|,?\s+|^)(\d{1,2}:\d{2}.*)", re.DOTALL)
_MIDNIGHT = re.compile(r"(.*?)(?:[Tt]|\s+)0?0:00(?::00(?:\.0*)?)?Z?")
_SECONDS_A_DAY = 86400.0


@dataclass(frozen=True, eq=False)
class ReadTimes:
    """Times of the rows, ``(R,)``, their unit ("" where unknown), the columns they were read from, and notes."""

    values: Float[np.ndarray, " R"]
    unit: str
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_times(
    table: Table,
    names: Mapping[str, str],
    date_format: str | None,
    scales: Scales,
    *,
    individual: Int[np.ndarray, " R"],
    ids: Sequence[str],
    sort: bool,
    keep: Bool[np.ndarray, " R"] | None = None,
) -> ReadTimes:
    """Read times: numbers in the table's unit or, from clock times and dates, the time since the first record.

    Args:
        table: the rows.
        names: the file's columns for ``time`` and ``date``; "" looks for a column of dates where times are clock times.
        date_format: the order of day, month and year where it is not known, one of :data:`DATE_FORMATS`.
        scales: unit and factor of the times; clock times are in hours before the factor.
        individual: ``(R,)`` codes into ``ids``.
        ids: of the individuals.
        sort: whether the order of the rows has no meaning.
        keep: ``(R,)``, rows that are read; the others only count for the first record of an individual.

    Returns:
        Times of the rows of ``keep``.

    Raises:
        ValueError: a time or date cannot be read, or the order of its parts is unknown; with row, column and remedy.
    """
    if date_format is not None:
        check_choice("date_format", date_format, DATE_FORMATS)
    time = names["time"]
    cells = table.text(time)
    parts = _Parts.of(cells)
    if not parts.any and not names["date"]:
        if date_format is not None:
            raise ValueError(
                f"data.date_format is {date_format}, but the times of {table.name} are numbers and no column of dates "
                f"is read; name it, {typed('columns.date', 'DATE')}, or leave date_format out."
            )
        wanted = table if keep is None else table.where(keep)
        return ReadTimes(scales.times(wanted, time), scales.time_unit, (time,))
    unit = _unit(table, scales)
    clock = _clock_seconds(table, time, cells, parts)
    column = _date_column(table, names["date"], parts)
    if column is None:
        if not parts.dated.any():
            _refuse_unsorted(table, time, clock, individual, sort=sort)
            days, reading = np.zeros(len(table)), "clock times of one day"
        else:
            days, reading = _days(table, time, parts.date, date_format, individual)
    else:
        dates = _without_midnight(table, column)
        days, reading = _days(table, column, dates, date_format or _BY_NAME.get(_plain(column)), individual)
        reading = f"{'clock times' if parts.any else 'hours of the day'} and {column} ({reading})"
    seconds = days * _SECONDS_A_DAY + clock
    first = np.full(len(ids), np.inf)
    np.minimum.at(first, individual, seconds)
    hours = (seconds - first[individual]) / 3600.0 * float(scales.time_scale)
    note = f"{time}: {reading}, read as time since each individual's first record, in {unit}"
    return ReadTimes(
        hours if keep is None else hours[keep], unit, (time,) if column is None else (time, column), (note,)
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """Cells of a time column split into dates and clock times, ``(R,)`` texts each, "" where a part is missing."""

    date: Cells
    clock: Cells

    @classmethod
    def of(cls, cells: Cells) -> _Parts:
        codes, different = pd.factorize(cells)
        cut = [_split_cell(str(cell)) for cell in different]
        date = np.array([each for each, _ in cut], dtype=object)[codes]
        clock = np.array([each for _, each in cut], dtype=object)[codes]
        return cls(date, clock)

    @property
    def dated(self) -> Bool[np.ndarray, " R"]:
        found: Bool[np.ndarray, " R"] = self.date != ""
        return found

    @property
    def clocked(self) -> Bool[np.ndarray, " R"]:
        found: Bool[np.ndarray, " R"] = self.clock != ""
        return found

    @property
    def any(self) -> bool:
        """Whether any cell is a date or a clock time."""
        return bool((self.dated | self.clocked).any())


def _split_cell(cell: str) -> tuple[str, str]:
    both = _BOTH.fullmatch(cell)
    if both is not None and _CLOCK.fullmatch(both[2]):
        return (both[1].strip(), both[2]) if _looks_dated(both[1].strip()) or not both[1].strip() else ("", "")
    return (cell, "") if _looks_dated(cell) else ("", "")


def _looks_dated(text: str) -> bool:
    """Whether a text has the form of a date; plain numbers do not."""
    three = _THREE.fullmatch(text)
    return three is not None or _LETTERS.fullmatch(text) is not None


def _unit(table: Table, scales: Scales) -> str:
    """The unit of hours times ``time_scale``; raises ``ValueError`` where the declared unit differs."""
    unit = scales.time_unit or ("h" if float(scales.time_scale) == 1.0 else "")
    factor = conversion("h", unit) if unit else None
    if factor is None or abs(float(scales.time_scale) / factor - 1) > 1e-5:
        days = f"{typed('time_scale', 1 / 24)} {typed('time_unit', 'd')}"
        raise ValueError(
            f"{table.name}: clock times and dates are read in hours, and data.time_scale={scales.time_scale:g} does "
            f"not convert them to {quoted(scales.time_unit) if scales.time_unit else 'a known unit'}. Pass "
            f"{typed('time_scale', 1)} {typed('time_unit', 'h')} or, for days, {days}."
        )
    return unit


def _clock_seconds(table: Table, time: str, cells: Cells, parts: _Parts) -> Float[np.ndarray, " R"]:
    """Seconds since midnight, ``(R,)``; 0 for dates without a clock time; numbers beside dates are hours."""
    missing = table.is_missing(cells)
    if missing.any():
        remedy = "Fill them in, or remove these rows."
        raise table.refusal(missing, time, what="times are missing", remedy=remedy)
    if not parts.any:
        hours = table.complete_numbers(time, noun="times")
        bad = (hours < 0) | (hours > 24)
        if bad.any():
            raise table.refusal(
                bad,
                time,
                what="times are not hours of a day (0 to 24), as they must be with a column of dates",
                remedy="If they count over several days, leave data.columns.date out and pass data.unused with that "
                "column; or correct them.",
            )
        return hours * 3600.0
    dates_only = not parts.clocked.any()
    bad = ~parts.dated if dates_only else ~parts.clocked
    if bad.any():
        what = f"times are not {'dates' if dates_only else 'clock times'}, but others are"
        raise table.refusal(
            bad,
            time,
            what=what,
            remedy="Write every time in one way: 08:30 (with the date in a column DATE), or 2020-03-02 08:30.",
        )
    if dates_only:
        return np.zeros(len(table))
    mixed = ~parts.dated if parts.dated.any() else np.zeros(len(table), dtype=bool)
    if mixed.any():
        raise table.refusal(
            mixed, time, what="times have no date, but others have one", remedy="Write the date on every row."
        )
    return _parse_clocks(table, time, parts.clock)


def _parse_clocks(table: Table, time: str, clocks: Cells) -> Float[np.ndarray, " R"]:
    codes, different = pd.factorize(clocks)
    read = [_CLOCK.fullmatch(str(each)) for each in different]
    found = np.array([np.nan if each is None else _parse_clock(each) for each in read])[codes]
    bad = np.isnan(found)
    if bad.any():
        raise table.refusal(
            bad, time, what="times are not clock times (0:00 to 24:00, or with am and pm)", remedy="Correct them."
        )
    zoned = np.array([each is not None and each[5] is not None for each in read])[codes]
    if zoned.any() and not zoned.all():
        raise table.refusal(
            ~zoned,
            time,
            what="times have no time zone, but others have one",
            remedy="Write all times in one zone, or the zone (Z, +01:00) on every row.",
        )
    return found


def _parse_clock(clock: re.Match[str]) -> float:
    """Seconds since midnight (UTC where a zone is given), NaN for an impossible clock time."""
    hour, minute, second = int(clock[1]), int(clock[2]), float((clock[3] or "0").replace(",", "."))
    if clock[4]:
        if not 1 <= hour <= 12:
            return float("nan")
        hour = hour % 12 + (12 if clock[4] in "Pp" else 0)
    if minute > 59 or second >= 60 or hour > 24 or (hour == 24 and (minute or second)):
        return float("nan")
    zone = clock[5] or "Z"
    ahead = 0 if zone == "Z" else int(zone[0] + "1") * (int(zone[1:3]) * 3600 + int(zone[-2:]) * 60)
    return hour * 3600.0 + minute * 60.0 + second - ahead


def _date_column(table: Table, given: str, parts: _Parts) -> str | None:
    """The column of dates: the one that the user named, or the only one with a NONMEM name; None without one."""
    if given:
        table.position(given, role="date")
        if parts.dated.any():
            raise ValueError(
                f"{table.name}: the times already hold dates, and data.columns.date also names {quoted(given)}; "
                f"leave it out, or pass {typed('unused', [given])}."
            )
        return given
    there = [name for name in table.columns if _plain(name) in _DATE_COLUMNS]
    if not there or parts.dated.any():
        return None
    if len(there) > 1:
        raise ValueError(
            f"{table.name} has clock times and several columns that may hold their dates: {listed(there)}. Name one, "
            f"{typed('columns.date', there[0])}, and pass {typed('unused', there[1:])}."
        )
    return there[0]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _refuse_unsorted(
    table: Table, time: str, clock: Float[np.ndarray, " R"], individual: Int[np.ndarray, " R"], *, sort: bool
) -> None:
    """Refuse clock times without dates that go back: they may have passed midnight, or be out of order."""
    order = np.argsort(individual, kind="stable")
    back = np.zeros(len(clock), dtype=bool)
    back[order[1:]] = (np.diff(individual[order]) == 0) & (np.diff(clock[order]) < 0)
    if back.any() and sort:
        raise table.refusal(
            back,
            time,
            what="clock times go back, and without dates it is unknown whether a day has passed",
            remedy="Write the dates into a column DATE, or the time since the first record into the times.",
        )


def _without_midnight(table: Table, column: str) -> Cells:
    """The cells of a column of dates, without the midnight that workbooks append to a date."""
    text = table.text(column)
    missing = table.is_missing(text)
    if missing.any():
        remedy = "Fill them in: every row needs its date."
        raise table.refusal(missing, column, what="dates are missing", remedy=remedy)
    codes, different = pd.factorize(text)
    plain = [_MIDNIGHT.fullmatch(str(each)) for each in different]
    cut = [str(each) if found is None else found[1] for each, found in zip(different, plain, strict=True)]
    result: Cells = np.array(cut, dtype=object)[codes]
    return result


def _days(
    table: Table, column: str, dates: Cells, known: str | None, individual: Int[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, " R"], str]:
    """Days since a fixed day, ``(R,)``, and a description of how the dates were read."""
    codes, different = pd.factorize(dates)
    texts = [str(each) for each in different]
    if all(_DAY_NUMBER.fullmatch(text) for text in texts):
        return np.array([float(text) for text in texts])[codes], "numbers of days"
    fixed = np.array([_fixed_day(text) for text in texts])
    tried = (known,) if known is not None else _TRIED
    read = {order: np.array([_ordered_day(text, order) for text in texts]) for order in tried}
    found = {order: np.where(np.isnan(fixed), days, fixed)[codes] for order, days in read.items()}
    best = min(found, key=lambda order: int(np.isnan(found[order]).sum()))
    bad = np.isnan(found[best])
    if bad.any():
        if known is not None:
            what = f"dates do not have the order {_ORDERS[known]}"
            remedy = f"Correct them, or pass another order: {_choices([order for order in _TRIED if order != known])}."
        else:
            what = "dates cannot be read, or not in the order of the others"
            remedy = "Write them as 2020-03-02 (year-month-day) on every row."
        raise table.refusal(bad, column, what=what, remedy=remedy)
    possible = [order for order in found if not np.isnan(found[order]).any()]
    since = {order: found[order] - _first_per_individual(found[order], individual) for order in possible}
    differ = np.zeros(len(codes), dtype=bool)
    for order in possible[1:]:
        differ |= since[order] != since[possible[0]]
    if differ.any():
        row = first_true(differ)
        example = in_words([f"{_iso_date(found[order][row])} ({order})" for order in possible])
        raise table.refusal(
            differ,
            column,
            what=f"dates can be read in several orders, here as {example}",
            remedy=f"Choose one: {_choices(possible)}.",
        )
    if not np.isnan(fixed).any():
        return found[best], "dates"
    years = f", years 00 to {_LAST20} from 2000 on" if any(map(_is_short, texts)) else ""
    return found[best], f"{_ORDERS[known or possible[0]] if len(possible) == 1 else 'dates'}{years}"


def _choices(orders: Sequence[str]) -> str:
    return " or ".join(typed("date_format", order) for order in orders)


def _first_per_individual(days: Float[np.ndarray, " R"], individual: Int[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    found: Float[np.ndarray, " R"] = pd.Series(days).groupby(individual).transform("min").to_numpy()
    return found


def _iso_date(day: float) -> str:
    return datetime.date.fromordinal(int(day)).isoformat()


def _is_short(text: str) -> bool:
    three, letters = _THREE.fullmatch(text), _LETTERS.fullmatch(text)
    parts = [letters[3]] if letters else [] if three is None else [three[1], three[4]]
    return bool(parts) and not any(len(part) == 4 for part in parts)


def _fixed_day(text: str) -> float:
    """The day of a date with one reading: its month in letters, or eight digits (20200302); else NaN."""
    compact, letters = _COMPACT.fullmatch(text), _LETTERS.fullmatch(text)
    if compact:
        return _ordinal(compact[1], compact[2], compact[3])
    if letters:
        return _ordinal(letters[3], str(_MONTHS.find(letters[2].capitalize()) // 4 + 1), letters[1])
    return float("nan")


def _ordered_day(text: str, order: str) -> float:
    three = _THREE.fullmatch(text)
    if three is None:
        return float("nan")
    parts = dict(zip(order, (three[1], three[3], three[4]), strict=True))
    if any(len(parts[each]) > 2 for each in "md") or len(parts["y"]) not in (2, 4):
        return float("nan")
    return _ordinal(parts["y"], parts["m"], parts["d"])


def _ordinal(year: str, month: str, day: str) -> float:
    """Ordinal number of a date; years of two digits as with NM-TRAN's LAST20=50; NaN for an impossible date."""
    number = int(year)
    if len(year) <= 2:
        number += 2000 if number <= _LAST20 else 1900
    try:
        return float(datetime.date(number, int(month), int(day)).toordinal())
    except ValueError:
        return float("nan")
