"""Outlier scores of individuals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import BLUE, GREY, TEXT_SIZE, VERMILION, canvas, data_text, legend_above

_NAMED = 5


def plot_outlier_scores(scores: pd.DataFrame) -> Figure:
    """Outlier scores of all individuals in order; those above the limit are marked, the first few with their names.

    Args:
        scores: indexed by id, with outlier_score, limit and named (``misspecification.csv``).
    """
    ordered = scores.sort_values("outlier_score")
    places = np.arange(1, len(ordered) + 1)
    named = ordered["named"].fillna(False).astype(bool).to_numpy()
    figure, axes = canvas(1, 1, width=5.0, row_height=2.6)
    ax = axes[0][0]
    for chosen, marker, colour, label in ((~named, "o", BLUE, "not outliers"), (named, "D", VERMILION, "outliers")):
        if chosen.any():
            ax.plot(
                places[chosen],
                ordered["outlier_score"].to_numpy(float)[chosen],
                marker,
                color=colour,
                markersize=3,
                markeredgewidth=0,
                linestyle="none",
                label=label,
                rasterized=len(ordered) > 1000,
            )
    ax.axhline(float(ordered["limit"].iloc[0]), color=GREY, linewidth=1.0, linestyle="--", label="limit")
    for place in np.flatnonzero(named)[-_NAMED:]:
        ax.annotate(
            data_text(str(ordered.index[place])),
            (places[place], float(ordered["outlier_score"].iloc[place])),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=TEXT_SIZE - 1,
        )
    ax.set_xlabel("individuals, in order", fontsize=TEXT_SIZE)
    ax.set_ylabel("outlier_score", fontsize=TEXT_SIZE)
    legend_above(figure, ax)
    return figure
