"""What the network sees of an individual: its series on a common grid, as levels and logs, covariates and groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.types import Observations

_LOG_FLOOR = 0.003  # of a signal's largest value: below it logs say more of noise than of the signal


class SeriesFeatures(nn.Module):
    """Features of whole series, standardised by the individuals that are fitted.

    Series are interpolated onto a grid of ``points`` times that all of them reach, which only the network sees: the
    likelihood has every reading at its own time.

    Args:
        fitted: observations that fix grid, scales and covariates.
        points: of the grid; None takes the times themselves where all individuals share them, else the fewest.
    """

    grid: Tensor
    largest: Tensor
    center: Tensor
    scale: Tensor

    def __init__(self, fitted: Observations, points: int | None = None) -> None:
        super().__init__()
        times = fitted.design.times.double()
        last = float(times[:, -1].min())
        if points is None and fitted.design.has_shared_times:
            grid = times[0].clone()
        else:
            grid = torch.linspace(float(times[:, 0].max()), last, points or int(_lengths(fitted).min()))
        self.register_buffer("grid", grid.double())
        self.register_buffer("largest", _largest(fitted))
        raw = self._raw(fitted)
        self.register_buffer("center", raw.mean(0))
        # What hardly changes between individuals is not blown up.
        self.register_buffer("scale", raw.std(0).clamp_min(1e-2))

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.center)

    def forward(self, observations: Observations) -> Float[Tensor, "I F"]:
        """Features of every individual, about 0 with SD 1."""
        return ((self._raw(observations) - self.center) / self.scale).float()

    def _raw(self, observations: Observations) -> Float[Tensor, "I F"]:
        series = _interpolated(observations, self.grid) / self.largest
        parts = [series.flatten(1), torch.log(series.clamp_min(0) + _LOG_FLOOR).flatten(1)]
        covariates = observations.design.covariates
        if covariates is not None:
            values = covariates.values.double()
            # Doses and concentrations run over powers of ten; signs are kept.
            parts.append(values.sign() * torch.log1p(values.abs()))
        return torch.cat(parts, 1)


def _lengths(observations: Observations) -> Tensor:
    return observations.design.observed.any(-1).sum(1)


def _largest(observations: Observations) -> Tensor:
    shown = torch.where(observations.design.observed, observations.values.abs(), 0.0)
    return shown.double().amax((0, 1)).clamp_min(1e-30)


def _interpolated(observations: Observations, grid: Tensor) -> Float[Tensor, "I M C"]:
    """Every signal of every individual at the grid's times; a signal that was not measured is 0."""
    times, values = observations.design.times.double(), observations.values.double()
    everything = bool(observations.design.observed.all())
    if everything and times.shape[1] == len(grid) and bool((times == grid).all()):
        return values
    found = np.zeros((len(observations), len(grid), values.shape[2]))
    for row in range(len(observations)):
        for signal in range(values.shape[2]):
            there = observations.design.observed[row, :, signal]
            if bool(there.any()):
                found[row, :, signal] = np.interp(grid, times[row, there], values[row, there, signal])
    return torch.from_numpy(found)


def as_float(observations: Observations) -> Observations:
    """The same in single precision, which networks and their draws are in."""
    times = observations.design.times
    narrow = times[:1].float().expand(times.shape) if observations.design.has_shared_times else times.float()
    lower, upper = observations.lower, observations.upper
    return replace(
        observations,
        values=observations.values.float(),
        design=replace(observations.design, times=narrow),
        lower=None if lower is None else lower.float(),
        upper=None if upper is None else upper.float(),
    )
