"""Random effects of the individuals: their distribution, and their relation to covariates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlme_sbi.numerics.grid_densities import normal_density
from nlme_sbi.plots.canvas import (
    BLACK,
    BLUE,
    GREY,
    PALE,
    SKY,
    TEXT_SIZE,
    VERMILION,
    data_text,
    legend_above,
    panels,
    set_panel_title,
)

_PANELS = 12


def plot_random_effects(frame: pd.DataFrame, shrinkage: Mapping[str, float]) -> Figure:
    """One panel a parameter: single draws and posterior means of the random effects, and the population's density.

    Args:
        frame: one row for each individual and parameter: parameter, eta (posterior mean), drawn (a single draw), in the
            population's SDs.
        shrinkage: of every parameter, as a share.
    """
    names = list(dict.fromkeys(frame["parameter"]))
    figure, axes = panels(len(names), columns=3, row_height=1.9)
    for ax, name in zip(axes, names, strict=True):
        some = frame[frame["parameter"] == name]
        drawn, means = some["drawn"].to_numpy(), some["eta"].to_numpy()
        reach = max(3.2, float(np.nanmax(np.abs(np.concatenate([drawn, means])))) + 0.2)
        bins = int(np.clip(2 * len(some) ** (1 / 3), 6, 40))
        ax.hist(drawn, bins=bins, range=(-reach, reach), density=True, color=PALE, label="one draw each")
        ax.hist(
            means,
            bins=bins,
            range=(-reach, reach),
            density=True,
            histtype="step",
            color=VERMILION,
            label="posterior means",
        )
        places = np.linspace(-reach, reach, 200)
        ax.plot(places, normal_density(places, 0.0, 1.0), color=BLUE, linewidth=1.5, label="population")
        set_panel_title(ax, f"{data_text(name)}: shrinkage {100 * shrinkage[name]:.0f}%")
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    figure.supxlabel("random effect, in SDs of the population", fontsize=TEXT_SIZE)
    legend_above(figure, axes[0], columns=3)
    return figure


def plot_effects_against_covariates(
    frame: pd.DataFrame, covariates: pd.DataFrame, pairs: Sequence[tuple[str, str]]
) -> Figure:
    """Posterior means of random effects against covariates, a panel a pair; a box a level for categorical ones.

    Args:
        frame: one row for each individual and parameter: id, parameter, eta.
        covariates: one row an individual: id, and a column a covariate; text for categorical ones.
        pairs: (parameter, covariate); the first twelve are drawn.
    """
    chosen = list(pairs)[:_PANELS]
    figure, axes = panels(len(chosen), columns=3, row_height=1.9)
    for ax, (parameter, covariate) in zip(axes, chosen, strict=True):
        some = frame[frame["parameter"] == parameter].merge(covariates[["id", covariate]], on="id")
        values = some[covariate]
        if pd.api.types.is_numeric_dtype(values):
            _scatter(ax, values.to_numpy(float), some["eta"].to_numpy())
        else:
            _levels(ax, values, some["eta"])
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_xlabel(data_text(covariate), fontsize=TEXT_SIZE)
        ax.set_ylabel(f"effect on {data_text(parameter)} (SD)", fontsize=TEXT_SIZE)
    return figure


def _scatter(ax: Axes, across: np.ndarray, up: np.ndarray) -> None:
    ax.plot(across, up, ".", color=BLUE, markersize=4, alpha=0.7, markeredgewidth=0, rasterized=len(up) > 1000)
    there = np.isfinite(across) & np.isfinite(up)
    if there.sum() > 2 and np.ptp(across[there]) > 0:
        slope, start = np.polyfit(across[there], up[there], 1)
        ends = np.array([across[there].min(), across[there].max()])
        ax.plot(ends, start + slope * ends, color=VERMILION, linewidth=1.3)


def _levels(ax: Axes, levels: pd.Series, up: pd.Series) -> None:
    names = sorted(levels.unique())
    groups = [up[levels == name].to_numpy() for name in names]
    ax.boxplot(
        groups,
        widths=0.55,
        patch_artist=True,
        boxprops={"facecolor": SKY, "edgecolor": BLACK, "linewidth": 0.7},
        medianprops={"color": BLACK},
        whiskerprops={"color": BLACK, "linewidth": 0.7},
        capprops={"color": BLACK, "linewidth": 0.7},
        flierprops={"markersize": 2.5, "markeredgecolor": GREY},
    )
    ax.set_xticks(range(1, len(names) + 1), [data_text(str(name)) for name in names])
