"""Writes features.csv: three recordings of one simulated neuron.

Run ``PYTHONPATH=. python data/hodgkin_huxley/make.py`` at the top of the repository.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from nlme_sbi import Points
from simulators.hodgkin_huxley import FEATURES, HodgkinHuxleyFeatures

SEED = 19520828
TRUTH = (50.0, 5.0)  # g_Na and g_K, mS/cm^2; the other parameters have the values of the reference neuron
RECORDINGS = ("a", "b", "c")


def main() -> None:
    phi = torch.tensor(TRUTH, dtype=torch.float64).expand(len(RECORDINGS), -1)
    generator = torch.Generator().manual_seed(SEED)
    simulator = HodgkinHuxleyFeatures(inferred=("g_Na", "g_K"))
    found = simulator.simulate(phi, Points(len(FEATURES)).sample(len(RECORDINGS), generator), generator)
    table = pd.DataFrame(found.values[:, 0].numpy(), columns=list(FEATURES))
    table.insert(0, "id", RECORDINGS)
    table.to_csv(Path(__file__).parent / "features.csv", index=False, float_format="%.7g")


if __name__ == "__main__":
    main()
