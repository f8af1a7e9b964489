"""Figures of a network's diagnosis, from the tables that the run holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nlme_sbi.plots.canvas import (
    BLACK,
    BLUE,
    GREY,
    PALE,
    SERIES,
    SKY,
    TEXT_SIZE,
    VERMILION,
    canvas,
    data_text,
    legend_above,
    panels,
)

Labels = Mapping[str, str]
_TITLES = {"density": "joint density", "distance": "distance (TARP)"}
_LARGEST_SHAPE = 3.0
_POINTS = 400  # of a scatter; more are one mass
_STYLES = ("-", "--", ":", "-.")


def plot_ranks(curves: pd.DataFrame, labels: Labels) -> Figure:
    """Distribution functions of the ranks minus the diagonal, with simultaneous bands.

    Args:
        curves: columns quantity, level, difference, low, high (``calibration_curves.csv`` of one ``where``).
        labels: of the parameters; other quantities have words of their own.
    """
    names = list(dict.fromkeys(curves["quantity"]))
    figure, axes = panels(len(names), columns=4, row_height=1.6)
    reach = 1.1 * float(np.abs(curves[["difference", "low", "high"]].to_numpy()).max())
    for place, (ax, name) in enumerate(zip(axes, names, strict=True)):
        rows = curves[curves["quantity"] == name]
        outside = bool(((rows["difference"] < rows["low"]) | (rows["difference"] > rows["high"])).any())
        ax.fill_between(rows["level"], rows["low"], rows["high"], color=PALE, linewidth=0, label="band of a right one")
        ax.axhline(0.0, color=GREY, linewidth=0.6)
        colour, line, label = (VERMILION, "--", "leaves the band") if outside else (BLUE, "-", "stays inside")
        ax.plot(rows["level"], rows["difference"], linewidth=1.4, label=label, color=colour, linestyle=line)
        _add_title(ax, _TITLES.get(name, labels.get(name, name)))
        ax.set_xlim(0, 1)
        ax.set_ylim(-reach, reach)
        if place % 4:
            ax.tick_params(labelleft=False)
    figure.supxlabel("rank of the truth among the draws", fontsize=TEXT_SIZE)
    figure.supylabel("share of ranks below − expected", fontsize=TEXT_SIZE)
    _legend(figure, axes)
    return figure


def plot_coverage(coverage: pd.DataFrame, labels: Labels) -> Figure:
    """Share of truths inside regions of each level: highest density, TARP, and central intervals of each parameter.

    Args:
        coverage: columns quantity, kind, nominal, coverage, low, high (``coverage.csv`` of one ``where``).
        labels: of the parameters.
    """
    titles = {"density": "highest density", "distance": "random points (TARP)", "central": "central intervals"}
    figure, axes = canvas(1, 3, row_height=2.9)
    for ax, (kind, title) in zip(axes[0], titles.items(), strict=True):
        rows = coverage[coverage["kind"] == kind]
        names = list(dict.fromkeys(rows["quantity"]))
        one = rows[rows["quantity"] == names[0]]
        ax.fill_between(one["nominal"], one["low"], one["high"], color=PALE, linewidth=0)
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.6)
        for place, name in enumerate(names):
            own = rows[rows["quantity"] == name]
            colour, line = SERIES[place % len(SERIES)], _STYLES[place // len(SERIES) % len(_STYLES)]
            label = data_text(labels.get(name, name))
            ax.plot(own["nominal"], own["coverage"], linewidth=1.2, label=label, color=colour, linestyle=line)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal")
        _add_title(ax, title)
        ax.set_aspect("equal")
    axes[0][0].set_ylabel("share of truths inside")
    handles, texts = axes[0][2].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside lower center", ncols=min(4, len(texts)), fontsize=TEXT_SIZE - 1, frameon=False
    )
    axes[0][0].annotate("conservative", (0.04, 0.93), fontsize=TEXT_SIZE - 1, color=GREY)
    axes[0][0].annotate("overconfident", (0.96, 0.04), fontsize=TEXT_SIZE - 1, color=GREY, ha="right")
    return figure


def plot_recovery(individuals: pd.DataFrame, labels: Labels) -> Figure:
    """Posterior mean and SD against the truth, one panel a parameter.

    Args:
        individuals: columns simulation, parameter, truth, mean, sd (``recovery_individuals.csv``).
        labels: of the parameters.
    """
    names = list(dict.fromkeys(individuals["parameter"]))
    figure, axes = panels(len(names), columns=3, row_height=2.1)
    for ax, name in zip(axes, names, strict=True):
        every = individuals[individuals["parameter"] == name]
        rows = _thin(every)
        ends = (float(every["truth"].min()), float(every["truth"].max()))
        middle, spread = rows["mean"], rows["sd"]
        ax.errorbar(rows["truth"], middle, spread, fmt="o", markersize=1.8, color=BLUE, ecolor=SKY, elinewidth=0.4)
        ax.plot(ends, ends, color=BLACK, linewidth=0.8)
        correlation = float(every["truth"].corr(every["mean"]))
        _add_title(ax, f"{labels.get(name, name)}, r = {correlation:.2f}")
    figure.supxlabel("truth", fontsize=TEXT_SIZE)
    figure.supylabel("posterior mean ± SD", fontsize=TEXT_SIZE)
    return figure


def plot_scores(individuals: pd.DataFrame, labels: Labels) -> Figure:
    """z-score against contraction of every simulated individual, one panel a parameter.

    Args:
        individuals: columns simulation, parameter, z_score, contraction (``recovery_individuals.csv``).
        labels: of the parameters.
    """
    names = list(dict.fromkeys(individuals["parameter"]))
    figure, axes = panels(len(names), columns=3, row_height=1.9)
    for ax, name in zip(axes, names, strict=True):
        rows = _thin(individuals[individuals["parameter"] == name])
        _scores_panel(ax, rows)
        _add_title(ax, labels.get(name, name))
    figure.supxlabel("contraction: 0 nothing learned, 1 all", fontsize=TEXT_SIZE)
    figure.supylabel("(posterior mean − truth) / posterior SD", fontsize=TEXT_SIZE)
    return figure


def _scores_panel(ax: Axes, rows: pd.DataFrame) -> None:
    ax.axhspan(-2, 2, color=PALE, linewidth=0, alpha=0.6)
    ax.axhline(0.0, color=GREY, linewidth=0.6)
    ax.plot(rows["contraction"].clip(-0.5, 1), rows["z_score"].clip(-6, 6), "o", markersize=1.8, color=BLUE, alpha=0.7)
    ax.set(xlim=(-0.55, 1.05), ylim=(-6.3, 6.3))


def plot_agreement(agreement: pd.DataFrame) -> Figure:
    """Effective shares of the draws against the exact posterior, individuals in order, and their Pareto k-hat.

    Args:
        agreement: columns where, effective_share, pareto_shape (``agreement.csv``).
    """
    figure, axes = canvas(1, 2, row_height=2.3)
    shares, shapes = axes[0]
    for where, word, colour, line in (("prior", "training prior", BLUE, "-"), ("data", "the data", VERMILION, "--")):
        rows = agreement[agreement["where"] == where]
        clipped = rows["pareto_shape"].clip(upper=_LARGEST_SHAPE)
        for ax, values in ((shares, rows["effective_share"]), (shapes, clipped)):
            ordered = np.sort(values.dropna().to_numpy(dtype=float))
            height = np.arange(1, len(ordered) + 1) / max(1, len(ordered))
            if len(ordered):
                ax.step(ordered, height, where="post", color=colour, linestyle=line, linewidth=1.3, label=word)
    for ax, limit in ((shares, 0.1), (shapes, 0.7)):
        ax.axvline(limit, color=GREY, linewidth=0.8)
        ax.set_ylim(0, 1)
    shares.set(xscale="log", xlabel="effective share of the draws", ylabel="share of individuals below")
    shapes.set_xlabel(f"Pareto k-hat of the weights (at most {_LARGEST_SHAPE:g} shown)")
    legend_above(figure, axes[0][0])
    return figure


def _add_title(ax: Axes, title: str) -> None:
    ax.set_title(data_text(title), fontsize=TEXT_SIZE)


def _thin(rows: pd.DataFrame) -> pd.DataFrame:
    if len(rows) <= _POINTS:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, _POINTS).round().astype(int)]


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend above for what any of the panels shows."""
    shown = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper center", ncols=3, fontsize=TEXT_SIZE, frameon=False
    )
