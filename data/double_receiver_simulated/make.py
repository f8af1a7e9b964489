"""Writes wells.csv.gz, folds.csv, truth.csv and truth_wells.csv: simulated biosensors, and what they were made from.

Run ``PYTHONPATH=. python data/double_receiver_simulated/make.py`` at the top of the repository.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nlme_sbi import Covariates, Design
from simulators.double_receiver import SIGNALS, DoubleReceiver

SEED = 20190609
# Ribosome binding sites of LuxR and of LasR, as in the published devices; a device is a pair of them.
DEVICES = (("none", "none"), ("R33", "S32"), ("R33", "S34"), ("RS100", "S32"), ("RS100", "S34"), ("R33", "S175"))
LOG_SITE_R = {"none": 0.0, "R33": 0.8, "RS100": -1.0}  # log synthesis of LuxR relative to a device without a site
LOG_SITE_S = {"none": 0.0, "S32": 0.5, "S34": 1.3, "S175": -0.8}
DOSES = (4.0, 20.0, 100.0, 500.0, 2500.0)  # nM
TREATMENTS = ((0.0, 0.0), *((dose, 0.0) for dose in DOSES), *((0.0, dose) for dose in DOSES), (100.0, 100.0))
PLATES = {"a": np.arange(44) * 0.4, "b": np.arange(50) * 0.36}  # h; wells alternate between them
SATURATED = 0.65  # of EYFP and ECFP: such readings are lower bounds
COLUMNS = ["id", "plate", "device", "rbs_R", "rbs_S", "C6", "C12", "time", "signal", "value", "CENS"]
# Natural values that all wells share, in units of the scaled signals, hours and nM.
SHARED = {
    "e76": 0.03,
    "e81": 0.02,
    "KGR76": 15.0,
    "KGS76": 0.5,
    "KGR81": 0.5,
    "KGS81": 15.0,
    "KR6": 0.01,
    "KR12": 3e-4,
    "KS6": 3e-4,
    "KS12": 0.01,
    "nR": 0.9,
    "nS": 1.1,
    "aYFP": 0.9,
    "aCFP": 1.0,
    "dR": 0.15,
    "dS": 0.2,
    "drfp": 0.02,
    "dyfp": 0.05,
    "dcfp": 0.04,
    "a530": 0.08,
    "a480": 0.1,
    "sd_OD": 0.012,
    "sd_mRFP1": 0.01,
    "sd_EYFP": 0.008,
    "sd_ECFP": 0.008,
}
# Each well's own: natural median, SD of the unconstrained value between wells, and between devices.
OWN = {"r": (0.95, 0.06, 0.10), "K": (0.75, 0.10, 0.05), "tlag": (1.2, 0.10, 0.10), "rc": (0.11, 0.08, 0.06)}


@dataclass(frozen=True)
class Wells:
    """Simulated wells: a row of ``table`` each, unconstrained parameters ``(wells, D)``, devices' effects."""

    table: pd.DataFrame
    phi: torch.Tensor
    effects: pd.DataFrame


def wells(seed: int = SEED) -> Wells:
    """Every device with every treatment, with their true parameters."""
    rng = np.random.default_rng(seed)
    space = DoubleReceiver().parameters
    natural = torch.tensor([{**SHARED, "aR": 1.0, "aS": 1.0}.get(name, 1.0) for name in space.names])
    for name, (median, _, _) in OWN.items():
        natural[space.index(name)] = median
    base = space.to_unconstrained(natural.double())
    effects = {
        "-".join(device): {name: rng.normal(0.0, between) for name, (_, _, between) in OWN.items()}
        for device in DEVICES
    }
    rows, phi = [], []
    for site_r, site_s in DEVICES:
        device = "Pcat" if site_r == "none" else site_r + site_s
        for number, (c6, c12) in enumerate(TREATMENTS):
            value = base.clone()
            for name, (_, sd, _) in OWN.items():
                value[space.index(name)] += effects[f"{site_r}-{site_s}"][name] + rng.normal(0.0, sd)
            value[space.index("aR")] = LOG_SITE_R[site_r]
            value[space.index("aS")] = LOG_SITE_S[site_s]
            plate = "ab"[number % 2]
            rows.append((f"{plate}-{device}-{number + 1}", plate, device, site_r, site_s, c6, c12))
            phi.append(value)
    table = pd.DataFrame(rows, columns=COLUMNS[:7])
    return Wells(table, torch.stack(phi), pd.DataFrame(effects).T)


def measurements(made: Wells, seed: int = SEED) -> pd.DataFrame:
    """The long table, ``COLUMNS``: one row a reading, CENS -1 where the reader was saturated."""
    simulator = DoubleReceiver()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for plate, times in PLATES.items():
        rows = np.flatnonzero(made.table.plate == plate)
        inducers = torch.tensor(made.table.loc[rows, ["C6", "C12"]].to_numpy())
        design = Design.regular(torch.from_numpy(times), len(rows), len(SIGNALS))
        design = replace(design, covariates=Covariates(("C6", "C12"), inducers))
        values = simulator.simulate(made.phi[rows], design, generator).values.numpy()
        part = made.table.loc[rows].loc[np.repeat(rows, len(times) * len(SIGNALS))].reset_index(drop=True)
        part["time"] = np.tile(np.repeat(times.round(6), len(SIGNALS)), len(rows))
        part["signal"] = np.tile(SIGNALS, len(rows) * len(times))
        part["value"] = values.reshape(-1)
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    saturated = table["signal"].isin(["EYFP", "ECFP"]) & (table["value"] >= SATURATED)
    table.loc[saturated, "value"] = SATURATED
    table["CENS"] = -saturated.astype(int)
    return table[COLUMNS]


def truth() -> pd.DataFrame:
    """What wells share, and the medians and SDs of what is their own: a row a parameter, natural values."""
    rows = [(name, "global", "", value, np.nan, np.nan) for name, value in SHARED.items()]
    rows += [("aR", "group", site, float(np.exp(log)), np.nan, np.nan) for site, log in LOG_SITE_R.items()]
    rows += [("aS", "group", site, float(np.exp(log)), np.nan, np.nan) for site, log in LOG_SITE_S.items()]
    rows += [(name, "individual", "", *three) for name, three in OWN.items()]
    return pd.DataFrame(rows, columns=["parameter", "level", "site", "natural", "sd_wells", "sd_devices"])


if __name__ == "__main__":
    folder = Path(__file__).parent
    made = wells()
    table = measurements(made)
    table.to_csv(
        folder / "wells.csv.gz",
        index=False,
        lineterminator="\n",
        float_format="%.5g",
        compression={"method": "gzip", "mtime": 1},
    )
    order = np.random.default_rng(SEED).permutation(len(made.table))
    folds = pd.DataFrame({"id": made.table["id"], "fold": order % 4 + 1})
    folds.to_csv(folder / "folds.csv", index=False, lineterminator="\n")
    truth().to_csv(folder / "truth.csv", index=False, lineterminator="\n", float_format="%.6g")
    own = pd.DataFrame(made.phi.numpy(), columns=DoubleReceiver().parameters.names)[[*OWN, "aR", "aS"]]
    own.insert(0, "id", made.table["id"])
    own.to_csv(folder / "truth_wells.csv", index=False, lineterminator="\n", float_format="%.6g")
