"""Summary networks: from one individual's measurements and design to a vector that a flow is conditioned on.

Both networks start from engineered features, which gain two nats over raw values on the reference task. Their scalings
are fitted to quantiles of pilot simulations.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nlme_sbi.individual_model.time_covariates import time_covariates_read
from nlme_sbi.networks.scaling import ContextScaling, SignalScaling, TimeScaling, dose_of, fast_asinh
from nlme_sbi.types import Design, Simulations, Simulator


@dataclass(frozen=True)
class DataShape:
    """Shape of the data, on which a network's layers depend; stored with the weights.

    Args:
        times: number of times (of the longest series).
        signals: number of signals.
        missing: whether simulated designs have missing values.
        shared_times: whether all simulated designs have the same times.
        covariates: names of the covariates that the simulator reads.
        levels: number of levels of each categorical one.
        takes_doses: whether the simulator reads dose records.
        compartments: largest number of a compartment that doses enter.
        censored: whether values may be censored.
        along: names of the covariates in time that the simulator reads.
    """

    times: int
    signals: int
    missing: bool
    shared_times: bool
    covariates: tuple[str, ...] = ()
    levels: tuple[tuple[str, int], ...] = ()
    takes_doses: bool = False
    compartments: int = 1
    censored: bool = False
    along: tuple[str, ...] = ()

    @classmethod
    def of(cls, pilot: Simulations, simulator: Simulator) -> DataShape:
        """The shape of simulated data."""
        covariates = pilot.design.covariates
        levels = {} if covariates is None else covariates.levels
        return cls(
            times=pilot.values.shape[1],
            signals=pilot.values.shape[2],
            missing=not bool(pilot.design.observed.all()),
            shared_times=pilot.design.has_shared_times,
            covariates=simulator.covariates,
            levels=tuple((name, len(levels[name])) for name in simulator.covariates if name in levels),
            takes_doses=simulator.takes_doses,
            compartments=_largest_compartment(pilot.design) if simulator.takes_doses else 1,
            censored=pilot.design.limits is not None,
            along=time_covariates_read(simulator),
        )

    @property
    def covariates_alone(self) -> ContextScaling:
        """A new scaling of covariates, for networks that read doses as tokens."""
        return ContextScaling(self.covariates, dict(self.levels), takes_doses=False)

    @property
    def context(self) -> ContextScaling:
        """A new scaling of dose and covariates."""
        return ContextScaling(self.covariates, dict(self.levels), self.takes_doses)


def _largest_compartment(design: Design) -> int:
    events = design.events
    return 1 if events is None else max(1, int(torch.where(events.doses, events.compartment, 1).max()))


@runtime_checkable
class SummaryNetwork(Protocol):
    """Interface of a summary network, a ``torch.nn.Module``.

    Attributes:
        width: length ``H`` of the summary vector.
    """

    width: int

    def fit_scaling(self, pilot: Simulations) -> None:
        """Fit every scaling to pilot simulations."""

    def __call__(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        """Summary vectors of individuals."""


@runtime_checkable
class SummarySettings(Protocol):
    """Settings in the config group ``summary``."""

    def build(self, shape: DataShape) -> SummaryNetwork:
        """A new network with random weights, for data of this shape."""


def carry_forward(values: Float[Tensor, "B T C"], observed: Bool[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
    """Replace missing values by the last one before (LOCF), leading ones by the first one; 0 where there is none."""
    position = torch.arange(values.shape[1], device=values.device)[None, :, None].expand(values.shape)
    last = torch.where(observed, position, -1).cummax(dim=1).values
    first = observed.to(torch.int8).argmax(dim=1, keepdim=True)
    source = torch.where(last < 0, first, last)
    filled = values.gather(1, source)
    return torch.where(observed.any(dim=1, keepdim=True), filled, torch.zeros_like(filled))


def series_statistics(
    values: Float[Tensor, "B T C"], observed: Bool[Tensor, "B T C"]
) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B 1 C"]]:
    """Mean and SD of every series over its observed values."""
    weight = observed.to(values.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    mean = (values * weight).sum(1, keepdim=True) / count
    variance = ((values - mean).square() * weight).sum(1, keepdim=True) / count
    return mean, variance.sqrt()


def noise_level(
    values: Float[Tensor, "B T C"], observed: Bool[Tensor, "B T C"]
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Mean and median absolute second difference of every series, a measure of its noise without trend."""
    if values.shape[1] < 3:
        zero = torch.zeros_like(values[:, 0])
        return zero, zero
    bend = (values[:, 2:] - 2 * values[:, 1:-1] + values[:, :-2]).abs()
    inside = observed[:, 2:] & observed[:, 1:-1] & observed[:, :-2]
    count = inside.sum(1).clamp(min=1)
    mean = torch.where(inside, bend, 0).sum(1) / count
    median = torch.where(inside, bend, torch.nan).nanmedian(dim=1).values
    return mean, torch.nan_to_num(median)


