"""The first 500 published synthetic cells, from raw fluorescence to the population table, with a trained network.

    python benchmarks/population_500.py --posterior RUN [--cells 500]

``RUN`` is a train_flow run of experiment mrna_two_rate. The time is that of the whole command, start-up included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from published_population import NAMES, estimation_error, published_cells, write_wide
from record import stopwatch, write_result
from stages import finished_run, run_stage

CONSTANT = ("offset", "sigma")


def moments(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Estimated means and variances of the logs, in the simulator's order; variance 0 where constant."""
    unknowns = {entry["name"]: entry["estimate"] for entry in json.loads((run / "fit.json").read_text())["unknowns"]}
    mean = np.array([unknowns[f"mean.{name}"] for name in NAMES])
    variance = np.array([np.exp(2 * unknowns[f"log_sd.{name}"]) if name not in CONSTANT else 0.0 for name in NAMES])
    return mean, variance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=500)
    options = parser.parse_args()
    cells = published_cells(options.cells)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_wide(directory / "cells.csv", cells.values)
        with stopwatch() as spent:
            run_stage(
                "fit_population",
                "experiment=mrna_two_rate",
                f"posterior={options.posterior.resolve()}",
                f"data.path={directory / 'cells.csv'}",
                f"population.constant=[{','.join(CONSTANT)}]",
                directory=directory,
            )
        run = finished_run("fit_population", directory)
        fit = json.loads((run / "fit.json").read_text())
        print((run / "table.txt").read_text())
        mean, variance = moments(run)
    figures = {
        "seconds": (spent.wall, "s, raw data to table, start-up included"),
        "cpu_seconds": (spent.cpu, "CPU s"),
        "mse": (estimation_error(mean, variance, cells.phi), "mean squared error of 12 moments, sample truth"),
        "median_ess": (fit["ess"]["median"], f"effective draws of {fit['draws']}"),
        "smallest_ess": (fit["ess"]["smallest"], f"effective draws of {fit['draws']}"),
        "warnings": (len(fit["warnings"]), "warnings"),
    }
    write_result(
        f"population_{options.cells}",
        figures,
        title=f"First {options.cells} published synthetic cells, estimator prior_ratio, offset and sigma constant.",
    )


if __name__ == "__main__":
    main()
