"""A table of text with named columns; reading numbers and names from it, with refusals that name row and column."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from nlme_sbi.config.wording import did_you_mean, first_true, listed, nearest, quoted, typed
from nlme_sbi.io.files import Grid, TableFile

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NOT_FINITE = r"(?i:[+-]?(?:inf|infinity|nan))"
_DECIMAL_COMMA = r"[+-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?"
# "1,200" and "12,345,678": a number with thousands separators, or one with three decimals.
_GROUPED = r"[+-]?[1-9][0-9]{{0,2}}(?:{sign}[0-9]{{3}})+"
_SPACES = "[ \u00a0\u202f\u2009]"
_SIGN_PATTERNS = {",": ",", ".": r"\.", " ": _SPACES, "'": "['\u2019]"}
_CLOCK_OR_DATE = r"(?:\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}.*|.*\d{1,2}:\d{2}.*|\d{1,2}[- ]?[A-Za-z]{3}[- ]?\d{2,4}.*)"
_BEYOND_LIMIT = r"(?i:[<>]=?\s*[0-9.,]+.*|[<>]\s*[a-z]*l?lo[qd].*|b[lq]o?[ql]|below.*|b\.?l\.?o?\.?q\.?|ulo[qd])"
Cells = Shaped[np.ndarray, " R"]


@dataclass(frozen=True, eq=False)
class Parsed:
    """Cells read as numbers: ``values`` NaN where ``missing``; ``text`` and ``infinite`` mark unusable cells."""

    values: Float[np.ndarray, " R"]
    missing: Bool[np.ndarray, " R"]
    text: Bool[np.ndarray, " R"]
    infinite: Bool[np.ndarray, " R"]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of text under column names.

    Args:
        name: of the file, for messages.
        columns: ``F`` names, "" where the file has none.
        labels: name of each column in messages.
        cells: ``(R, F)`` strings, columns numbered from 0.
        rows: ``(R,)`` rows of the file, counted from 1 with the header.
        decimal: ``.`` or ``,``.
        missing: cells that mean "not measured".
        thousands: the thousands separator, or None.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    cells: pd.DataFrame
    rows: Int[np.ndarray, " R"]
    decimal: str
    missing: Sequence[str]
    thousands: str | None = None

    @classmethod
    def from_grid(cls, grid: Grid, *, header: bool, notation: TableFile) -> Table:
        """The table under a grid's first row; without ``header`` columns are numbered from 1."""
        width = grid.cells.shape[1]
        if header:
            columns = tuple(str(cell).strip() for cell in grid.cells.iloc[0])
            labels = tuple(f"column {quoted(name)}" if name else f"column {k + 1}" for k, name in enumerate(columns))
        else:
            columns = ("",) * width
            labels = tuple(f"column {k + 1}" for k in range(width))
        first = int(header)
        if len(grid.rows) == first:
            raise ValueError(f"{grid.name} has a header but no rows below it; it needs rows of data.")
        table = cls(
            name=grid.name,
            columns=columns,
            labels=labels,
            cells=grid.cells.iloc[first:],
            rows=grid.rows[first:],
            decimal=notation.decimal,
            missing=notation.missing,
            thousands=notation.thousands,
        )
        if table.decimal == "," and table.thousands is None:
            _refuse_ambiguous_commas(table)
        return table

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, keep: Bool[np.ndarray, " R"]) -> Table:
        """The rows where ``keep`` is true."""
        return self if keep.all() else replace(self, cells=self.cells[keep], rows=self.rows[keep])

    def has(self, column: str) -> bool:
        """Whether a column of this name is there, letter case aside."""
        return bool(self._matches(column))

    def present(self, columns: Sequence[str]) -> list[str]:
        """Those of the names that are columns of the table, each once."""
        return [name for name in dict.fromkeys(columns) if name and self.has(name)]

    def require(self, names: Mapping[str, str], roles: Sequence[str]) -> None:
        """Refuse a table that lacks the column of one of the roles."""
        for role in roles:
            self.position(names[role], role=role)

    def position(self, column: str | int, *, role: str = "") -> int:
        """Position of a column; letter case matters only where names differ by nothing else.

        Args:
            column: its name, or already its position.
            role: of the column in the reader, for the remedy.

        Raises:
            ValueError: there is no such column (with those that exist), or more than one.
        """
        if isinstance(column, int):
            return column
        found = self._matches(column)
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{self.name} has {len(found)} columns {quoted(column)}; rename all but one.")
        named = [name for name in self.columns if name]
        alone = named[0] if len(named) == 1 else ""
        split = next((mark for mark in (";", "\t", ",", "|", " ") if mark in alone), None)
        if split:
            raise ValueError(
                f"{self.name} has no column {quoted(column)}; it has one column, {quoted(alone)}. Pass "
                f"{typed('separator', split)}."
            )
        near = nearest(column, named)
        naming = f"pass {typed(f'columns.{role}', near or 'NAME')}" if role else "name it in data.columns"
        hint = f" Did you mean {quoted(near)}?" if near else ""
        raise ValueError(
            f"{self.name} has no column {quoted(column)}; it has {listed(named, limit=20)}.{hint} Rename it in "
            f"the file, or {naming}."
        )

    def without(self, columns: Sequence[str]) -> Table:
        """The table without these columns; raises ``ValueError`` where one does not exist."""
        dropped = {self.position(column) for column in columns}
        if not dropped:
            return self
        kept = [k for k in range(len(self.columns)) if k not in dropped]
        cells = self.cells.iloc[:, kept].set_axis(range(len(kept)), axis=1)
        return replace(
            self, columns=tuple(self.columns[k] for k in kept), labels=tuple(self.labels[k] for k in kept), cells=cells
        )

    def levels(self, column: str) -> Cells:
        """A column's cells as levels, ``(R,)``: "1", "1.0" and " 01" are the same level, missing cells are ""."""
        text = self.text(column)
        return np.where(self.is_missing(text), "", canonical_forms(text))

    def _matches(self, column: str) -> list[int]:
        exact = [k for k, name in enumerate(self.columns) if name == column]
        return exact or [k for k, name in enumerate(self.columns) if name and name.casefold() == column.casefold()]

    def refusal(self, bad: Bool[np.ndarray, " R"], column: str | int, *, what: str, remedy: str) -> ValueError:
        """The error for rows that break a rule: their number, the first one with its place, and the remedy."""
        counts = f"{int(bad.sum())} of {len(self)}"
        return self._sentence(counts, what, row=first_true(bad), position=self.position(column), remedy=remedy)

    def _sentence(self, counts: str, what: str, *, row: int, position: int, remedy: str) -> ValueError:
        return ValueError(
            f"{self.name}: {counts} {what}; first at row {self.rows[row]}, {self.labels[position]}: "
            f"{quoted(self.cells.iat[row, position])}. {remedy}"
        )

    def text(self, column: str) -> Cells:
        """A column's cells without surrounding blanks, ``(R,)`` strings."""
        return _strip_cells(self.cells.iloc[:, self.position(column)].to_numpy(dtype=object))

    def is_missing(self, text: Cells) -> Bool[np.ndarray, " R"]:
        """Mask of stripped cells that are missing, ``(R,)``."""
        return pd.Series(text, dtype=object).isin(list(self.missing)).to_numpy(dtype=bool)

    def parse(self, column: str) -> Parsed:
        """A column read as numbers, without refusals."""
        return self._parse_cells(self.cells.iloc[:, self.position(column)].to_numpy(dtype=object))

    def _parse_cells(self, cells: Cells) -> Parsed:
        return parse(cells, self.decimal, self.missing, self.thousands)

    def numbers(self, column: str | int, *, noun: str) -> Float[np.ndarray, " R"]:
        """A column's numbers, ``(R,)`` float64, NaN where missing; refuses text and infinite numbers."""
        position = self.position(column)
        return self.block(slice(position, position + 1), noun=noun)[:, 0]

    def complete_numbers(self, column: str | int, *, noun: str) -> Float[np.ndarray, " R"]:
        """As :meth:`numbers`, but refuses missing ones."""
        numbers = self.numbers(column, noun=noun)
        bad = np.isnan(numbers)
        if bad.any():
            raise self.refusal(bad, column, what=f"{noun} are missing", remedy="Fill them in, or remove these rows.")
        return numbers

    def complete_names(self, column: str, *, noun: str) -> tuple[Int[np.ndarray, " R"], tuple[str, ...]]:
        """Codes ``(R,)`` of a column's names, numbered as they appear, and the names; refuses missing ones."""
        text = self.text(column)
        bad = self.is_missing(text)
        if bad.any():
            raise self.refusal(bad, column, what=f"{noun} are missing", remedy="Fill them in, or remove these rows.")
        codes, names = pd.factorize(text)
        return codes.astype(np.int64), tuple(str(name) for name in names)

    def block(self, columns: slice, *, noun: str) -> Float[np.ndarray, "R F"]:
        """Neighbouring columns as numbers, ``(R, F)`` float64, NaN where missing; refuses text and infinite numbers."""
        cells = self.cells.iloc[:, columns].to_numpy(dtype=object)
        parsed = self._parse_cells(cells.reshape(-1))
        if parsed.text.any():
            what, remedy = f"{noun} are not numbers", self._number_remedy(parsed, cells, noun)
            raise self.block_refusal(parsed.text.reshape(cells.shape), columns, what=what, remedy=remedy)
        if parsed.infinite.any():
            what, remedy = f"{noun} are not finite numbers", "Correct them, or leave these cells empty."
            raise self.block_refusal(parsed.infinite.reshape(cells.shape), columns, what=what, remedy=remedy)
        return parsed.values.reshape(cells.shape)

    def block_refusal(self, bad: Bool[np.ndarray, "R F"], columns: slice, *, what: str, remedy: str) -> ValueError:
        """As :meth:`refusal`, for cells of neighbouring columns."""
        row, offset = divmod(first_true(bad.reshape(-1)), bad.shape[1])
        counts = f"{int(bad.sum())} of {bad.size}"
        return self._sentence(counts, what, row=row, position=(columns.start or 0) + offset, remedy=remedy)

    def _number_remedy(self, parsed: Parsed, cells: Shaped[np.ndarray, "R F"], noun: str) -> str:
        wrong = pd.Series(cells.reshape(-1)[parsed.text], dtype=object).str.strip()
        first = wrong.iloc[:1]
        if first.str.fullmatch(_CLOCK_OR_DATE).item() and not first.str.fullmatch(_DECIMAL_COMMA).item():
            return (
                "Dates and clock times are not numbers: write the time since a start, such as hours since the first "
                "dose (09:30 after a dose at 08:00 is 1.5), over all days; only the times of event tables and long "
                "tables may be clock times."
            )
        if first.str.fullmatch(_BEYOND_LIMIT).item():
            return (
                "Beyond a limit of quantification? Write the limit there and 1 in a column CENS (-1 above a limit); or "
                "leave the cells empty, which leaves these measurements out."
            )
        grouped = {mark: self._all_grouped(wrong, mark) for mark in _SIGN_PATTERNS}
        if grouped[","] and self.decimal == ".":
            return (
                f"If the comma of {quoted(first.item())} is a thousands separator, pass {typed('thousands', ',')}; if "
                f"it is a decimal comma, pass {typed('decimal', ',')} {typed('thousands', '.')}."
            )
        if self.decimal == "." and first.str.fullmatch(_DECIMAL_COMMA).item():
            return f"Decimal commas? Pass {typed('decimal', ',')}."
        found = next((mark for mark, all_of_them in grouped.items() if all_of_them and mark != self.decimal), None)
        if found is not None:
            return f"Thousands separators? Pass {typed('thousands', found)}."
        if self.decimal == "," and "." in first.item():
            return f"Decimal points? Pass {typed('decimal', '.')}, or remove the thousands separators."
        if self.decimal == "." and self._all_grouped(wrong, "."):
            return f"Thousands separators? Pass {typed('decimal', ',')} {typed('thousands', '.')}."
        if noun == "event codes":
            return "Write 0 on measurements and 1 on doses."
        if noun != "values":
            return "Correct them, or remove these rows."
        return "Correct them, or leave the cells empty where nothing was measured."

    def _all_grouped(self, wrong: pd.Series, mark: str) -> bool:
        """Whether all cells with this mark have it as thousands separator only."""
        own = wrong[wrong.str.contains(_SIGN_PATTERNS[mark], regex=True)]
        decimal = self.decimal if self.decimal != mark else {".": ",", ",": "."}[mark]
        fraction = rf"(?:{_SIGN_PATTERNS[decimal]}[0-9]*)?"
        pattern = _GROUPED.format(sign=_SIGN_PATTERNS[mark]) + fraction
        return bool(len(own)) and bool(own.str.fullmatch(pattern).all())


