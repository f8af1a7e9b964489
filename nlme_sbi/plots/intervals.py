"""Intervals of all unknowns by several methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import GREY, SERIES, TEXT_SIZE, canvas, data_text, legend_above
from nlme_sbi.population.results.intervals import Interval

_MARKERS = ("o", "s", "D", "^")
_REACH = 6.0  # standard errors that the axis shows at most


def plot_intervals(intervals: Sequence[Interval]) -> Figure:
    """A row an unknown, a line a method: limits in standard errors (observed information) from the estimate.

    Args:
        intervals: of the unknowns; a limit may be infinite.

    Raises:
        ValueError: there are none, or none has a standard error to measure by.
    """
    units = {row.unknown: row.se for row in reversed(intervals) if row.se}
    if not units:
        raise ValueError("No interval has a standard error, by which the others could be measured.")
    unknowns = [name for name in dict.fromkeys(row.unknown for row in intervals) if name in units]
    methods = list(dict.fromkeys(row.method for row in intervals))
    quantities = {row.unknown: row.quantity for row in intervals}
    figure, axes = canvas(1, 1, width=6.0, row_height=0.7 + 0.13 * len(unknowns) * (1 + len(methods)))
    ax = axes[0][0]
    for row in intervals:
        if row.unknown not in units:
            continue
        line = methods.index(row.method)
        height = unknowns.index(row.unknown) + 0.7 * ((line + 0.5) / len(methods) - 0.5)
        ends = [_scale(end, row.estimate, units[row.unknown]) for end in (row.lower, row.upper)]
        colour = SERIES[line % len(SERIES)]
        low, high = ends[0] if ends[0] is not None else -_REACH, ends[1] if ends[1] is not None else _REACH
        ax.plot([low, high], [height, height], color=colour, linewidth=1.4, label=row.method)
        ax.plot([0], [height], _MARKERS[line % len(_MARKERS)], color=colour, markersize=3.0)
        for end, sign in zip(ends, (-1, 1), strict=True):
            if end is None or abs(end) >= _REACH:
                ax.plot([sign * _REACH], [height], "<" if sign < 0 else ">", color=colour, markersize=4)
    ax.axvline(0, color=GREY, linewidth=0.7, zorder=0)
    ax.set_yticks(range(len(unknowns)), [data_text(quantities[name]) for name in unknowns])
    ax.invert_yaxis()
    ax.set_xlabel("limits, in standard errors from the estimate", fontsize=TEXT_SIZE)
    legend_above(figure, ax)
    return figure


def _scale(limit: float, estimate: float, unit: float) -> float | None:
    if not math.isfinite(limit):
        return None
    return max(-_REACH, min(_REACH, (limit - estimate) / unit))
