"""Figures of a hierarchical fit: what is shared against its prior, effects of groups, dose and response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import BLACK, BLUE, GREY, ORANGE, PALE, TEXT_SIZE, canvas, data_text, panels, set_panel_title

_ROW = 0.2  # inches for each parameter


def plot_shared(shared: pd.DataFrame) -> Figure:
    """Posterior mean and 95% interval of every shared unknown, in SDs of its prior about the prior's mean.

    Args:
        shared: with ``parameter``, ``factor``, ``level``, ``mean``, ``sd``, ``prior_mean``, ``prior_sd``.

    Raises:
        ValueError: there is nothing to show.
    """
    if shared.empty:
        raise ValueError("Nothing is shared in this hierarchy.")
    figure, axes = canvas(1, 1, row_height=0.8 + _ROW * len(shared))
    ax = axes[0][0]
    place = np.arange(len(shared))[::-1]
    middle = ((shared["mean"] - shared.prior_mean) / shared.prior_sd).to_numpy(float)
    half = 1.959964 * (shared.sd / shared.prior_sd).to_numpy(float)
    ax.axvspan(-1.959964, 1.959964, color=PALE, alpha=0.6, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=0.7)
    ax.errorbar(middle, place, xerr=half, fmt="o", markersize=3.5, color=BLUE, elinewidth=1.2)
    ax.set_yticks(place, [data_text(name) for name in shared_names(shared)], fontsize=TEXT_SIZE - 1)
    ax.set_xlabel("SDs of the prior from its mean (grey: 95% of the prior)", fontsize=TEXT_SIZE)
    ax.set_ylim(-0.7, len(shared) - 0.3)
    return figure


def shared_names(shared: pd.DataFrame) -> list[str]:
    """``e76`` or ``aR[rbs_R=R33]``."""
    return [
        f"{row.parameter}[{row.factor}={row.level}]" if isinstance(row.level, str) and row.level else str(row.parameter)
        for row in shared.itertuples()
    ]


def plot_group_effects(effects: pd.DataFrame, factor: str, *, most: int = 16) -> Figure:
    """Effects of the levels of one grouping variable with 95% intervals, a panel an unknown.

    Args:
        effects: with ``unknown``, ``factor``, ``level``, ``effect``, ``lower``, ``upper``, unconstrained scale.
        factor: the grouping variable.
        most: unknowns; those with the largest effects, in units of their intervals, are shown.
    """
    chosen = effects[effects.factor == factor]
    weight = (chosen.effect.abs() / (chosen.upper - chosen.lower)).groupby(chosen.unknown).max()
    shown = [name for name in dict.fromkeys(chosen.unknown) if name in set(weight.nlargest(most).index)]
    levels = list(dict.fromkeys(chosen.level))
    figure, axes = panels(len(shown), row_height=0.7 + 0.16 * len(levels))
    place = np.arange(len(levels))[::-1]
    for number, (ax, name) in enumerate(zip(axes, shown, strict=True)):
        rows = chosen[chosen.unknown == name].set_index("level").loc[levels]
        middle = rows.effect.to_numpy(float)
        ends = np.stack([middle - rows.lower.to_numpy(float), rows.upper.to_numpy(float) - middle])
        ax.axvline(0, color=GREY, linewidth=0.7)
        ax.errorbar(middle, place, xerr=ends, fmt="o", markersize=3, color=BLUE, elinewidth=1.0)
        ax.set_yticks(place, [data_text(level) for level in levels] if number % 4 == 0 else [""] * len(levels))
        ax.set_ylim(-0.6, len(levels) - 0.4)
        ax.locator_params(axis="x", nbins=4)
        set_panel_title(ax, data_text(name))
    figure.supxlabel("effect, unconstrained scale, with 95% interval", fontsize=TEXT_SIZE)
    return figure


def plot_dose_response(responses: pd.DataFrame, covariate: str, signals: Sequence[str]) -> Figure:
    """Last readings over the dose, groups in rows and signals in columns, with 90% bands of predictions.

    Individuals whose other covariates are at their smallest are shown.

    Args:
        responses: with ``group``, ``signal``, ``value``, ``q5``, ``q50``, ``q95`` and the covariates, a row an
            individual and signal.
        covariate: on the axis, as log(1 + dose).
        signals: in this order.

    Raises:
        ValueError: nobody has only this covariate.
    """
    others = [str(name).removeprefix("dose ") for name in responses if str(name).startswith("dose ")]
    alone = np.ones(len(responses), bool)
    for name in others:
        if name != covariate:
            column = responses[f"dose {name}"]
            alone &= (column == column.min()).to_numpy()
    chosen = responses[alone]
    groups = [
        name for name in dict.fromkeys(chosen.group) if chosen[chosen.group == name][f"dose {covariate}"].nunique() > 1
    ]
    if not groups:
        raise ValueError(f"No group has several doses of {covariate} while other covariates are at their smallest.")
    figure, axes = canvas(len(groups), len(signals), row_height=1.25)
    for group, of_group in zip(groups, axes, strict=True):
        for place, (ax, signal) in enumerate(zip(of_group, signals, strict=True)):
            here = chosen[(chosen.group == group) & (chosen.signal == signal)].sort_values(f"dose {covariate}")
            dose = np.log10(1 + here[f"dose {covariate}"].to_numpy(float))
            bands = here[["q5", "q50", "q95"]].groupby(dose).mean()
            x = bands.index.to_numpy(float)
            ax.fill_between(x, bands.q5, bands.q95, color=ORANGE, alpha=0.28, linewidth=0)
            ax.plot(x, bands.q50, color=BLUE, linewidth=0.9)
            for side, marker in (("fitted", "."), ("held_out", "x")):
                mask = (here.side == side).to_numpy()
                ax.plot(dose[mask], here.value.to_numpy(float)[mask], marker, color=BLACK, markersize=3.5)
            set_panel_title(ax, data_text(signal) if of_group is axes[0] else "")
            if place == 0:
                ax.set_ylabel(data_text(group), fontsize=TEXT_SIZE)
    figure.supxlabel(data_text(f"log10(1 + {covariate})"), fontsize=TEXT_SIZE)
    return figure
