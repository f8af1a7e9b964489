"""Writes biosensor.csv.gz from the six published plate-reader files (SOURCE.md says where they are).

Run ``python data/biosensor/make.py FOLDER``, FOLDER holding proc140916.csv and the other five.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

PLATES = ("140916", "140930", "141006", "141021", "141023", "141028")
COLUMNS = ["id", "plate", "device", "rbs_R", "rbs_S", "C6", "C12", "time", "signal", "value", "CENS"]
SATURATED = 260_000  # the reader's highest value: such readings are lower bounds
_FIRST = 5  # columns before the readings: device, colony, column and row of the well, inducers


def measurements(path: Path) -> pd.DataFrame:
    """One plate as a long table, ``COLUMNS``: one row a reading; CENS is -1 where it is only a lower bound.

    Args:
        path: proc140916.csv or its like: a row of names, a row of times (h), then one row a well.

    Raises:
        ValueError: a name of a column, a device or a well that is not of the published form.
    """
    sheet = pd.read_csv(path, header=None, dtype=str)
    plate = path.stem.removeprefix("proc")
    signals = sheet.iloc[0, _FIRST:].str.extract(r"Raw Data \((\w+)\)")[0]
    if signals.isna().any():
        raise ValueError(f"{path}: column {_FIRST + 1 + int(signals.isna().argmax())} does not name its signal.")
    times = sheet.iloc[1, _FIRST:].astype(float).to_numpy()
    wells = sheet.iloc[2:].reset_index(drop=True)
    readings = wells.iloc[:, _FIRST:].astype(float).set_axis(range(len(times)), axis=1)
    long = readings.stack().rename("value").reset_index().set_axis(["row", "column", "value"], axis=1)
    about = pd.DataFrame([_well(plate, well) for well in wells.iloc[:, :_FIRST].itertuples(index=False, name=None)])
    table = about.loc[long["row"]].reset_index(drop=True)
    table["time"] = times[long["column"]]
    table["signal"] = signals.to_numpy()[long["column"]]
    table["value"] = long["value"]
    fluorescent = table["signal"].isin(["EYFP", "ECFP"])
    table["CENS"] = -((table["value"] >= SATURATED) & fluorescent).astype(int)
    return table[COLUMNS]


def _well(plate: str, cells: tuple[str, ...]) -> dict[str, object]:
    """What the first columns of a well say."""
    device, _, column, row, inducers = cells
    found = re.fullmatch(r"(?:(RS?\d+)(S\d+)|Pcat)_Y81C76", str(device))
    if found is None or not str(column).isdigit() or not str(row).isalpha():
        raise ValueError(f"plate {plate}: {cells} is no well of a double receiver.")
    amounts = dict(re.findall(r"(C6|C12)\s*=\s*([\d.eE+-]+)", str(inducers)))
    return {
        "id": f"{plate}-{row}{column}",
        "plate": plate,
        "device": str(device).removesuffix("_Y81C76"),
        "rbs_R": found[1] or "none",
        "rbs_S": found[2] or "none",
        "C6": float(amounts.get("C6", 0.0)),
        "C12": float(amounts.get("C12", 0.0)),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python data/biosensor/make.py FOLDER   (the folder with proc140916.csv and the other five)")
    plates = [measurements(Path(sys.argv[1]) / f"proc{plate}.csv") for plate in PLATES]
    pd.concat(plates).to_csv(Path(__file__).with_name("biosensor.csv.gz"), index=False, lineterminator="\n")
