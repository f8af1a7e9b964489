"""Two numbers of every individual against each other."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import BLUE, TEXT_SIZE, VERMILION, canvas, legend_above


def plot_individual_map(
    values: tuple[Float[np.ndarray, " I"], Float[np.ndarray, " I"]],
    labels: tuple[str, str],
    flagged: Bool[np.ndarray, " I"],
    *,
    logs: tuple[bool, bool] = (False, False),
) -> Figure:
    """A point an individual, flagged ones as diamonds; NaN is left out.

    Args:
        values: across and up.
        labels: of the axes.
        flagged: who is.
        logs: which axes are logarithmic.
    """
    figure, axes = canvas(1, 1, width=5.0, row_height=3.2)
    ax = axes[0][0]
    across, up = values
    for chosen, marker, colour, label in ((~flagged, "o", BLUE, "individuals"), (flagged, "D", VERMILION, "flagged")):
        if chosen.any():
            ax.plot(
                across[chosen],
                up[chosen],
                marker,
                color=colour,
                markersize=3.0,
                alpha=0.7,
                markeredgewidth=0,
                linestyle="none",
                label=label,
                rasterized=len(across) > 1000,
            )
    for axis, log in (("x", logs[0]), ("y", logs[1])):
        if log:
            ax.set_xscale("log") if axis == "x" else ax.set_yscale("log")
    ax.set_xlabel(labels[0], fontsize=TEXT_SIZE)
    ax.set_ylabel(labels[1], fontsize=TEXT_SIZE)
    legend_above(figure, ax)
    return figure
