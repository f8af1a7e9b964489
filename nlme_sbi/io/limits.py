"""Limits on the size of files: regular files only, and refused before memory runs out, with a remedy."""

from __future__ import annotations

import csv
import gzip
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

MOST_BYTES = 2**31  # of a file, and of the content of a .gz file
MOST_WORKBOOK_BYTES = 2**29  # of XML in a workbook, unpacked
MOST_COLUMNS = 1_000_000
MOST_CELLS = 100_000_000  # of a table, some 60 bytes each
MOST_SHEET_CELLS = 20_000_000
WIDE = 200  # columns from which pandas, which handles each separately, is slower than a plain parser
_SUSPICIOUS_BYTES, _SUSPICIOUS_RATIO = 2**26, 200  # tables of data are compressed ten- to fiftyfold, never more
_CHUNK = 1 << 20
_LONGEST_CELL = 2**20
_REMEDY = "Leave out what is not needed, or split the file."


class TooLarge(ValueError):
    """A file is larger than the readers accept."""


def read_bytes(path: Path) -> bytes:
    """Read a file's bytes; pipes and devices, which may never end, and huge files are refused before opening."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name} is a pipe or device, not a file; write its content to a file first.")
        if found.st_size > MOST_BYTES:
            raise too_large(path.name, found.st_size)
        with path.open("rb") as file:
            data = file.read(found.st_size + 1)  # not more: read() allocates the requested size first
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    if len(data) > MOST_BYTES:
        raise too_large(path.name, len(data))
    return data


def too_large(name: str, size: int) -> TooLarge:
    """The error for a file with too many bytes."""
    return TooLarge(
        f"{name} holds {size / 2**30:.1f} GiB or more; at most {MOST_BYTES / 2**30:.0f} GiB are read. {_REMEDY}"
    )


def gunzip(path: Path, data: bytes) -> bytes:
    """Unpack a .gz file; refused while it is unpacked where the content is too large, or too large for its size."""
    pieces: list[bytes] = []
    size = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while piece := stream.read(_CHUNK):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise too_large(path.name, size)
                if size > _SUSPICIOUS_BYTES and size > _SUSPICIOUS_RATIO * len(data):
                    raise _bomb(path.name, f"gunzip {path.name}")
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"{path.name} is not a complete gzip file; copy it again, or rename it.") from None
    return b"".join(pieces)


def _bomb(name: str, remedy: str) -> ValueError:
    return ValueError(
        f"{name} unpacks to more than {_SUSPICIOUS_RATIO} times its size, as no table of measurements does. If you "
        f"trust it, unpack it yourself ({remedy})."
    )


def check_workbook(name: str, data: bytes) -> None:
    """Refuse a workbook whose XML would not fit into memory, by its list of contents, before it is unpacked.

    Sizes in that list are upper bounds: no more is unpacked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError):
        return  # the reader says what is wrong with it
    if size > _SUSPICIOUS_BYTES and size > _SUSPICIOUS_RATIO * len(data):
        raise _bomb(name, "save the sheet as .csv")
    if size > MOST_WORKBOOK_BYTES:
        raise ValueError(
            f"{name} holds {size / 2**20:.0f} MiB of sheets; at most {MOST_WORKBOOK_BYTES / 2**20:.0f} MiB are read of "
            "a workbook. Save the sheet as .csv, which may be larger."
        )


def sheet_rows(name: str, rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows of a sheet without empty cells at their ends; raises :class:`TooLarge` while they are read."""
    kept: list[tuple[Any, ...]] = []
    cells = 0
    for row in rows:
        width = len(row)
        while width and row[width - 1] is None:
            width -= 1
        kept.append(tuple(row[:width]))
        cells += width + 1
        if cells > MOST_SHEET_CELLS:
            raise TooLarge(
                f"{name}: the sheet has more than {MOST_SHEET_CELLS} cells. Delete what is not needed, or save it as "
                ".csv, which may be larger."
            )
    return kept


def sheet_cells(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Rows of a sheet as one block of strings, short ones padded with empty cells."""
    cells = np.full((len(rows), max((len(row) for row in rows), default=0)), "", dtype=object)
    for place, row in enumerate(rows):
        cells[place, : len(row)] = ["" if cell is None else str(cell) for cell in row]
    return pd.DataFrame(cells, dtype=object, copy=False)


def check_size(name: str, rows: int, columns: int) -> None:
    """Refuse a table with too many columns or cells."""
    if columns > MOST_COLUMNS:
        raise ValueError(
            f"{name} has {columns} columns; at most {MOST_COLUMNS} are read. Write it as a long table, one row a "
            "measurement (data=long_table), or check the separator (data.separator)."
        )
    if rows * columns > MOST_CELLS:
        raise ValueError(f"{name} has {rows} rows of {columns} columns; at most {MOST_CELLS} cells are read. {_REMEDY}")


def wide_cells(data: bytes, separator: str, *, rows: int, columns: int) -> pd.DataFrame:
    """A text with many columns as one block of strings, ``(rows, columns)``; raises ``csv.Error`` where rows differ.

    In one pass over the cells: a frame with a block for each column is a thousand times slower.
    """
    cells = np.full((rows, columns), "", dtype=object)
    previous = csv.field_size_limit(_LONGEST_CELL)
    try:
        lines = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline=""), delimiter=separator)
        for place, line in enumerate(lines):
            if len(line) == columns:
                cells[place] = line
            elif line:  # misplaced quotation marks; padding the row would silently shift its values
                raise csv.Error(f"row {place + 1} from the first one has {len(line)} fields, not {columns}")
    finally:
        csv.field_size_limit(previous)
    return pd.DataFrame(cells, dtype=object, copy=False)


def without_blank_ends(cells: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """A frame without blank columns at its right end, and a mask of its blank rows."""
    if cells.shape[1] >= WIDE:
        filled = cells.to_numpy(dtype=object) != ""
        used = np.flatnonzero(filled.any(axis=0))
        width = int(used[-1]) + 1 if len(used) else 1
        return cells.iloc[:, :width], ~filled.any(axis=1)
    width = cells.shape[1]
    while width > 1 and bool((cells.iloc[:, width - 1] == "").all()):
        width -= 1
    kept = cells.iloc[:, :width]
    blank = (kept.iloc[:, 0] == "").to_numpy(dtype=bool, copy=True)
    blank[blank] = (kept[blank] == "").all(axis=1).to_numpy(dtype=bool)
    return kept, blank