def _refuse_ambiguous_commas(table: Table) -> None:
    """Refuse decimal commas where every comma of a table may be a thousands separator ("1,200")."""
    texts = pd.Series(pd.unique(table.cells.to_numpy(dtype=object).reshape(-1)), dtype=object).str.strip()
    numbers = texts[texts.str.fullmatch(_DECIMAL_COMMA) | texts.str.fullmatch(_GROUPED.format(sign=","))]
    if len(numbers) == 0 or not numbers.str.fullmatch(_GROUPED.format(sign=",")).all():
        return
    found = table.cells.map(lambda cell: str(cell).strip()).isin(list(numbers)).to_numpy(dtype=bool)
    raise table.block_refusal(
        found,
        slice(0, found.shape[1]),
        what='cells have commas before three digits, which may be thousands separators ("1,200" is 1200 or 1.2)',
        remedy=f"If they are, pass {typed('decimal', '.')} {typed('thousands', ',')}; if they are decimal commas, pass "
        f"{typed('decimal', ',')} {typed('thousands', '.')}.",
    )


def parse(cells: Cells, decimal: str, missing: Sequence[str], thousands: str | None = None) -> Parsed:
    """Parse strings as numbers: the nearest float64, or marked as missing, text or infinite."""
    gaps = pd.Series(cells, dtype=object).isin(list(missing)).to_numpy(dtype=bool)
    try:
        values = _floats(np.where(gaps, "nan", cells), decimal, thousands)
    except ValueError:
        return _parse_with_care(_strip_cells(cells), decimal, missing, thousands)
    return Parsed(values, gaps, np.zeros_like(gaps), ~np.isfinite(values) & ~gaps)


