"""The real eGFP cells (Fröhlich et al. 2018) through the three stages; keeps the pictures for docs/.

    python scripts/download_data.py data=egfp
    python benchmarks/egfp.py --posterior RUN [--sheet FILE] [--estimator exact] [--images docs/images]

``RUN`` is a train_flow run of experiment mrna_two_rate; ``FILE`` a copy of the sheet that lies elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from record import stopwatch, write_result
from stages import finished_run, run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--estimator", default="exact")
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    training = json.loads((options.posterior / "manifest.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with stopwatch() as spent:
            run_stage(
                "fit_population",
                "experiment=mrna_two_rate",
                "data=egfp",
                *([f"data.path={options.sheet.resolve()}"] if options.sheet else []),
                f"posterior={options.posterior.resolve()}",
                f"estimator={options.estimator}",
                directory=directory,
            )
        run = finished_run("fit_population", directory)
        fit = json.loads((run / "fit.json").read_text())
        print((run / "table.txt").read_text())
        if options.images is not None:
            options.images.mkdir(parents=True, exist_ok=True)
            for name in ("individual_fits", "population"):
                shutil.copy(run / f"{name}.png", options.images / f"egfp_{name}.png")
    figures = {
        "individuals": (fit["individuals"], "cells"),
        "seconds": (spent.wall, "s, sheet to table and figures, start-up included"),
        "cpu_seconds": (spent.cpu, "CPU s"),
        "training_seconds": (training["seconds"], "s, the network, once"),
        "training_steps": (training["results"]["steps"], "steps"),
        "validation_loss": (training["results"]["validation_loss"], "nats, of the network, held-out pairs"),
        "median_ess": (fit["ess"]["median"], f"effective draws of {fit['draws']}"),
        "smallest_ess": (fit["ess"]["smallest"], f"effective draws of {fit['draws']}"),
        "converged": (fit["converged"], ""),
        "warnings": (len(fit["warnings"]), "warnings under the table"),
    }
    for unknown in fit["unknowns"]:
        if unknown["name"].startswith("mean."):
            figures[unknown["name"]] = (unknown["estimate"], f"log, SE {unknown['se']:.3g}")
    write_result(
        "egfp", figures, title=f"1079 real cells, two-rate model, diagonal Gaussian population, {options.estimator}."
    )


if __name__ == "__main__":
    main()
