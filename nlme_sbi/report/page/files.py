"""A report on disk: the page, its numbers as JSON and CSV, its figures for papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from nlme_sbi.report.page.content import Report
from nlme_sbi.report.page.drawing import render_all_kinds
from nlme_sbi.report.page.html import page
from nlme_sbi.runs import csv_text, records_text, save_bytes, save_json, save_text


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
                save_bytes(directory / "figures" / f"{picture.name}.{kind}", content)
                drawn |= {picture.name: content} if kind == "svg" else {}
        elif picture.png is not None:
            save_bytes(directory / "figures" / f"{picture.name}.png", picture.png)
        advance(1)
    for table in report.tables:
        save_text(directory / "tables" / f"{table.name}.csv", records_text(table.records()))
    for name, frame in frames.items():
        text = csv_text(frame, float_format="%.8g")
        save_text(directory / "tables" / f"{name}.csv", text)
    save_json(directory / "report.json", report.to_dict())
    save_text(directory / "report.html", page(report, drawn))
