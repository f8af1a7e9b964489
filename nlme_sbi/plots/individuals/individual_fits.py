"""Data and predictions of single individuals, one small panel each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nlme_sbi.diagnostics.fit.predictive_bands import PredictiveBands
from nlme_sbi.plots.canvas import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    TEXT_SIZE,
    data_text,
    label_with_unit,
    legend_above,
    panels,
    set_panel_title,
)
from nlme_sbi.types import Censoring, Observations


def plot_individual_fits(
    observations: Observations, bands: PredictiveBands, *, rows: Sequence[int] | None = None, signal: int = 0
) -> Figure:
    """Measurements, the median prediction, and the 50% and 95% bands without and with measurement noise.

    Args:
        observations: ``I`` individuals.
        bands: of the same individuals, in the same order.
        rows: which of them; the first 12 when left out.
        signal: which of the signals.

    Raises:
        ValueError: observations and bands disagree, or a row is not there.
    """
    if len(observations) != len(bands.times):
        raise ValueError(f"{len(observations)} individuals but predictive bands for {len(bands.times)}.")
    chosen = list(range(min(12, len(observations)))) if rows is None else [int(row) for row in rows]
    if not chosen or not all(0 <= row < len(observations) for row in chosen):
        raise ValueError(f"Rows {chosen} are not all within the {len(observations)} individuals; choose at least one.")
    figure, axes = panels(len(chosen), row_height=1.55)
    for ax, row in zip(axes, chosen, strict=True):
        _bands(ax, bands, row, signal)
        _measurements(ax, observations, row, signal)
        name = data_text(observations.ids[row])
        set_panel_title(ax, f"individual {name}" if name.isdigit() else name)
    figure.supxlabel(label_with_unit("time", observations.time_unit), fontsize=TEXT_SIZE)
    measured = observations.signals[signal].replace("_", " ")
    figure.supylabel(label_with_unit(measured, observations.signal_units[signal]), fontsize=TEXT_SIZE)
    legend_above(figure, axes[0], columns=5)
    return figure


def _bands(ax: Axes, bands: PredictiveBands, row: int, signal: int) -> None:
    times = _plain(bands.times[row])

    def quantile(probability: float, with_noise: bool) -> np.ndarray:
        return _plain(bands.quantile(probability, with_noise=with_noise)[row, :, signal])

    # The wide bands of new measurements lie under the bands of the curve itself.
    layers = (
        (0.025, 0.975, True, ORANGE, 0.28, 1.0, "95% of new measurements"),
        (0.025, 0.975, False, BLUE, 0.30, 2.0, "95% of curves"),
        (0.25, 0.75, False, BLUE, 0.55, 2.0, "50% of curves"),
    )
    for low, high, noisy, colour, alpha, layer, label in layers:
        ends = quantile(low, noisy), quantile(high, noisy)
        ax.fill_between(times, *ends, color=colour, alpha=alpha, linewidth=0, zorder=layer, label=label)
    ax.plot(times, quantile(0.5, False), color=BLUE, linewidth=0.9, zorder=2.5, label="median")


def _measurements(ax: Axes, observations: Observations, row: int, signal: int) -> None:
    seen = observations.design.observed[row, :, signal].cpu()
    times = _plain(observations.design.times[row])
    codes = torch.zeros_like(seen, dtype=torch.int64)
    if observations.censoring is not None:
        codes = observations.censoring[row, :, signal].cpu()
    kinds = (
        (Censoring.NONE, observations.values, ".", "measured"),
        (Censoring.LEFT, observations.upper, "v", "below this"),
        (Censoring.RIGHT, observations.lower, "^", "above this"),
    )
    # Many points to a panel must not hide the curve: they are small, pale and lie under it.
    many = int(seen.sum()) > 40
    colour, size, layer = (GREY, 1.5, 1.5) if many else (BLACK, 4.0, 3.0)
    for kind, source, marker, label in kinds:
        here = (seen & (codes == int(kind))).numpy()
        if source is not None and here.any():
            heights = _plain(source[row, :, signal])[here]
            ax.plot(
                times[here], heights, marker, color=colour, markersize=size, linestyle="none", zorder=layer, label=label
            )
    between = (seen & (codes == int(Censoring.INTERVAL))).numpy()
    if observations.lower is not None and observations.upper is not None and between.any():
        ends = [_plain(bound[row, :, signal])[between] for bound in (observations.lower, observations.upper)]
        ax.vlines(times[between], ends[0], ends[1], color=colour, linewidth=1.5, zorder=layer, label="between these")


def _plain(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
