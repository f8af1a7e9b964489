"""Simulated copies of a data set: what every check of a fitted model against its data compares with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nlme_sbi.types import Design, Observations, Simulator


@torch.no_grad()
def simulate_replicates(
    simulator: Simulator, phi: Float[Tensor, "I K D"], design: Design, generator: torch.Generator
) -> Float[Tensor, "I K T C"]:
    """Measurements of ``K`` simulated individuals for each row of the design, NaN where a simulation failed."""
    individuals, count = phi.shape[:2]
    rows = torch.arange(individuals, device=phi.device).repeat_interleave(count)
    output = simulator.simulate(phi.flatten(0, 1), design[rows], generator)
    values = torch.where((output.status == 0)[:, None, None], output.values, torch.nan)
    return values.reshape(individuals, count, *values.shape[1:])


def sort_measured_first(there: Bool[Tensor, "*shape"], dim: int) -> Int[Tensor, "*shape"]:
    """Places along ``dim`` with those that are ``there`` before the others, each in their order."""
    return (~there).to(torch.int8).sort(dim=dim, stable=True).indices


def measurements_frame(observations: Observations, **columns: Float[Tensor, "I T C"]) -> pd.DataFrame:
    """One row a measurement: id, time, signal, value, censored (where anything is), and the given columns.

    Args:
        observations: the data.
        columns: ``(I, T, C)``; rows in which the last one is NaN are left out.
    """
    mask = observations.design.observed
    if columns:
        mask = mask & ~torch.isnan(list(columns.values())[-1].to(mask.device))
    who, when, what = (place.cpu().numpy() for place in torch.nonzero(mask, as_tuple=True))
    frame = pd.DataFrame(
        {
            "id": np.array(observations.ids)[who],
            "time": observations.design.times.cpu().numpy()[who, when],
            "signal": np.array(observations.signals)[what],
            "value": observations.values.cpu().numpy()[who, when, what],
        }
    )
    if observations.censoring is not None:
        frame["censored"] = (observations.censoring.cpu().numpy() != 0)[who, when, what]
    for name, values in columns.items():
        frame[name] = values.cpu().numpy()[who, when, what]
    return frame