class SeriesFeatures(nn.Module):
    """Features of every time of every series, and side features of the whole series.

    Per time and signal: asinh of the scaled value, z-score within the series, asinh of the scaled first difference.
    Per series: scaled mean, log SD, log mean and log median absolute second difference.
    """

    per_time = 3
    per_series = 4

    def __init__(self, signals: int) -> None:
        super().__init__()
        self.signals = SignalScaling(signals)

    def forward(
        self, values: Float[Tensor, "B T C"], observed: Bool[Tensor, "B T C"]
    ) -> tuple[Float[Tensor, "B T F"], Float[Tensor, "B G"]]:
        scaling = self.signals
        mean, sd = series_statistics(values, observed)
        centred = (values - mean) / (sd + 1e-3 * scaling.step)
        steps = torch.zeros_like(values)
        steps[:, 1:] = fast_asinh((values[:, 1:] - values[:, :-1]) / scaling.step)
        coarse = fast_asinh((values - scaling.location) / scaling.coarse)
        bend_mean, bend_median = noise_level(values, observed)
        floor = 1e-3 * scaling.step
        side = (
            fast_asinh((mean[:, 0] - scaling.location) / scaling.coarse),
            torch.log((sd[:, 0] + floor) / scaling.coarse),
            torch.log((bend_mean + floor) / scaling.step),
            torch.log((bend_median + floor) / scaling.step),
        )
        return torch.cat((coarse, centred, steps), dim=2), torch.cat(side, dim=1)