def _floats(text: Cells, decimal: str, thousands: str | None) -> Float[np.ndarray, " R"]:
    """Convert all cells at once; ``ValueError`` where one is not a number, or only for ``float()``."""
    # float() also accepts 1_000, which is not a number in a table.
    if decimal == "," or thousands is not None or "_" in "".join(text):
        raise ValueError
    return text.astype(np.float64)


def _parse_with_care(text: Cells, decimal: str, missing: Sequence[str], thousands: str | None) -> Parsed:
    series = pd.Series(text, dtype=object)
    gaps = series.isin(list(missing)).to_numpy(dtype=bool)
    if thousands is not None:
        mark = _SIGN_PATTERNS[thousands]
        grouped = series.str.fullmatch(_GROUPED.format(sign=mark) + rf"(?:{_SIGN_PATTERNS[decimal]}[0-9]*)?")
        series = series.where(~grouped, series.str.replace(mark, "", regex=True))
    number = _NUMBER
    if decimal == ",":
        number = number.replace(r"\.", ",")
    bad = ~series.str.fullmatch(f"(?:{number}|{_NOT_FINITE})").to_numpy(dtype=bool) & ~gaps
    usable = series.mask(pd.Series(bad | gaps), "nan")
    values = usable.str.replace(decimal, ".", regex=False).to_numpy(dtype=object).astype(np.float64)
    return Parsed(values, gaps, bad, ~np.isfinite(values) & ~gaps & ~bad)


