"""Influence of single individuals on the estimates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import BLUE, GREY, TEXT_SIZE, canvas, data_text

_INDIVIDUALS = 20


def plot_influence(influence: pd.DataFrame, unknowns: Sequence[str]) -> Figure:
    """The individuals that matter most: shift of every estimate when one is left out, in standard errors.

    Args:
        influence: one row an individual: id, cook, and ``shift.<unknown>``.
        unknowns: names of those that were estimated.
    """
    some = influence.sort_values("cook", ascending=False).head(_INDIVIDUALS)
    shifts = some[[f"shift.{name}" for name in unknowns]].to_numpy(float)
    figure, axes = canvas(1, 2, width=7.0, row_height=0.8 + 0.15 * len(some))
    left, right = axes[0]
    heights = np.arange(len(some))
    left.hlines(heights, 0, some["cook"], color=GREY, linewidth=1.0)
    left.plot(some["cook"], heights, "o", color=BLUE, markersize=4)
    left.set_yticks(heights, [data_text(str(name)) for name in some["id"]])
    left.set_xlabel("influence (Cook's distance)", fontsize=TEXT_SIZE)
    left.set_xlim(left=0)
    left.invert_yaxis()
    size = float(np.nanmax(np.abs(shifts))) or 1.0
    shown = right.imshow(shifts, cmap="PuOr", vmin=-size, vmax=size, aspect="auto")
    right.set_yticks([])
    right.set_xticks(range(len(unknowns)), [data_text(name) for name in unknowns], rotation=60, ha="right")
    bar = figure.colorbar(shown, ax=right)
    bar.set_label("shift when left out (SE)", fontsize=TEXT_SIZE)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1)
    return figure
