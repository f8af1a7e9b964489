"""A mechanism that is known to fail, with and without a neural correction: cells after mRNA transfection.

    python benchmarks/grey_cells.py [--real FILE] [--cells 80] [--seconds 60] [--rows FILE]

The two-rate model is fitted to cells by ``scripts/train_hierarchical.py`` as it stands, and as a grey box whose network
corrects the decay of mRNA as a function of mRNA and time, the same for all cells; ``scripts/check_fit.py`` then looks
at both. The cells, each with every third of its 180 readings: those of a ribosome-limited model, for which the
mechanism is wrong; bundled two-rate cells, for which it is right and the network must stay small; and real ones
(``--real FILE``, the sheet that ``scripts/download_data.py`` gets). A quarter of the cells is held out. Every fit is a
line of --rows; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from models_population import published_ribosome_cells
from published_population import TIMES
from record import ROOT, Figure, stopwatch, write_result
from stages import finished_run, run_stage

HIERARCHY = """_target_: nlme_sbi.Hierarchy
parameters:
  delta: {level: individual, mean: -1.0, sd: 1.5}
  gamma: {level: individual, mean: -3.0, sd: 1.5}
  k_m0_scale: {level: individual, mean: 6.0, sd: 2.5}
  t0: {level: individual, mean: 0.0, sd: 1.0}
  offset: {level: individual, mean: 2.0, sd: 2.0}
  sigma: {level: global, mean: -2.5, sd: 1.5}
"""
WHITE = "_target_: two_rate_ode.TwoRateOde\n"
GREY = """_target_: simulators.grey_box.GreyBox
white: {_target_: two_rate_ode.TwoRateOde}
terms: {mrna: 0.1}
inputs: {mrna: 1.0, time: 10.0}
penalty: 10.0
"""
BOXES = {"white": WHITE, "grey": GREY}


def fit(kind: str, data: list[str], seconds: float) -> dict[str, Any]:
    """One line of --rows: scores of held-out cells, findings of check_fit, and how much of the model is the network."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for group, text in (("simulator", BOXES[kind]), ("hierarchy", HIERARCHY)):
            (directory / "own" / group).mkdir(parents=True)
            (directory / "own" / group / "two_rate.yaml").write_text(text)
        own = ["--config-dir", str(directory / "own"), "simulator=two_rate", "hierarchy=two_rate", "prior=gaussian"]
        own += ["experiment=double_receiver", "experiment.name=cells", "trust=[two_rate_ode]", *data]
        own += ["preparation.scale=none", "preparation.baseline=none", "held_out.share=0.25"]
        own += ["held_out.chooses_weights=false", f"training.max_cpu_seconds={seconds}", "training.steps=100000"]
        own += ["training.validate_every=500", "individual_population.groups=false"]
        own += ["individual_population.covariates=false", "evaluation.draws=400"]
        with stopwatch() as spent:
            run_stage("train_hierarchical", *own, directory=directory)
        run = finished_run("train_hierarchical", directory)
        run_stage("check_fit", f"fit={run}", "trust=[two_rate_ode]", directory=directory)
        checks = json.loads((finished_run("check_fit", directory) / "findings.json").read_text())
        scores = pd.read_csv(run / "scores.csv").set_index("side").loc["held_out"]
        bounds = pd.read_csv(run / "bounds.csv")
        share = float("nan")
        if kind == "grey":
            table = pd.read_csv(run / "grey_box.csv")
            share = float(table.neural_share.max())
        out = bounds[bounds.side == "held_out"]
        return {
            "log_density": float(out.given_population.mean()),
            "crps": float(scores.predicted_crps),
            "coverage": float(scores.predicted_coverage_90),
            "rmse": float(scores.reproduced_rmse),
            "neural_share": share,
            "cpu": spent.cpu,
            "findings": {one["check"]: [one["light"], one["sentence"]] for one in checks["findings"]},
        }


def tables(cells: int, real: Path | None) -> dict[str, pd.DataFrame]:
    """Log fluorescence, a column a cell, a row for every third time (h)."""
    bundled = pd.read_csv(ROOT / "data" / "mrna_two_rate_cells" / "cells.csv", index_col=0)
    made = pd.DataFrame(published_ribosome_cells(cells)[1].T, index=pd.Index(TIMES, name="time_h"))
    found = {"ribosome": made.add_prefix("cell_"), "two_rate": bundled}
    if real is not None:
        sheet = pd.read_excel(real, header=None, index_col=0)
        found["real"] = np.log(sheet.set_index(sheet.index / 3600).rename_axis("time_h")).add_prefix("cell_")
    return {name: table.iloc[::3, :cells] for name, table in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="the sheet of the real cells")
    parser.add_argument("--cells", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training a fit")
    parser.add_argument("--rows", type=Path, default=ROOT / "grey_cells_rows.jsonl")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {(row["cells"], row["box"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for cells, values in tables(given.cells, given.real).items():
            path = Path(folder) / f"{cells}.csv"
            values.to_csv(path)
            for box in BOXES:
                if (cells, box) not in done:
                    found = fit(box, ["data=mrna_two_rate_cells", f"data.path={path}"], given.seconds)
                    rows.append({"cells": cells, "box": box, **found})
                    with given.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1], indent=1), flush=True)
    words = {
        "log_density": "nats a held-out cell, given the population",
        "crps": "log a.u., held-out cells, predictions that did not see them",
        "coverage": "of 90% bands of held-out cells that did not see them",
        "rmse": "log a.u., held-out cells, reproduced by their own posteriors",
        "neural_share": "of a rate or signal, the largest",
        "cpu": "CPU s, start-up and scores included",
    }
    figures: dict[str, Figure] = {}
    for row in rows:
        for key, unit in words.items():
            if row[key] == row[key]:  # not NaN
                figures[f"{row['cells']}_{row['box']}_{key}"] = (row[key], unit)
        reds = sum(light == "red" for light, _ in row["findings"].values())
        figures[f"{row['cells']}_{row['box']}_reds"] = (reds, f"red of {len(row['findings'])} checks")
    write_result("grey_cells", figures, title="A mechanism that fails, with and without a neural correction.")


if __name__ == "__main__":
    main()
