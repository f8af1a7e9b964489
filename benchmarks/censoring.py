"""Concentrations below a limit of quantification: their probability in the likelihood (M3) against leaving them out.

    python benchmarks/censoring.py [--sets 100]

20 individuals, one intravenous bolus, one compartment; CL and V vary by 30%, additive error. The limit is the 30%
quantile of all concentrations, so that mostly late ones lie below it. Every data set is fitted three times through the
command line, with ``posterior=none`` and nothing tuned: with a column CENS, without the rows below the limit, and with
all values as if there were no limit. Maximum likelihood of 20 individuals is biased itself (SDs are too small, also
with all values); what censoring adds is the difference from the third fit. The truth is what the data were simulated
from. Every fit is a line of --rows; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from record import Figure, write_result
from stages import fitted

TIMES = np.array([0.5, 1, 2, 4, 8, 12, 18, 24], dtype=float)
TRUTH = {"mean.CL": math.log(4.0), "mean.V": math.log(30.0), "log_sd.CL": math.log(0.3), "log_sd.V": math.log(0.3)}
TRUTH["mean.sigma"] = math.log(0.2)
DOSE, INDIVIDUALS, BELOW = 100.0, 20, 0.3
OPTIONS = ["experiment=intravenous", "simulator.compartments=1", "simulator.noise=additive"]
OPTIONS += ["population.constant=[sigma]"]
OPTIONS += ["individuals.draws=0", "individuals.modes=false", "predictions.table=false"]  # tables alone
METHODS = ("m3", "dropped", "complete")


def study(seed: int, path: Path, *, method: str) -> None:
    """Write a simulated event table, what lies below the limit censored or left out."""
    random = np.random.default_rng(seed)
    clearance = 4.0 * np.exp(0.3 * random.standard_normal((INDIVIDUALS, 1)))
    volume = 30.0 * np.exp(0.3 * random.standard_normal((INDIVIDUALS, 1)))
    exact = DOSE / volume * np.exp(-clearance / volume * TIMES)
    measured = exact + 0.2 * random.standard_normal(exact.shape)
    limit = float(np.quantile(measured, BELOW))
    lines = ["ID,TIME,DV,AMT,EVID,CENS"]
    for number, values in enumerate(measured, start=1):
        lines.append(f"{number},0,.,{DOSE:g},1,0")
        for time, value in zip(TIMES, values.tolist(), strict=True):
            if value >= limit or method == "complete":
                lines.append(f"{number},{time:g},{value!r},.,0,0")
            elif method == "m3":
                lines.append(f"{number},{time:g},{limit!r},.,0,1")
    path.write_text("\n".join(lines) + "\n")


def estimates(seed: int, method: str) -> dict[str, list[float]]:
    """Estimate and limits of the 95% interval of every unknown, on the scale of the unknowns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.csv"
        study(seed, path, method=method)
        fit = fitted([*OPTIONS, f"data.path={path}"], Path(folder), seed)
    found = {entry["name"]: entry for entry in fit["unknowns"]}
    return {name: [found[name]["estimate"], found[name]["se"], float(fit["converged"])] for name in TRUTH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--rows", type=Path, default=Path("censoring_rows.jsonl"))
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {(row["seed"], row["method"]) for row in rows}
    for method in METHODS:
        for seed in range(given.sets):
            if (seed, method) not in done:
                rows.append({"seed": seed, "method": method, "found": estimates(seed, method)})
                with given.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    figures: dict[str, Figure] = {}
    rows = [row for row in rows if row["seed"] < given.sets]
    biases: dict[str, dict[str, float]] = {}
    for method in METHODS:
        chosen = [row["found"] for row in rows if row["method"] == method]
        every = np.array([[found[name] for name in TRUTH] for found in chosen])
        off = every[..., 0] - np.array(list(TRUTH.values()))
        held = np.abs(off) < 1.96 * every[..., 1]
        biases[method] = dict(zip(TRUTH, off.mean(0).tolist(), strict=True))
        spread = off.std(0, ddof=1) / math.sqrt(len(chosen))
        figures |= {
            f"bias_{method}_{name}": (bias, f"log scale; Monte-Carlo SE {spread[place]:.4f}, {len(chosen)} data sets")
            for place, (name, bias) in enumerate(biases[method].items())
        }
        figures[f"coverage_{method}"] = (float(held.mean()), f"of {held.size} intervals hold the truth, nominally 0.95")
        figures[f"converged_{method}"] = (int((every[:, 0, 2] > 0).sum()), f"of {len(chosen)} fits")
    added = {
        method: {name: bias - biases["complete"][name] for name, bias in biases[method].items()}
        for method in ("m3", "dropped")
    }
    figures |= {
        f"added_{method}_{name}": (value, "log scale, bias over that of the fits with all values")
        for method, found in added.items()
        for name, value in found.items()
    }
    for name in TRUTH:
        share = abs(added["m3"][name]) / abs(added["dropped"][name])
        figures[f"added_share_{name}"] = (share, "what M3 adds over what leaving out adds")
    for key, compared in (("bias_share", biases), ("added_share", added)):
        worst = max(TRUTH, key=lambda name, compared=compared: abs(compared["dropped"][name]))
        share = abs(compared["m3"][worst]) / abs(compared["dropped"][worst])
        figures[key] = (share, f"M3's over that of leaving out, {worst}, where the latter is largest")
    write_result("censoring", figures, title="30% of the concentrations below the limit: M3 and leaving them out.")


if __name__ == "__main__":
    main()
