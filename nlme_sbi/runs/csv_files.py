"""CSV as people open it in spreadsheets: a text from the data is never a formula there.

A spreadsheet takes a cell that begins with ``=``, ``+``, ``-`` or ``@`` for a formula, which can call programs. Texts
that begin so get an apostrophe in front, which spreadsheets read as "this is text"; numbers stay as they are.
:func:`read_csv` takes the apostrophe away again, so that ids come back as they were.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nlme_sbi.runs.files import require_regular

# With the wide and small forms of these signs, which spreadsheets take for them, and blanks and characters without a
# width in front, which they may skip.
_FORMULA = re.compile(r"'*[\s\x00-\x1f\x7f\xad\u200b-\u200f\u2060\ufeff]*[=+\-@＝＋－＠﹦﹢﹣﹫]")
_GAPS = ("", "NA", "NaN", "nan")
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*|[+-]?(?:inf|Infinity|nan)")


def cell_text(value: Any) -> Any:
    """A cell as it is written: a text that a spreadsheet would run gets an apostrophe in front."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def cell_value(written: Any) -> Any:
    """The inverse of :func:`cell_text`."""
    if isinstance(written, str) and written.startswith("'") and _FORMULA.match(written):
        return written[1:]
    return written


def csv_text(frame: pd.DataFrame, *, float_format: str | None = None) -> str:
    """A table as CSV, without its index.

    Args:
        frame: columns of numbers and texts.
        float_format: such as ``%.8g``; None writes every digit.
    """
    text: str = _map_texts(frame, cell_text).to_csv(index=False, float_format=float_format)
    return text


def records_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as CSV; the keys are the header."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    if records:
        writer.writerow([cell_text(key) for key in records[0]])
        writer.writerows([cell_text(value) for value in row.values()] for row in records)
    return held.getvalue()


def read_csv(path: Path, *, texts: Sequence[str] = ("id",)) -> pd.DataFrame:
    """A table that :func:`csv_text` wrote.

    Args:
        path: of the file.
        texts: columns that hold text, even where it looks like a number or a gap.

    Raises:
        ValueError: where the file is missing or no such table.
    """
    require_regular(path)
    try:
        columns = list(pd.read_csv(path, nrows=0).columns)
        # An id may be called NA; in every other column that is a gap.
        gaps = {name: list(_GAPS) for name in columns if name not in texts}
        kinds = dict.fromkeys(texts, str)
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=gaps)
    except (ValueError, OSError) as problem:  # pandas' parser errors, a wrong encoding
        raise ValueError(
            f"{path} is damaged: it is no table ({problem}). Run its stage again with fresh=true."
        ) from None
    return _map_texts(frame, cell_value)


def _map_texts(frame: pd.DataFrame, change: Any) -> pd.DataFrame:
    """The frame with its texts and column names changed; columns of numbers are not looked at."""
    columns = [frame.iloc[:, place] for place in range(frame.shape[1])]
    made = [
        pd.Series([change(value) for value in column], index=column.index, dtype=object)
        if column.dtype == object or isinstance(column.dtype, (pd.StringDtype, pd.CategoricalDtype))
        else column
        for column in columns
    ]
    if not made:
        return frame
    changed = pd.concat(made, axis=1)
    changed.columns = pd.Index([change(name) for name in frame.columns])
    return changed
