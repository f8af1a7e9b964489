"""A table of text with named columns, and the numbers and names read from it, each refusal with its row and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from nlme_sbi.io.files import Grid
from nlme_sbi.io.wording import did_you_mean, first_true, listed, quoted

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NOT_FINITE = r"(?i:[+-]?(?:inf|infinity|nan))"
_DECIMAL_COMMA = r"[+-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?"
Cells = Shaped[np.ndarray, " R"]


@dataclass(frozen=True, eq=False)
class Parsed:
    """Cells read as numbers: ``values`` NaN where ``missing``; ``text`` and ``infinite`` mark what cannot be used."""

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
        labels: how messages name each column.
        cells: ``(R, F)`` strings, columns numbered from 0.
        rows: ``(R,)`` rows of the file, counted from 1 with the header.
        decimal: ``.`` or ``,``.
        missing: cells that mean "not measured".
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    cells: pd.DataFrame
    rows: Int[np.ndarray, " R"]
    decimal: str
    missing: Sequence[str]

    @classmethod
    def from_grid(cls, grid: Grid, *, header: bool, decimal: str, missing: Sequence[str]) -> Table:
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
        return cls(grid.name, columns, labels, grid.cells.iloc[first:], grid.rows[first:], decimal, missing)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, keep: Bool[np.ndarray, " R"]) -> Table:
        """Only the rows where ``keep`` holds."""
        return self if keep.all() else replace(self, cells=self.cells[keep], rows=self.rows[keep])

    def has(self, column: str) -> bool:
        """Whether a column of this name is there, letter case aside."""
        return bool(self._matches(column))

    def position(self, column: str | int) -> int:
        """Where a column stands (a number is its own answer); letter case matters only where it must.

        Raises:
            ValueError: no such column (with those that are there), or more than one.
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
        split = next((mark for mark in (";", "\t", ",", "|") if mark in alone), None)
        hint = f' Pass data.separator="{split}"?' if split else did_you_mean(column, named)
        raise ValueError(
            f"{self.name} has no column {quoted(column)}; it has {listed(named, limit=20)}.{hint} "
            "Rename it in the file, or map it in data.columns."
        )

    def _matches(self, column: str) -> list[int]:
        exact = [k for k, name in enumerate(self.columns) if name == column]
        return exact or [k for k, name in enumerate(self.columns) if name and name.casefold() == column.casefold()]

    def refusal(self, bad: Bool[np.ndarray, " R"], column: str | int, *, what: str, remedy: str) -> ValueError:
        """The sentence for rows that break a rule: how many of how many, the first with its place, the remedy."""
        counts = f"{int(bad.sum())} of {len(self)}"
        return self._sentence(counts, what, row=first_true(bad), position=self.position(column), remedy=remedy)

    def _sentence(self, counts: str, what: str, *, row: int, position: int, remedy: str) -> ValueError:
        return ValueError(
            f"{self.name}: {counts} {what}; first at row {self.rows[row]}, {self.labels[position]}: "
            f"{quoted(self.cells.iat[row, position])}. {remedy}"
        )

    def text(self, column: str) -> Cells:
        """A column's cells without surrounding blanks, ``(R,)`` strings."""
        return _stripped(self.cells.iloc[:, self.position(column)].to_numpy(dtype=object))

    def is_missing(self, text: Cells) -> Bool[np.ndarray, " R"]:
        """Where stripped cells are missing markers, ``(R,)``."""
        return pd.Series(text, dtype=object).isin(list(self.missing)).to_numpy(dtype=bool)

    def parse(self, column: str) -> Parsed:
        """A column read as numbers, nothing refused."""
        return parse(self.cells.iloc[:, self.position(column)].to_numpy(dtype=object), self.decimal, self.missing)

    def numbers(self, column: str | int, *, noun: str) -> Float[np.ndarray, " R"]:
        """A column's numbers, ``(R,)`` float64, NaN where missing; refuses text and infinite numbers."""
        position = self.position(column)
        return self.block(slice(position, position + 1), noun=noun)[:, 0]

    def complete_numbers(self, column: str | int, *, noun: str) -> Float[np.ndarray, " R"]:
        """As :meth:`numbers`, and refuses missing ones."""
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
        parsed = parse(cells.reshape(-1), self.decimal, self.missing)
        if parsed.text.any():
            what, remedy = f"{noun} are not numbers", self._number_remedy(parsed, cells)
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

    def _number_remedy(self, parsed: Parsed, cells: Shaped[np.ndarray, "R F"]) -> str:
        first = str(cells.reshape(-1)[first_true(parsed.text)]).strip()
        if self.decimal == "." and pd.Series([first]).str.fullmatch(_DECIMAL_COMMA).item():
            return 'Decimal commas? Pass data.decimal=",".'
        if self.decimal == "," and "." in first:
            return 'Decimal points? Pass data.decimal=".", or remove thousands separators.'
        return "Correct them, or leave the cells empty where nothing was measured."


def parse(cells: Cells, decimal: str, missing: Sequence[str]) -> Parsed:
    """Strings as numbers: exactly the nearest float64, or marked as missing, as text or as infinite."""
    gaps = pd.Series(cells, dtype=object).isin(list(missing)).to_numpy(dtype=bool)
    try:
        values = _floats(np.where(gaps, "nan", cells), decimal)
    except ValueError:
        return _parse_with_care(_stripped(cells), decimal, missing)
    return Parsed(values, gaps, np.zeros_like(gaps), ~np.isfinite(values) & ~gaps)


def _floats(text: Cells, decimal: str) -> Float[np.ndarray, " R"]:
    """All cells as numbers at once; ``ValueError`` where one is not, or is one to ``float()`` only."""
    # float() also takes 1_000, which nobody means as a number in a table.
    if decimal == "," or "_" in "".join(text):
        raise ValueError
    return text.astype(np.float64)


def _parse_with_care(text: Cells, decimal: str, missing: Sequence[str]) -> Parsed:
    series = pd.Series(text, dtype=object)
    gaps = series.isin(list(missing)).to_numpy(dtype=bool)
    number = _NUMBER
    if decimal == ",":
        number = number.replace(r"\.", ",")
    bad = ~series.str.fullmatch(f"(?:{number}|{_NOT_FINITE})").to_numpy(dtype=bool) & ~gaps
    usable = pd.Series(np.where(bad | gaps, "nan", text), dtype=object)
    values = usable.str.replace(decimal, ".", regex=False).to_numpy(dtype=object).astype(np.float64)
    return Parsed(values, gaps, bad, ~np.isfinite(values) & ~gaps & ~bad)


def _stripped(cells: Cells) -> Cells:
    codes, different = pd.factorize(cells)
    stripped: Cells = pd.Series(different, dtype=object).str.strip().to_numpy(dtype=object)[codes]
    return stripped


def number_option(option: str, given: Any, *, positive: bool = False) -> float:
    """A number from a config; raises ``ValueError`` where it is not a finite (positive) number."""
    good = isinstance(given, (int, float)) and not isinstance(given, bool) and np.isfinite(given)
    if not good or (positive and given <= 0):
        raise ValueError(f"{option} must be a {'positive ' if positive else ''}finite number; got {quoted(given)}.")
    return float(given)


def column_names(given: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """The reader's column for each role; raises ``ValueError`` with the roles where ``given`` names another."""
    unknown = [role for role in given if role not in defaults]
    if unknown:
        hint = did_you_mean(str(unknown[0]), list(defaults))
        raise ValueError(f"columns maps {listed(unknown)}, but the roles are {listed(defaults)}.{hint}")
    return {**defaults, **{role: str(column) for role, column in given.items()}}
