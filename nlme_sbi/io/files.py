"""From a file to rows of text: finding the file, and refusing broken files before any number is read."""

from __future__ import annotations

import csv
import io
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from nlme_sbi.config.wording import check_choice, did_you_mean, listed, quoted, sign, typed
from nlme_sbi.io import limits
from nlme_sbi.io.download import find_cached, find_published

PROJECT_ROOT = Path(__file__).resolve().parents[2]
MISSING = ("", "NA", "NaN", "nan", ".")
_TEXT_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_WORKBOOKS = (".xlsx", ".xlsm")
_ALLOWED_SEPARATORS = (",", ";", "\t", "|", " ", ":")
_ALLOWED_THOUSANDS = (",", ".", " ", "'")


@dataclass(frozen=True, eq=False)
class Grid:
    """The rows of a file that are not blank, as text.

    Args:
        name: of the file, for messages.
        cells: ``(R, F)`` strings, columns numbered from 0.
        rows: ``(R,)`` row numbers in the file, counted from 1.
    """

    name: str
    cells: pd.DataFrame
    rows: Int[np.ndarray, " R"]


@dataclass(frozen=True)
class TableFile:
    """A file that holds a table, and its format.

    Args:
        path: relative paths are looked for in the working directory, then in the project root.
        separator: of the columns of a text file, as a character or one of the words comma, semicolon, tab, space, bar
            and colon. None chooses by extension; with decimal commas it is ``;``, unless the first row has commas only:
            numbers with decimal commas are then in quotation marks.
        decimal: ``.`` or ``,``, or the words point and comma.
        missing: cells that mean "not measured".
        sheet: name of a workbook's sheet; None takes the first.
        thousands: thousands separator, "," "." " " or "'" (or comma, point, space, apostrophe); None for none.
    """

    path: str | os.PathLike[str]
    separator: str | None = None
    decimal: str = "."
    missing: Sequence[str] = MISSING
    sheet: str | None = None
    thousands: str | None = None

    def __post_init__(self) -> None:
        for name in ("separator", "decimal", "thousands"):
            given = getattr(self, name)
            object.__setattr__(self, name, given if given is None else sign(given))
        check_choice("decimal", self.decimal, (".", ","))
        if self.thousands is not None:
            check_choice("thousands", self.thousands, _ALLOWED_THOUSANDS)
            if self.thousands == self.decimal:
                raise ValueError(f'thousands and decimal are both "{self.decimal}"; choose another decimal separator.')
        if self.separator is not None:
            check_choice("separator", self.separator, _ALLOWED_SEPARATORS)
            if self.separator == self.decimal:
                raise ValueError(f'separator and decimal are both "{self.decimal}"; choose another separator.')

    def read(self) -> Grid:
        """Every row of the file as text; raises ``ValueError`` with a remedy where the file cannot be read."""
        path = locate(self.path)
        data = _read_nonempty(path)
        suffix = path.suffix.lower()
        if suffix == ".gz":
            data, suffix = limits.gunzip(path, data), Path(path.stem).suffix.lower()
        if suffix in _WORKBOOKS:
            return _without_blanks(_read_workbook(path.name, data, self.sheet))
        if suffix == ".xls":
            raise ValueError(f"{path.name}: the old .xls format is not read; save the workbook as .xlsx or .csv.")
        if self.separator is None and suffix not in _TEXT_SEPARATORS:
            known = ", ".join([*_TEXT_SEPARATORS, *_WORKBOOKS])
            raise ValueError(
                f'{path.name}: the extension "{suffix}" is not one of {known}; rename the file or pass data.separator.'
            )
        separator = self.separator or _TEXT_SEPARATORS[suffix]
        if self.separator is None and separator == self.decimal and not _has_commas_only(data):
            separator = ";"
        return _without_blanks(_read_text(path.name, data, separator))


def locate(path: str | os.PathLike[str]) -> Path:
    """The file at ``path``: absolute or in the working directory, else in the project root.

    ``cached:NAME`` is a published file that was downloaded.

    Raises:
        ValueError: there is no such file, or it is a directory; with the places that were searched.
    """
    file = find_published(path)
    if file is not None:
        return find_cached(file)
    given = Path(path).expanduser()
    candidates = list(dict.fromkeys((Path.cwd() / given, PROJECT_ROOT / given)))
    try:
        found = next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{quoted(path)} is not a path that can be opened ({error}).") from None
    if found is None:
        places = " or ".join(str(candidate.parent) for candidate in candidates)
        raise ValueError(f"There is no file {given.name} in {places}.{_near_file(candidates, given.name)}")
    if found.is_dir():
        raise ValueError(f"{found} is a directory; pass data.path=FILE, a file in it.")
    return found


