"""The report of a fit of many cells: how large it is, how long it takes to make, and to open in a headless Chromium.

    python benchmarks/report.py FIT [key=value ...]

``FIT`` is a run of fit_population; the report is made beside it, anew, with the further overrides. Opening is timed
from the beginning of the navigation until every figure is drawn, the median of five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from chromium import Browser, browser
from record import ROOT, stopwatch, write_result

_REPEATS = 5


def opened(chromium: Browser, page_file: Path) -> tuple[float, float]:
    """Seconds until the page is there and until every figure is drawn, by the browser's own clock."""
    page = chromium.page()
    page.open(page_file)
    page.wait_for("document.documentElement?.dataset.drawn !== undefined", seconds=120)
    if page.complaints():
        raise SystemExit(f"The page complains: {page.complaints()}")
    loaded, drawn = page.evaluate(
        "[performance.getEntriesByType('navigation')[0].domInteractive, "
        "performance.getEntriesByName('drawn')[0].startTime]"
    )
    page.close()
    return loaded / 1000, drawn / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fit", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    manifest = json.loads((arguments.fit / "manifest.json").read_text())
    root = arguments.fit.resolve().parents[1]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report.py"),
        f"experiment={manifest['experiment']}",
        "fresh=true",
    ]
    with stopwatch() as spent:
        subprocess.run(
            [*command, f"fit={arguments.fit.resolve()}", f"output_root={root}", *arguments.overrides],
            check=True,
            cwd=ROOT,
        )
    run = max((root / "report").iterdir(), key=lambda path: (path / "manifest.json").stat().st_mtime)
    page_file = run / "report.html"
    with browser() as chromium:
        times = [opened(chromium, page_file) for _ in range(_REPEATS)]
    write_result(
        "report",
        {
            "individuals": (manifest["results"]["individuals"], "cells"),
            "megabytes": (page_file.stat().st_size / 1e6, "MB, one file"),
            "open_seconds": (statistics.median(drawn for _, drawn in times), "s, until every figure is drawn"),
            "readable_seconds": (
                statistics.median(loaded for loaded, _ in times),
                "s, until verdict and tables are there",
            ),
            "seconds": (spent.wall, "s, to make it, start-up included"),
            "cpu_seconds": (spent.cpu, "CPU s, to make it"),
        },
        title="The report of a large fit: one HTML file, opened in a headless Chromium.",
    )


if __name__ == "__main__":
    main()
