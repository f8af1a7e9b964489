"""Posterior draws of an individual, parameter against parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from nlme_sbi.numerics.grid_densities import smoothed_density
from nlme_sbi.plots.canvas import BLACK, GREY, SERIES, TEXT_SIZE, canvas, data_text, legend_above, require_names
from nlme_sbi.types import Prior

Draws = Float[Tensor, "_ D"]  # sets of draws to compare may have different sizes
Columns = NDArray[np.float64]
_CELLS = 80  # across a panel, for the contours


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
    unnamed = ["draws"] if len(sets) == 1 else [f"draws {number + 1}" for number in range(len(sets))]
    titles = unnamed if labels is None else [data_text(label) for label in labels]
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
            _label(ax, names, row, column)
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
        # Fewer draws, wider bins: about as many as Rice's rule gives.
        bins = int(np.clip(2 * len(values) ** (1 / 3), 10, 50))
        heights, edges = np.histogram(values, bins=bins, range=limits, density=True)
        ax.stairs(heights, edges, fill=True, color=colour, alpha=0.25)
        ax.stairs(heights, edges, color=colour, linewidth=1.2, label=title)
    ax.set_xlim(limits)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _prior_density(ax: Axes, prior: Prior | None, column: int, limits: tuple[float, float]) -> None:
    if prior is None:
        return
    # A picture needs no more draws, and the same ones every time.
    sample = prior.sample(4000, torch.Generator().manual_seed(0))[:, column]
    places = np.linspace(*limits, 100)
    ax.plot(places, smoothed_density(_plain(sample), places), color=GREY, linewidth=1.2, linestyle=":", label="prior")


def _cloud(ax: Axes, pairs: list[Columns], limits: tuple[tuple[float, float], tuple[float, float]]) -> None:
    for pair, colour in zip(pairs, SERIES * len(pairs), strict=False):
        shown = pair[:: max(1, len(pair) // 500)]
        ax.plot(shown[:, 0], shown[:, 1], ".", color=colour, markersize=1.5, alpha=0.35, rasterized=True)
        counts, across, up = np.histogram2d(pair[:, 0], pair[:, 1], bins=_CELLS, range=limits)
        # As wide as a kernel density of so many draws in two dimensions would be: n^(-1/6) of the spread.
        widths = [max(0.7, _CELLS * spread * len(pair) ** (-1 / 6)) for spread in _spreads(pair, limits)]
        smooth = gaussian_filter(counts, widths)
        middles = [0.5 * (edges[1:] + edges[:-1]) for edges in (across, up)]
        ax.contour(*middles, smooth.T, levels=_levels(smooth, pair, middles), colors=colour, linewidths=1.0)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def _spreads(pair: Columns, limits: tuple[tuple[float, float], tuple[float, float]]) -> list[float]:
    """SD of one mode of each column, as a share of the panel: from the shortest interval with a quarter of the draws.

    For a Gaussian that interval is 0.64 SD long; the distance between two mirror modes does not enter.
    """
    ordered = np.sort(pair, axis=0)
    quarter = max(1, len(pair) // 4)
    shortest = (ordered[quarter:] - ordered[:-quarter]).min(axis=0)
    return [float(one) / 0.64 / (high - low) for one, (low, high) in zip(shortest, limits, strict=True)]


def _levels(heights: Columns, pair: Columns, middles: list[Columns]) -> list[float]:
    """Heights above which 95% and 50% of the draws lie, increasing and different."""
    places = [(values - middle[0]) / (middle[1] - middle[0]) for values, middle in zip(pair.T, middles, strict=True)]
    # Linear between cell centres, as the contours themselves are.
    found = map_coordinates(heights, places, order=1, mode="nearest")
    # A level at the very top has no contour, and matplotlib warns.
    return sorted({0.999 * float(one) for one in np.quantile(found, [0.05, 0.5])} - {0.0})


def _mark(ax: Axes, truth: Columns | None, column: int, row: int | None = None) -> None:
    if truth is None:
        return
    ax.axvline(truth[column], color=BLACK, linewidth=0.9, linestyle="--", label="truth")
    if row is not None:
        ax.axhline(truth[row], color=BLACK, linewidth=0.9, linestyle="--")


def _label(ax: Axes, names: Sequence[str], row: int, column: int) -> None:
    """Names and ticks on the outer sides only; in small panels the unit goes to a second line."""
    count = len(names)
    crowded = count > 4
    shown = [name.replace(" (", "\n(") for name in names] if crowded else list(names)
    if row == count - 1:
        ax.set_xlabel(shown[column])
    else:
        ax.tick_params(labelbottom=False)
    if column == 0 and row > 0:
        ax.set_ylabel(shown[row])
    elif column != row:
        ax.tick_params(labelleft=False)
    ax.xaxis.set_major_locator(MaxNLocator(2 if crowded else 4))
    if column < row:
        ax.yaxis.set_major_locator(MaxNLocator(3 if crowded else 4))
    ax.tick_params(labelsize=TEXT_SIZE - (2 if crowded else 1.5))