def _near_file(candidates: Sequence[Path], name: str) -> str:
    folders = [candidate.parent for candidate in candidates if candidate.parent.is_dir()]
    told = next((folder / "SOURCE.md" for folder in folders if (folder / "SOURCE.md").is_file()), None)
    source = "" if told is None else f" {told} says where these data come from and how their file is made."
    return source + did_you_mean(name, [entry.name for folder in folders for entry in folder.iterdir()])


def _read_nonempty(path: Path) -> bytes:
    data = limits.read_bytes(path)
    if not data:
        raise ValueError(f"{path.name} is empty (0 bytes); it needs rows of data.")
    return data


def _read_text(name: str, data: bytes, separator: str) -> Grid:
    text = _decode(name, data)
    body = text.lstrip("\n")
    if not body.strip():
        raise ValueError(f"{name} is empty (blank lines only); it needs rows of data.")
    encoded = body.encode("utf-8")
    first_row = len(text) - len(body) + 1
    columns, rows = _refuse_ragged(name, encoded, separator, first_row=first_row)
    limits.check_size(name, rows, columns)
    try:
        if columns >= limits.WIDE:
            cells = limits.wide_cells(encoded, separator, rows=rows, columns=columns)
            return Grid(name, cells, np.arange(rows) + first_row)
        # As text: numbers, missing values and mistakes are distinguished cell by cell, with their place in the file.
        cells = pd.read_csv(
            io.BytesIO(encoded), sep=separator, header=None, dtype=object, na_filter=False, skip_blank_lines=False
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error) as error:
        raise ValueError(
            f"{name} cannot be split into columns ({str(error).strip().rstrip('.')}). "
            "Look for an unclosed quotation mark or another separator (data.separator)."
        ) from None
    return Grid(name, cells, np.arange(len(cells)) + first_row)


def _decode(name: str, data: bytes) -> str:
    if data[:4] == b"PK\x03\x04":
        raise ValueError(f"{name} holds an Excel workbook or archive, not text; give it the extension .xlsx.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f'{name} is not UTF-8 text; first wrong byte in row {row}. Save it as "CSV UTF-8" (or use iconv).'
        ) from None
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f'{name} is not text: row {row} holds a NUL character. Save it as "CSV UTF-8".')
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _refuse_ragged(name: str, data: bytes, separator: str, *, first_row: int) -> tuple[int, int]:
    """Refuse rows with more or fewer fields than the first, which a parser would silently fill or shift.

    Returns:
        The number of columns and of rows.
    """
    codes = np.frombuffer(data, dtype=np.uint8)
    is_end, is_separator = codes == ord("\n"), codes == ord(separator)
    if b'"' in data:
        inside = np.logical_xor.accumulate(codes == ord('"'))
        if inside[-1]:
            raise ValueError(f"{name} has an unclosed quotation mark; close or remove it.")
        is_end, is_separator = is_end & ~inside, is_separator & ~inside
    ends = np.flatnonzero(is_end)
    if not is_end[-1]:
        ends = np.append(ends, len(codes))
    lengths = np.diff(ends, prepend=-1) - 1
    fields = np.diff(np.searchsorted(np.flatnonzero(is_separator), ends), prepend=0) + 1
    bad = (fields != fields[0]) & (lengths > 0)
    if bad.any():
        first = int(np.argmax(bad))
        other = _even_separator(data, but=separator)
        if other is not None:
            decimal = f" {typed('decimal', ',')}" if separator == "," else ""
            hint = f"If the separator is another one, pass {typed('separator', other)}{decimal}."
        elif separator == ",":
            hint = (
                f"Add or remove separators there (with decimal commas pass {typed('decimal', ',')} and the right "
                "data.separator)."
            )
        else:
            hint = "Add or remove separators there."
        raise ValueError(
            f"{name}: {int(bad.sum())} of {int((lengths > 0).sum())} rows do not have the {fields[0]} fields of the "
            f"first row; first at row {first + first_row}: {fields[first]}. {hint}"
        )
    return int(fields[0]), len(ends)


