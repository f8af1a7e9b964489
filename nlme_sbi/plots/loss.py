"""Training history."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import BLACK, BLUE, GREY, SKY, TEXT_SIZE, canvas, legend_above


def plot_history(history: pd.DataFrame) -> Figure:
    """Losses and learning rate over training steps; the best held-out loss is marked.

    Args:
        history: columns ``step``, ``train_loss``, ``validation_loss``, ``learning_rate``; losses in nats.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    missing = sorted({"step", "train_loss", "validation_loss", "learning_rate"} - set(history.columns))
    if missing or history.empty:
        raise ValueError(f"The training history has no {', '.join(missing) or 'rows'}; it holds {list(history)}.")
    figure, axes = canvas(2, 1, width=5.0, row_height=1.8)
    (above,), (below,) = axes
    above.plot(history["step"], history["train_loss"], color=SKY, linewidth=1.0, label="training pairs")
    validated = history.dropna(subset=["validation_loss"])
    above.plot(validated["step"], validated["validation_loss"], color=BLUE, linewidth=1.5, label="held-out pairs")
    if not validated.empty:
        best = validated.iloc[int(validated["validation_loss"].to_numpy().argmin())]
        label = f"best: {best['validation_loss']:.3g} at step {best['step']:.0f}"
        above.plot(best["step"], best["validation_loss"], "o", color=BLACK, markersize=4, label=label)
    above.set_ylabel("mean −log q(φ | y)\n(nats)")
    above.tick_params(labelbottom=False)
    _leave_out_the_first_fall(above, history)
    below.plot(history["step"], history["learning_rate"], color=GREY, linewidth=1.2)
    below.set_ylabel("learning rate")
    below.set_xlabel("training step")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", scilimits=(-2, 2))
    below.yaxis.get_offset_text().set_fontsize(TEXT_SIZE - 1)
    below.sharex(above)
    figure.align_ylabels()
    legend_above(figure, above, columns=3)
    return figure


def _leave_out_the_first_fall(ax: Axes, history: pd.DataFrame) -> None:
    """Let the axis begin after the first tenth of training, if what came before would flatten the rest; say so."""
    losses = history[["train_loss", "validation_loss"]]
    settled = losses.iloc[len(losses) // 10 :].to_numpy(dtype=float)
    low, high = float(np.nanmin(losses.to_numpy(dtype=float))), float(np.nanmax(settled))
    top = high + 0.15 * (high - low)
    beyond = int((losses > top).any(axis=1).sum())
    if high > low and beyond:
        ax.set_ylim(low - 0.05 * (high - low), top)
        ax.annotate(
            f"{beyond} early values lie above",
            xy=(0.99, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=TEXT_SIZE - 1,
            color=GREY,
        )