def canonical_forms(text: Cells) -> Cells:
    """Texts in canonical form, ``(R,)``; see :func:`canonical_form`."""
    codes, different = pd.factorize(text)
    forms = np.array([canonical_form(str(each)) for each in different], dtype=object)
    found: Cells = forms[codes]
    return found


def canonical_form(text: str) -> str:
    """The shortest form of a number ("1" for "1.0" and "01"); other texts as they are."""
    if re.fullmatch(_NUMBER, text):
        number = float(text)
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return text


def _strip_cells(cells: Cells) -> Cells:
    codes, different = pd.factorize(cells)
    stripped: Cells = pd.Series(different, dtype=object).str.strip().to_numpy(dtype=object)[codes]
    return stripped


def check_number(option: str, given: Any, *, positive: bool = False) -> float:
    """Check a number from a config; raises ``ValueError`` where it is not a finite (positive) number."""
    good = isinstance(given, (int, float)) and not isinstance(given, bool) and np.isfinite(given)
    if not good or (positive and given <= 0):
        raise ValueError(f"{option} must be a {'positive ' if positive else ''}finite number; got {quoted(given)}.")
    return float(given)


def column_names(given: Mapping[str, str | None], defaults: Mapping[str, str]) -> dict[str, str]:
    """The file's column for each role, "" where the reader looks for one itself.

    Raises:
        ValueError: ``given`` names an unknown role; with the known ones.
    """
    unknown = [role for role in given if role not in defaults]
    if unknown:
        hint = did_you_mean(str(unknown[0]), list(defaults))
        raise ValueError(f"columns maps {listed(unknown)}, but the roles are {listed(defaults)}.{hint}")
    return {**defaults, **{role: str(column) for role, column in given.items() if column is not None}}
