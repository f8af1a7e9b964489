"""A report on disk: the page, its numbers as JSON and CSV, its figures for papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import pandas as pd

from nlme_sbi.report.page.content import Report
from nlme_sbi.report.page.drawing import render_all_kinds
from nlme_sbi.report.page.html import page
from nlme_sbi.runs import csv_text, records_text, save_json, write_atomically


def save_report(
    directory: Path,
    report: Report,
    frames: Mapping[str, pd.DataFrame],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write ``report.html``, ``report.json``, ``tables/*.csv`` and ``figures/*``.

    Args:
        directory: of the run.
        report: what is on the page.
        frames: further numbers, each a CSV in ``tables/``.
        advance: called with the number of figures just drawn.
    """
    drawn: dict[str, bytes] = {}
    for picture in report.pictures:
        if picture.drawn is not None:
            for kind, content in render_all_kinds(picture.drawn, name=picture.name).items():
                write_atomically(directory / "figures" / f"{picture.name}.{kind}", _writer(content))
                drawn |= {picture.name: content} if kind == "svg" else {}
        elif picture.png is not None:
            write_atomically(directory / "figures" / f"{picture.name}.png", _writer(picture.png))
        advance(1)
    for table in report.tables:
        write_atomically(directory / "tables" / f"{table.name}.csv", _writer(records_text(table.records()).encode()))
    for name, frame in frames.items():
        text = csv_text(frame, float_format="%.8g")
        write_atomically(directory / "tables" / f"{name}.csv", _writer(text.encode()))
    save_json(directory / "report.json", report.to_dict())
    write_atomically(directory / "report.html", _writer(page(report, drawn).encode()))


def _writer(content: bytes) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write
