"""Predictions: bands of curves and of new measurements, one small panel each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands
from nlme_sbi.plots.canvas import (
    BLACK,
    BLUE,
    ORANGE,
    TEXT_SIZE,
    data_text,
    label_with_unit,
    legend_above,
    panels,
    set_panel_title,
)
from nlme_sbi.types import Observations


@runtime_checkable
class SignalNames(Protocol):
    """Names and units of signals and time: a simulator has them, and so have data."""

    @property
    def signals(self) -> tuple[str, ...]:
        """Names."""

    @property
    def signal_units(self) -> tuple[str, ...]:
        """A unit each."""

    @property
    def time_unit(self) -> str:
        """Of all times."""


def plot_predictions(
    bands: PredictiveBands,
    titles: Sequence[str],
    names: SignalNames,
    *,
    signal: int = 0,
    data: Observations | None = None,
) -> Figure:
    """Widest and next band of the curve (blue), widest band of new measurements (orange), median, and data.

    Args:
        bands: one row a panel.
        titles: of the panels.
        names: of signals and units.
        signal: which of the signals.
        data: measurements of the same rows, where they belong to what is predicted.

    Raises:
        ValueError: rows and titles disagree.
    """
    if len(titles) != len(bands.times) or (data is not None and len(data) != len(titles)):
        raise ValueError(f"{len(titles)} titles for {len(bands.times)} predictions; give one each, and data for all.")
    figure, axes = panels(len(titles), row_height=1.55)
    for row, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        _bands(ax, bands, row, signal)
        if data is not None:
            seen = data.design.observed[row, :, signal].cpu().numpy()
            times, values = (_plain(one)[seen] for one in (data.design.times[row], data.values[row, :, signal]))
            ax.plot(times, values, ".", color=BLACK, markersize=3.0, zorder=3, label="measured")
        set_panel_title(ax, data_text(title))
    figure.supxlabel(label_with_unit("time", names.time_unit), fontsize=TEXT_SIZE)
    name = names.signals[signal].replace("_", " ")
    figure.supylabel(label_with_unit(name, names.signal_units[signal]), fontsize=TEXT_SIZE)
    legend_above(figure, axes[0], columns=5)
    return figure


def _bands(ax: Axes, bands: PredictiveBands, row: int, signal: int) -> None:
    times, levels = _plain(bands.times[row]), bands.probabilities

    def between(place: int, values: Tensor, colour: str, alpha: float, what: str) -> None:
        low, high = values[row, place, :, signal], values[row, len(levels) - 1 - place, :, signal]
        label = f"{100 * (levels[len(levels) - 1 - place] - levels[place]):g}% of {what}"
        ax.fill_between(times, _plain(low), _plain(high), color=colour, alpha=alpha, linewidth=0, label=label)

    pairs = len(levels) // 2
    if pairs:
        between(0, bands.with_noise, ORANGE, 0.28, "measurements")
    if bands.noise_free is not None:
        for place in range(min(2, pairs)):
            between(place, bands.noise_free, BLUE, 0.30, "curves")
    middle = bands.with_noise if bands.noise_free is None else bands.noise_free
    if len(levels) % 2:
        ax.plot(times, _plain(middle[row, pairs, :, signal]), color=BLUE, linewidth=0.9, label="median")


def _plain(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