def _has_commas_only(data: bytes) -> bool:
    """Whether the first row has commas and no semicolons: numbers with decimal commas are then in quotation marks."""
    first = data.lstrip().split(b"\n", 1)[0]
    return b"," in first and b";" not in first


def _even_separator(data: bytes, *, but: str) -> str | None:
    """A separator that splits every row into as many fields as the first, more than one; None where there is none."""
    lines = [line for line in data.splitlines() if line.strip()]
    for mark in (";", "\t", "|", ","):
        counts = {line.count(mark.encode()) for line in lines}
        if mark != but and len(counts) == 1 and counts != {0}:
            return mark
    return None


def _read_workbook(name: str, data: bytes, sheet: str | None) -> Grid:
    limits.check_workbook(name, data)
    rows = _sheet_rows(name, data, sheet)
    _refuse_formulas(name, data, sheet)
    cells = limits.sheet_cells(rows)
    if cells.size == 0:
        raise ValueError(f"{name}: the sheet is empty; pass data.sheet=NAME for another one.")
    return Grid(name, cells, np.arange(len(cells)) + 1)


def _sheet_rows(
    name: str, data: bytes, sheet: str | None, *, formulas: bool = False, values_only: bool = True
) -> list[tuple[Any, ...]]:
    """The cells of a sheet: their values or, with ``formulas``, the text of their formulas."""
    import openpyxl

    try:
        with warnings.catch_warnings():
            # openpyxl warns of Excel features (validation, styles) that do not change the cells.
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=not formulas)
            sheets = {each.title: each for each in book.worksheets}
            chosen = None if not sheets else sheets.get(sheet) if sheet else next(iter(sheets.values()))
            if chosen is not None:
                chosen.reset_dimensions()  # a sheet may declare a million rows that it does not have
            rows = None if chosen is None else limits.sheet_rows(name, chosen.iter_rows(values_only=values_only))
    except limits.TooLarge:
        raise
    except Exception as error:  # openpyxl raises whatever its parsers raise: zip, XML, key and value errors
        raise ValueError(
            f"{name} cannot be read as an Excel workbook ({type(error).__name__}: {quoted(error)}); "
            "save it again as .xlsx, or as .csv with that extension."
        ) from None
    if rows is None:
        raise ValueError(f'{name} has no sheet "{sheet}"; it has {listed(sheets)}. Pass data.sheet=NAME.')
    return rows


def _refuse_formulas(name: str, data: bytes, sheet: str | None) -> None:
    """Refuse formulas without a stored result, as programs write them that do not evaluate formulas."""
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        sheets = [part for part in package.namelist() if part.startswith("xl/worksheets/")]
        if not any(b"<f" in package.read(part) for part in sheets):
            return
    formulas = _sheet_rows(name, data, sheet, formulas=True)
    results = _sheet_rows(name, data, sheet, values_only=False)
    open_ones = [
        (row, column)
        for row, (cells, texts) in enumerate(zip(results, formulas, strict=True))
        for column, (cell, text) in enumerate(zip(cells, texts, strict=False))
        # The type "str" without a value is a formula whose stored result is the empty text.
        if _is_formula(text) and cell.value is None and cell.data_type != "str"
    ]
    if open_ones:
        from openpyxl.utils import get_column_letter

        row, column = open_ones[0]
        every = sum(_is_formula(text) for texts in formulas for text in texts)
        raise ValueError(
            f"{name}: {len(open_ones)} of {every} formulas have no stored result; first in cell "
            f"{get_column_letter(column + 1)}{row + 1}: {quoted(_formula_text(formulas[row][column]))}. Open the "
            "workbook in Excel or LibreOffice and save it again, which stores the results, or write numbers there."
        )


def _is_formula(cell: Any) -> bool:
    return type(cell).__name__ in ("ArrayFormula", "DataTableFormula") or (
        isinstance(cell, str) and cell.startswith("=")
    )


def _formula_text(cell: Any) -> str:
    return str(getattr(cell, "text", cell))


def _without_blanks(grid: Grid) -> Grid:
    """The grid without blank rows, and without blank columns at the right end."""
    cells, blank = limits.without_blank_ends(grid.cells)
    if blank.all():
        raise ValueError(f"{grid.name} is empty (blank rows only); it needs rows of data.")
    return Grid(grid.name, cells[~blank] if blank.any() else cells, grid.rows[~blank])
