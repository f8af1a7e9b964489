"""Posterior draws of an individual, parameter against parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import gaussian_kde
from torch import Tensor

from nlme_sbi.plots.canvas import BLACK, GREY, SERIES, TEXT_SIZE, canvas, legend_above, require_names
from nlme_sbi.types import Prior

Draws = Float[Tensor, "S D"]
Columns = NDArray[np.float64]


def plot_pairs(
    draws: Draws | Sequence[Draws],
    names: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    prior: Prior | None = None,
    truth: Float[Tensor, " D"] | None = None,
) -> Figure:
    """Histograms on the diagonal; below it, draws with the regions that hold 50% and 95% of them.

    Args:
        draws: ``(S, D)`` of one individual, or several such to compare.
        names: axis labels of the parameters (:func:`nlme_sbi.plots.canvas.parameter_labels`).
        labels: what each set of draws is.
        prior: its marginal densities are drawn on the diagonal.
        truth: ``(D,)`` marked where known.
    """
    sets = [draws] if isinstance(draws, Tensor) else list(draws)
    titles = list(labels) if labels is not None else [f"draws {number + 1}" for number in range(len(sets))]
    if not sets or len(titles) != len(sets):
        raise ValueError(f"{len(titles)} labels for {len(sets)} sets of draws; give one label for each.")
    arrays = [_plain(one) for one in sets]
    count = len(names)
    for array in arrays:
        require_names(names, array.shape[1])
    exact = None if truth is None else _plain(truth)
    ranges = _ranges(arrays, exact)
    figure, axes = canvas(count, count, row_height=7.0 / count if count > 2 else 2.4)
    for row in range(count):
        for column in range(count):
            ax = axes[row][column]
            if column > row:
                ax.remove()
            elif column == row:
                _diagonal(ax, [array[:, row] for array in arrays], titles, ranges[row])
                _prior_density(ax, prior, row, ranges[row])
                _mark(ax, exact, row)
            else:
                _cloud(ax, [array[:, [column, row]] for array in arrays], (ranges[column], ranges[row]))
                _mark(ax, exact, column, row)
            _label(ax, names, row, column, count)
    figure.align_labels()
    legend_above(figure, axes[0][0])
    return figure


def _plain(values: Tensor) -> Columns:
    return values.detach().cpu().double().numpy()


def _ranges(arrays: list[Columns], truth: Columns | None) -> list[tuple[float, float]]:
    """For each parameter, where nearly all draws are, and the truth; a constant gets a range of its own."""
    found = []
    for column in range(arrays[0].shape[1]):
        ends = np.concatenate([np.quantile(array[:, column], [0.002, 0.998]) for array in arrays])
        if truth is not None:
            ends = np.append(ends, truth[column])
        low, high = float(ends.min()), float(ends.max())
        margin = 0.08 * (high - low) or max(0.5 * abs(low), 0.5)
        found.append((low - margin, high + margin))
    return found


def _diagonal(ax: Axes, columns: list[Columns], titles: list[str], limits: tuple[float, float]) -> None:
    for values, title, colour in zip(columns, titles, SERIES * len(columns), strict=False):
        ax.hist(values, bins=40, range=limits, density=True, histtype="stepfilled", color=colour, alpha=0.25)
        ax.hist(values, bins=40, range=limits, density=True, histtype="step", color=colour, linewidth=1.2, label=title)
    ax.set_xlim(limits)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _prior_density(ax: Axes, prior: Prior | None, column: int, limits: tuple[float, float]) -> None:
    if prior is None:
        return
    # A picture needs no more draws, and the same ones every time.
    sample = prior.sample(4000, torch.Generator().manual_seed(0))[:, column]
    places = np.linspace(*limits, 100)
    ax.plot(places, gaussian_kde(_plain(sample))(places), color=GREY, linewidth=1.2, linestyle=":", label="prior")


def _cloud(ax: Axes, pairs: list[Columns], limits: tuple[tuple[float, float], tuple[float, float]]) -> None:
    for pair, colour in zip(pairs, SERIES * len(pairs), strict=False):
        shown = pair[:: max(1, len(pair) // 500)]
        ax.plot(shown[:, 0], shown[:, 1], ".", color=colour, markersize=1.5, alpha=0.35, rasterized=True)
        counts, across, up = np.histogram2d(pair[:, 0], pair[:, 1], bins=50, range=limits)
        smooth = gaussian_filter(counts, 1.5)
        if np.ptp(smooth) > 0:
            middle = [0.5 * (edges[1:] + edges[:-1]) for edges in (across, up)]
            ax.contour(*middle, smooth.T, levels=_levels(smooth), colors=colour, linewidths=1.0)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def _levels(heights: Columns) -> list[float]:
    """Heights above which 95% and 50% of the mass lie, increasing and different."""
    ordered = np.sort(heights.ravel())[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    return sorted({float(ordered[np.searchsorted(mass, share)]) for share in (0.95, 0.5)} - {0.0})


def _mark(ax: Axes, truth: Columns | None, column: int, row: int | None = None) -> None:
    if truth is None:
        return
    ax.axvline(truth[column], color=BLACK, linewidth=0.9, linestyle="--", label="truth")
    if row is not None:
        ax.axhline(truth[row], color=BLACK, linewidth=0.9, linestyle="--")


def _label(ax: Axes, names: Sequence[str], row: int, column: int, count: int) -> None:
    if row == count - 1:
        ax.set_xlabel(names[column])
    else:
        ax.tick_params(labelbottom=False)
    if column == 0 and row > 0:
        ax.set_ylabel(names[row])
    elif column != row:
        ax.tick_params(labelleft=False)
    ax.locator_params(nbins=4, axis="x")
    if column < row:
        ax.locator_params(nbins=4, axis="y")
    ax.tick_params(labelsize=TEXT_SIZE - 1.5)