def perceptron(widths: list[int]) -> nn.Sequential:
    """Linear layers of the given widths with SiLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class GridNetwork(nn.Module):
    """Summary of series on one fixed grid: all features of all times through a perceptron."""

    def __init__(self, shape: DataShape, settings: GridSummary) -> None:
        super().__init__()
        self.features = SeriesFeatures(shape.signals)
        self.context = shape.context
        self.sees_missing = shape.missing
        per_time = self.features.per_time + int(self.sees_missing)
        inputs = shape.signals * (shape.times * per_time + self.features.per_series) + self.context.width
        self.network = perceptron([inputs, *[settings.hidden] * settings.layers, settings.width])
        self.width = settings.width

    def fit_scaling(self, pilot: Simulations) -> None:
        """Fit every scaling to pilot simulations."""
        self.features.signals.fit(pilot.values, pilot.design.observed)
        self.context.fit(pilot.design)

    def forward(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        observed = design.observed
        if self.sees_missing:
            values = carry_forward(values, observed)
        series, side = self.features(values, observed)
        parts = [series.flatten(1), side, self.context(design)]
        if self.sees_missing:
            parts.append(observed.flatten(1).to(values.dtype))
        output: Tensor = self.network(torch.cat(parts, dim=1))
        return output


class PooledNetwork(nn.Module):
    """Summary of rows (time, values, mask) at any times: rows are encoded, then pooled around nodes in time.

    Node ``m`` takes a weighted mean of the encoded rows, with weights ``(1 + d^2/h_m^2)^-2`` of the distance ``d`` in
    warped time; each node's width ``h_m`` is learned. This resamples an irregular series to a fixed grid, which a
    perceptron then reads together with the mean and maximum over all rows, series statistics, dose and covariates.
    Short series are also read row by row.
    """

    nodes: Tensor

    def __init__(self, shape: DataShape, settings: PooledSummary) -> None:
        super().__init__()
        signals = shape.signals
        self.features = SeriesFeatures(signals)
        self.time = TimeScaling()
        self.context = shape.context
        self.register_buffer("nodes", torch.linspace(0, 1, settings.nodes))
        # Initially neighbouring nodes are one SD apart, enough overlap for gradients to change the widths.
        self.log_precision = nn.Parameter(torch.full((settings.nodes,), 2 * math.log(settings.nodes)))
        row_inputs = signals * (self.features.per_time + 2) + 3
        self.encode = perceptron([row_inputs, settings.row_hidden, settings.row_width])
        raw = signals * self.features.per_time
        inputs = settings.nodes * (settings.row_width + raw + 1) + 2 * settings.row_width
        inputs += signals * (self.features.per_series + 1) + self.context.width
        self.times, self.direct = shape.times, shape.times <= settings.direct_rows
        inputs += shape.times * row_inputs if self.direct else 0
        self.network = perceptron([inputs, *[settings.hidden] * settings.layers, settings.width])
        self.width = settings.width

    def fit_scaling(self, pilot: Simulations) -> None:
        """Fit every scaling to pilot simulations."""
        observed, times = pilot.design.observed, pilot.design.times
        self.features.signals.fit(pilot.values, observed)
        self.context.fit(pilot.design)
        if self.context.takes_doses:
            times = times - dose_of(pilot.design)[0][:, None]
        self.time.fit(times, observed.any(dim=2))

    def _place(self, design: Design) -> Float[Tensor, "B T"]:
        times = design.times.float()
        if self.context.takes_doses:
            times = times - dose_of(design)[0].float()[:, None]
        if times.shape[0] > 1 and times.stride(0) == 0:
            shared: Tensor = self.time(times[:1])
            return shared.expand(times.shape)
        place: Tensor = self.time(times)
        return place

    def _weights(self, place: Float[Tensor, "B T"], present: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Pooling weights ``(B, M, T)`` and the log amount of data near each node, ``(B, M)``."""
        if place.shape[0] > 1 and place.stride(0) == 0 and bool(present.all()):
            weights, near = self._weights(place[:1], present[:1])
            return weights.expand(place.shape[0], -1, -1), near.expand(place.shape[0], -1)
        distance = (place[:, None, :] - self.nodes[:, None]).square()
        # Not a Gaussian kernel: the denormal numbers of its far tails take CPUs thirty times as long.
        kernel = (1 + distance * self.log_precision.exp()[:, None]).square().reciprocal() * present[:, None, :]
        total = kernel.sum(dim=2, keepdim=True).clamp(min=1e-12)
        return kernel / total, total[..., 0].log()

    def forward(self, values: Float[Tensor, "B T C"], design: Design) -> Float[Tensor, "B H"]:
        observed = design.observed
        present = observed.any(dim=2)
        values = carry_forward(values, observed)
        series, side = self.features(values, observed)
        place = self._place(design)
        gap = torch.zeros_like(values[..., 0])
        gap[:, 1:] = place[:, 1:] - place[:, :-1]
        fine = fast_asinh((values - self.features.signals.location) / self.features.signals.fine)
        clock = torch.stack((place, gap, place.square()), dim=2)
        inputs = torch.cat((series, fine, observed.to(values.dtype), clock), dim=2)
        rows = self.encode(inputs)
        weights, near = self._weights(place, present)
        pooled = torch.bmm(weights, torch.cat((rows, series), dim=2))
        masked = torch.where(present[..., None], rows, 0)
        mean = masked.sum(1) / present.sum(1, keepdim=True).clamp(min=1)
        top = rows.masked_fill(~present[..., None], -1e4).amax(1)
        count = torch.log1p(observed.sum(1).to(values.dtype))
        parts = [pooled.flatten(1), near, mean, top, side, count, self.context(design)]
        if self.direct:
            # A shorter series is padded with zeros, and so is every row without a measurement.
            direct = torch.where(present[..., None], inputs, 0)
            if bool(present[:, self.times :].any()):
                raise ValueError(
                    f"Individuals have up to {inputs.shape[1]} times, but the network was trained on at most "
                    f"{self.times}; simulate and train with designs like the data's (design=of_data)."
                )
            parts.append(nn.functional.pad(direct, (0, 0, 0, self.times - inputs.shape[1])).flatten(1))
        output: Tensor = self.network(torch.cat(parts, dim=1))
        return output


@dataclass(frozen=True)
class GridSummary:
    """Summary for individuals that are all measured at the same times (missing values allowed if they were simulated).

    Args:
        width: length of the summary vector.
        hidden: width of the hidden layers.
        layers: number of hidden layers.
    """

    width: int = 64
    hidden: int = 256
    layers: int = 2

    def build(self, shape: DataShape) -> GridNetwork:
        """A new network with random weights; raises ``ValueError`` when simulated times differ between individuals."""
        if not shape.shared_times:
            raise ValueError(
                "summary=grid needs the same times for every individual, but the simulated designs differ in theirs; "
                "use summary=pooled."
            )
        return GridNetwork(shape, self)


@dataclass(frozen=True)
class PooledSummary:
    """Summary for individuals with irregular or individual measurement times.

    Args:
        width: length of the summary vector.
        hidden: width of the layers after pooling.
        layers: number of layers after pooling.
        row_hidden: width of the row encoder's hidden layer.
        row_width: length of an encoded row.
        nodes: number of nodes in time that rows are pooled around.
        direct_rows: series of at most this many times are also read row by row, in order of time, because pooling
            blurs the little that few samples contain about the noise. Longer series than simulated are then refused.
    """

    width: int = 64
    hidden: int = 256
    layers: int = 2
    row_hidden: int = 32
    row_width: int = 16
    nodes: int = 32
    direct_rows: int = 32

    def build(self, shape: DataShape) -> PooledNetwork:
        """A new network with random weights."""
        return PooledNetwork(shape, self)
