"""Likelihood profiles of the unknowns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator
from scipy.special import chdtri

from nlme_sbi.plots.canvas import BLUE, GREY, TEXT_SIZE, VERMILION, data_text, legend_above, panels
from nlme_sbi.population.results.intervals import ProfileCurve

_TOP = 12.0  # of the drop in -2 log L that is shown


def plot_profiles(profiles: Sequence[ProfileCurve], errors: Mapping[str, float | None]) -> Figure:
    """Twice the log-likelihood lost over each unknown, the limit of its interval, and the parabola of its error.

    Args:
        profiles: of the unknowns.
        errors: standard error of each unknown, for the parabola.
    """
    figure, axes = panels(len(profiles), columns=3, row_height=1.8)
    for ax, one in zip(axes, profiles, strict=True):
        points, drops = np.array(one.points, float), np.array(one.drops, float)
        threshold = float(chdtri(1, 1 - one.level))
        shown = drops <= _TOP
        error = errors.get(one.unknown)
        if error:
            reach = np.linspace(points[shown].min(), points[shown].max(), 100)
            parabola = ((reach - one.estimate) / error) ** 2
            kept = parabola <= _TOP
            ax.plot(
                reach[kept], parabola[kept], color=GREY, linewidth=1.0, linestyle="--", label="from the standard error"
            )
        ax.plot(*_smooth(points, drops, one.estimate), color=BLUE, linewidth=1.3, label="profile")
        ax.plot(points[shown], drops[shown], "o", color=BLUE, markersize=2.5)
        ax.axhline(threshold, color=VERMILION, linewidth=0.9, label="limit of the interval")
        ax.set_ylim(0, math.ceil(max(1.6 * threshold, float(drops[shown].max()) * 1.05)))
        ax.set_xlabel(data_text(one.unknown), fontsize=TEXT_SIZE)
    figure.supylabel("loss of 2 log L", fontsize=TEXT_SIZE)
    legend_above(figure, axes[0], columns=3)
    return figure


def _smooth(points: np.ndarray, drops: np.ndarray, estimate: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve through the points. Its signed root is nearly linear, so a few points determine it."""
    roots = np.sign(points - estimate) * np.sqrt(np.maximum(drops, 0.0))
    ordered, places = np.unique(points, return_index=True)
    if len(ordered) < 2:
        return points, drops
    between = np.linspace(ordered[0], ordered[-1], 200)
    found = PchipInterpolator(ordered, roots[places])(between) ** 2
    return between[found <= _TOP], found[found <= _TOP]
