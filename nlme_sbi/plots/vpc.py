"""Visual predictive checks."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlme_sbi.diagnostics.fit.vpc import SignalQuantiles, VisualPredictiveCheck
from nlme_sbi.plots.canvas import BLACK, BLUE, GREY, PALE, TEXT_SIZE, VERMILION, canvas, label_with_unit, legend_above
from nlme_sbi.types import Observations

_POINTS = 2000  # measurements drawn; more are one grey mass


def plot_vpc(check: VisualPredictiveCheck, observations: Observations, *, signal: int = 0) -> Figure:
    """Observed quantiles over time on the bands in which those of simulated data sets lie; those outside are marked.

    Args:
        check: of these observations.
        observations: drawn as points where they were not corrected.
        signal: which of the signals.
    """
    found = check.signals[signal]
    censored = found.censored is not None and bool(np.nansum(found.censored) > 0)
    figure, axes = canvas(2 if censored else 1, 1, width=5.5, row_height=2.6 if not censored else 2.2)
    ax = axes[0][0]
    if found.correction == "none":
        _points(ax, observations, signal)
    middle = check.probabilities.index(min(check.probabilities, key=lambda level: abs(level - 0.5)))
    for place in range(len(check.probabilities)):
        _quantile(ax, found, place, is_middle=place == middle)
    corrected = "" if found.correction == "none" else ", prediction-corrected"
    name = found.signal.replace("_", " ")
    ax.set_ylabel(label_with_unit(name, observations.signal_units[signal]) + corrected, fontsize=TEXT_SIZE)
    if censored:
        _draw_censored(axes[1][0], found)
    axes[-1][0].set_xlabel(label_with_unit("time", observations.time_unit), fontsize=TEXT_SIZE)
    legend_above(figure, ax, columns=3)
    return figure


def _quantile(ax: Axes, found: SignalQuantiles, place: int, *, is_middle: bool) -> None:
    colour = BLUE if is_middle else PALE
    band = "median" if is_middle else "outer quantiles"
    low, high, seen = found.lower[place], found.upper[place], found.observed[place]
    ax.fill_between(
        found.times, low, high, color=colour, alpha=0.35 if is_middle else 0.8, linewidth=0, label=f"simulated, {band}"
    )
    style = "-" if is_middle else "--"
    ax.plot(
        found.times,
        seen,
        style,
        color=BLACK,
        linewidth=1.2,
        label=f"observed {'median' if is_middle else 'outer quantiles'}",
    )
    with np.errstate(invalid="ignore"):
        outside = (seen < low) | (seen > high)
    if outside.any():
        ax.plot(found.times[outside], seen[outside], "D", color=VERMILION, markersize=4, label="outside its band")


def _points(ax: Axes, observations: Observations, signal: int) -> None:
    seen = observations.design.observed[:, :, signal].cpu().numpy()
    times = observations.design.times.cpu().numpy()[seen]
    values = observations.values[:, :, signal].cpu().numpy()[seen]
    chosen = np.random.default_rng(0).permutation(len(times))[:_POINTS]
    ax.plot(
        times[chosen],
        values[chosen],
        ".",
        color=GREY,
        markersize=5 if len(chosen) < 300 else 2.5,
        alpha=0.6,
        markeredgewidth=0,
        zorder=1,
        rasterized=len(chosen) > 1000,
        label="measurements",
    )


def _draw_censored(ax: Axes, found: SignalQuantiles) -> None:
    if found.censored is None:
        return
    observed, low, _, high = found.censored
    ax.fill_between(found.times, low, high, color=BLUE, alpha=0.35, linewidth=0)
    ax.plot(found.times, observed, color=BLACK, linewidth=1.2)
    ax.set_ylabel("share below the limit", fontsize=TEXT_SIZE)
    ax.set_ylim(bottom=0)
