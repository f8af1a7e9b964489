"""The real eGFP cells (Fröhlich et al. 2018) with offset and noise the same for every cell: exact, and saem against it.

    python scripts/download_data.py data=egfp
    python benchmarks/egfp_constants.py --posterior RUN [--sheet FILE] [--saem | --saem-alone] [--images docs/images]

``RUN`` is a train_flow run of experiment mrna_two_rate; ``FILE`` a copy of the sheet that lies elsewhere. Both fits run
from the command line with default settings. Posteriors of single cells are narrow and have several modes here: -2 log L
on draws that the search did not use, and effective draws, are what counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from record import ROOT, Figure, stopwatch, write_result
from stages import finished_run, run_stage


def fit(options: argparse.Namespace, estimator: str, directory: Path) -> tuple[dict[str, Any], Path, float]:
    """What ``fit.json`` holds, where its run lies, and the CPU seconds of the whole command."""
    directory.mkdir()
    with stopwatch() as spent:
        run_stage(
            "fit_population",
            "experiment=mrna_two_rate",
            "data=egfp",
            *([f"data.path={options.sheet.resolve()}"] if options.sheet else []),
            f"posterior={options.posterior.resolve()}",
            f"estimator={estimator}",
            "population.constant=[offset,sigma]",
            f"seed={options.seed}",
            directory=directory,
        )
    run = finished_run("fit_population", directory)
    return json.loads((run / "fit.json").read_text()), run, spent.cpu


def _exchange(name: str) -> str:
    part, _, parameter = name.partition(".")
    return f"{part}.{({'delta': 'gamma', 'gamma': 'delta'}).get(parameter, parameter)}"


def _largest_distance(exact: list[dict[str, Any]], theirs: dict[str, float]) -> tuple[float, str]:
    return max((abs(one["estimate"] - theirs[one["name"]]) / one["se"], one["name"]) for one in exact)


def saem_figures(options: argparse.Namespace, folder: Path, exact: list[dict[str, Any]]) -> dict[str, Figure]:
    """How far saem's estimates are from those of exact, whose ``name``, ``estimate`` and ``se`` are given."""
    other, _, cpu = fit(options, "saem", folder / "saem")
    theirs = {entry["name"]: entry["estimate"] for entry in other["unknowns"]}
    # Exchanging the two decay rates leaves every signal as it was: the nearer labelling counts.
    exchanged = {_exchange(name): value for name, value in theirs.items()}
    distance, name = min(_largest_distance(exact, found) for found in (theirs, exchanged))
    return {
        "worst_se": (distance, f"standard errors between exact and saem ({name})"),
        "saem_converged": (other["converged"], str(other["message"])),
        "cpu_seconds_saem": (cpu, "CPU s"),
    }


def add_saem(options: argparse.Namespace) -> None:
    """Fit by saem and compare with the estimates of exact that are on disk."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "egfp_constants.json").read_text())["figures"]
    figures = {name: (one["value"], one["unit"]) for name, one in stored.items()}
    exact = [
        {"name": name, "estimate": value, "se": float(unit.rsplit("SE ", 1)[1])}
        for name, (value, unit) in figures.items()
        if name.startswith(("mean.", "log_sd."))
    ]
    with tempfile.TemporaryDirectory() as folder:
        figures |= saem_figures(options, Path(folder), exact)
    write_result("egfp_constants", figures, title="1079 real cells, offset and noise the same for all, exact.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--saem", action="store_true", help="fit by saem, too: about half an hour")
    parser.add_argument("--saem-alone", action="store_true", help="by saem only, beside the figures of exact on disk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    if options.saem_alone:
        add_saem(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        told, run, cpu = fit(options, "exact", Path(folder) / "exact")
        print((run / "table.txt").read_text())
        if options.images is not None:
            options.images.mkdir(parents=True, exist_ok=True)
            for name in ("individual_fits", "population"):
                shutil.copy(run / f"{name}.png", options.images / f"egfp_constants_{name}.png")
        checked = told["verification"]
        figures: dict[str, Figure] = {
            "individuals": (told["individuals"], "cells"),
            "converged": (told["converged"], ""),
            "minus_two_log_likelihood": (checked["repeated"], "on draws that the estimate was not climbed on"),
            "repeat_difference": (abs(checked["repeated"] - checked["deviance"]), "between two independent sets"),
            "repeat_error": (checked["repeated_error"], "Monte-Carlo SE of that difference"),
            "score": (checked["score"], "standard errors left"),
            "poor_individuals": (checked["poor_individuals"], "cells with too few effective draws or heavy tails"),
            "median_ess": (told["ess"]["median"], f"effective draws of {told['draws']}"),
            "cpu_seconds": (cpu, "CPU s, sheet to table and figures, start-up included"),
        }
        for unknown in told["unknowns"]:
            figures[unknown["name"]] = (unknown["estimate"], f"unconstrained; SE {unknown['se']:.2g}")
        if options.saem:
            figures |= saem_figures(options, Path(folder), told["unknowns"])
    write_result("egfp_constants", figures, title="1079 real cells, offset and noise the same for all, exact.")


if __name__ == "__main__":
    main()
