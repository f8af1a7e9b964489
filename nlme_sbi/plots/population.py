"""The fitted population against the individuals that it was fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nlme_sbi.numerics.grid_densities import normal_density, smoothed_density
from nlme_sbi.plots.canvas import BLUE, GREY, PALE, TEXT_SIZE, VERMILION, legend_above, panels, require_names

Column = np.ndarray
_CURVES = 60  # individuals drawn; more are one grey mass


def plot_population(
    names: Sequence[str],
    mean: Float[Tensor, "*I D"],
    covariance: Float[Tensor, "*I D D"],
    draws: Float[Tensor, "I S D"],
    *,
    sampled: Float[Tensor, "n D"] | None = None,
) -> Figure:
    """One panel a parameter: pooled individual posteriors, single ones, and the fitted population density.

    Args:
        names: axis labels (:func:`nlme_sbi.plots.canvas.parameter_labels`).
        mean: of the population, unconstrained scale; with covariates one for each individual, ``(I, D)``.
        covariance: between individuals, or about each one's mean; a zero on its diagonal is a parameter that does not
            vary. The density shown is the average over individuals.
        draws: from ``p(phi | y_i, theta_hat)``: reweighted, so that pooled they should look like the population.
        sampled: many individuals of the population, whose density is shown where it is not normal.

    Raises:
        ValueError: for names that do not fit, or estimates or draws that are not finite.
    """
    require_names(names, draws.shape[2])
    parts = (mean, covariance.diagonal(dim1=-2, dim2=-1), draws)
    lost = np.any([~np.isfinite(_plain(part)).reshape(-1, len(names)).all(0) for part in parts], axis=0)
    if lost.any():
        first = [name for name, missing in zip(names, lost, strict=True) if missing]
        raise ValueError(f"The population or its draws are not finite for {', '.join(first)}.")
    # Individuals with the same covariates are alike and are looked at once.
    every = np.concatenate(
        [_plain(mean).reshape(-1, len(names)), _plain(covariance.diagonal(dim1=-2, dim2=-1)).reshape(-1, len(names))], 1
    )
    alike, counts = np.unique(every, axis=0, return_counts=True)
    centres, variances = np.split(alike, 2, axis=1)
    shares, values = counts / counts.sum(), _plain(draws)
    # Rows as full as possible.
    columns = 4 if len(names) > 3 and len(names) % 4 in (0, 3) else 3
    figure, axes = panels(len(names), columns=columns, row_height=1.9)
    for column, (ax, name) in enumerate(zip(axes, names, strict=True)):
        if variances[:, column].max() > 0:
            normals = (shares, centres[:, column], np.sqrt(variances[:, column]))
            _varying(ax, values[:, :, column], normals, None if sampled is None else _plain(sampled)[:, column])
        else:
            _constant(ax, centres[:, column])
        ax.set_xlabel(name, fontsize=TEXT_SIZE)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    figure.supylabel("density", fontsize=TEXT_SIZE)
    drawn = next((ax for column, ax in enumerate(axes) if variances[:, column].max() > 0), axes[0])
    legend_above(figure, drawn, columns=3)
    return figure


def _varying(ax: Axes, draws: Column, population: tuple[Column, Column, Column], sampled: Column | None = None) -> None:
    """``population`` holds shares, centres and SDs of the normals that the fitted density is a mixture of, unless
    individuals of it are given."""
    shares, centres, sds = population
    pooled = draws.ravel()
    low, high = np.quantile(pooled, [0.001, 0.999])
    limits = (min(low, (centres - 3.5 * sds).min()), max(high, (centres + 3.5 * sds).max()))
    places = np.linspace(*limits, 300)
    if sampled is None:
        density = normal_density(places[:, None], centres, sds) @ shares
    else:
        inside = sampled[(sampled > limits[0]) & (sampled < limits[1])]
        density = len(inside) / len(sampled) * smoothed_density(inside, places)
    ax.hist(pooled, bins=50, range=limits, density=True, color=PALE, label="individual posteriors, pooled")
    chosen = draws[np.unique(np.linspace(0, len(draws) - 1, min(_CURVES, len(draws))).round().astype(int))]
    curves = [smoothed_density(one, places) for one in chosen if np.ptp(one) > 0]
    if curves:
        # One factor for all: the tall, narrow curves of well-measured individuals would flatten the rest.
        scale = 0.45 * density.max() / np.quantile([curve.max() for curve in curves], 0.9)
        for curve in curves:
            ax.plot(places, scale * curve, color=GREY, linewidth=0.5, alpha=0.6, label="single individuals (scaled)")
    ax.plot(places, density, color=BLUE, linewidth=1.8, label="fitted population")
    ax.set_xlim(limits)
    ax.set_ylim(bottom=0)


def _constant(ax: Axes, centres: Column) -> None:
    """A parameter without variability; covariates may give it several values."""
    low, high = centres.min(), centres.max()
    for centre in np.unique(centres):
        ax.axvline(centre, color=VERMILION, linewidth=1.8, label="does not vary")
    ax.set_xlim(low - 1, high + 1)
    ax.annotate(
        f"does not vary: {low:.3g}" if low == high else f"varies with covariates only: {low:.3g} to {high:.3g}",
        xy=(0.5, 1.0),
        xycoords="axes fraction",
        ha="center",
        va="bottom",
        fontsize=TEXT_SIZE - 1,
        color=VERMILION,
    )


def _plain(values: Tensor) -> Column:
    return values.detach().cpu().double().numpy()
