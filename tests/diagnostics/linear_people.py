"""A linear population whose predictive distributions are normal with known moments."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations

MEAN, SD, NOISE = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.8, 0.5]).double(), 0.6


class Lines(MechanisticSimulator):
    """y = level + slope t + noise; a second signal (if any) is ten higher, with the same noise."""

    parameters = ParameterSpace(
        (Parameter("level", transform="identity"), Parameter("slope", transform="identity"), Parameter("sd"))
    )
    noise = Additive(sd="sd")

    def __init__(self, signals: int = 1) -> None:
        self.signals = tuple(f"signal_{place}" for place in range(signals))
        self.signal_units = ("",) * signals

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        level, slope, _ = phi[..., None, :].unbind(-1)
        line = level + slope * times_for(phi, design)
        return torch.stack([line + 10 * place for place in range(len(self.signals))], -1)


def people(count: int, generator: torch.Generator, *, replicates: int | None = None) -> Tensor:
    """Parameters ``(count, 3)``, or ``(count, replicates, 3)``."""
    shape = (count,) if replicates is None else (count, replicates)
    phi = MEAN + SD * torch.randn((*shape, 2), generator=generator).double()
    return torch.cat([phi, torch.full((*shape, 1), math.log(NOISE), dtype=torch.float64)], -1)


def design(count: int, times: Tensor, signals: int = 1) -> Design:
    return Design.regular(times.double(), count, signals)


def measured(values: Tensor, times: Tensor) -> Observations:
    signals = Lines(values.shape[2]).signals
    names = tuple(f"p{row}" for row in range(len(values)))
    return Observations(
        names, values.double(), design(len(values), times, values.shape[2]), signals, ("",) * len(signals)
    )


def data_set(count: int, times: Tensor, generator: torch.Generator, signals: int = 1) -> Observations:
    phi = people(count, generator)
    return measured(Lines(signals).simulate(phi, design(count, times, signals), generator).values, times)


def without(data: Observations, mask: Tensor) -> Observations:
    """With some measurements missing."""
    changed = replace(data.design, observed=mask, times=data.design.times.clone())
    return replace(data, values=torch.where(mask, data.values, 0.0), design=changed)


def posterior_draws(data: Observations, draws: int, generator: torch.Generator) -> Tensor:
    """Exact draws of every individual given its data (first signal) and the population, ``(I, draws, 3)``."""
    times = data.design.times[0]
    loadings = torch.stack([torch.ones_like(times), times], 1)
    precision = loadings.T @ loadings / NOISE**2 + torch.diag(SD**-2)
    covariance = torch.linalg.inv(precision)
    centre = (data.values[..., 0] @ loadings / NOISE**2 + MEAN / SD**2) @ covariance
    noise = torch.randn((len(data), draws, 2), generator=generator).double()
    phi = centre[:, None] + noise @ torch.linalg.cholesky(covariance).T
    return torch.cat([phi, torch.full((*phi.shape[:2], 1), math.log(NOISE), dtype=torch.float64)], -1)
