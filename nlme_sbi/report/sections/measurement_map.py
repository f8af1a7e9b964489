"""The map of all measurements: every number of a measurement against every other."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nlme_sbi.plots.canvas import label_with_unit
from nlme_sbi.plots.residuals import plot_measurements
from nlme_sbi.report.page.content import Picture
from nlme_sbi.types import Observations

_POINTS = 2000
_FAR = 3.0  # residuals beyond this are flagged
_COLUMNS = (
    ("individual_prediction", "individual prediction"),
    ("value", "measured"),
    ("population_prediction", "population prediction"),
    ("time", "time"),
    ("iwres", "individual weighted residual"),
)


def measurement_explorer(frame: pd.DataFrame, observations: Observations) -> Picture:
    """A picture in which measurements can be pointed at, with the farthest residuals flagged.

    Args:
        frame: one row a measurement: id, time, signal, value, population_prediction, individual_prediction, iwres.
        observations: for units.
    """
    units = {"time": observations.time_unit}
    if len(observations.signals) == 1:
        units |= dict.fromkeys(
            ("value", "population_prediction", "individual_prediction"), observations.signal_units[0]
        )
    far = (frame["iwres"].abs() > _FAR).to_numpy()
    rows = np.arange(len(frame))
    if len(frame) > _POINTS:
        generator = np.random.default_rng(0)
        kept = [*generator.permutation(np.flatnonzero(far))[: _POINTS // 4], *generator.permutation(len(frame))]
        rows = np.sort(np.array(list(dict.fromkeys(int(row) for row in kept))[:_POINTS]))
    some, flagged = frame.iloc[rows], far[rows]
    flags = [{"label": f"residual beyond ±{_FAR:g}", "count": int(far.sum()), "rows": np.flatnonzero(flagged).tolist()}]
    thin = f" {len(rows)} of {len(frame)} are drawn, those with far residuals first." if len(rows) < len(frame) else ""
    return Picture(
        "measurements",
        "All measurements",
        f"Scatter plot of {len(frame)} measurements against their individual predictions; {int(far.sum())} have "
        "residuals beyond ±3. The menus choose other numbers; tables/goodness_of_fit.csv holds them all.",
        f"One point a measurement. Choose one to see its individual's fit, where that is on the page.{thin}",
        drawn=plot_measurements(some["individual_prediction"].to_numpy(float), some["value"].to_numpy(float), flagged),
        interactive={
            "kind": "explorer",
            "noun": "measurements",
            "tall": True,
            "ids": some["id"].astype(str).tolist(),
            "total": len(frame),
            "axes": [
                {
                    "label": label_with_unit(words, units.get(column, "")),
                    "log": False,
                    "values": some[column].astype(float).tolist(),
                }
                for column, words in _COLUMNS
            ],
            "start": [0, 1],
            "flags": flags if far.any() else [],
        },
    )
