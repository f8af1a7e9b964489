"""Measurements against predictions, and residuals that should be standard normal."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtri

from nlme_sbi.numerics.grid_densities import normal_density
from nlme_sbi.plots.canvas import BLUE, GREY, PALE, SKY, TEXT_SIZE, VERMILION, canvas, label_with_unit

_POINTS = 3000  # drawn; more are one mass
_CLOUD = "#2f8fcb"  # seen on white and on black: what is rasterised cannot follow the colours of a page
_BINS = 12  # of a running mean


def plot_goodness(frame: pd.DataFrame, *, signal: str, unit: str = "", time_unit: str = "") -> Figure:
    """Measured against predicted (population and individual), residuals against time and prediction.

    Args:
        frame: one row a measurement: signal, time, value, population_prediction, individual_prediction, iwres.
        signal: which of them.
        unit: of the signal.
        time_unit: of the times.

    Raises:
        ValueError: there are no measurements of this signal.
    """
    some = _of(frame, signal)
    figure, axes = canvas(2, 2, width=6.2, row_height=2.4)
    name = label_with_unit(signal.replace("_", " "), unit)
    for ax, column, words in (
        (axes[0][0], "population_prediction", "population prediction"),
        (axes[0][1], "individual_prediction", "individual prediction"),
    ):
        _cloud(ax, some[column], some["value"])
        ends = [float(some[["value", column]].min().min()), float(some[["value", column]].max().max())]
        ax.plot(ends, ends, color=GREY, linewidth=0.9)
        _labels(ax, words, name)
    _against(
        axes[1][0], some["time"], some["iwres"], label_with_unit("time", time_unit), "individual weighted residual"
    )
    _against(axes[1][1], some["individual_prediction"], some["iwres"], "individual prediction", "")
    return figure


def plot_prediction_errors(frame: pd.DataFrame, *, signal: str, time_unit: str = "") -> Figure:
    """Normalised prediction distribution errors: quantiles, density, against time and prediction.

    Args:
        frame: one row a measurement: signal, time, prediction, npde, npd.
        signal: which of them.
        time_unit: of the times.

    Raises:
        ValueError: there are no errors of this signal.
    """
    some = _of(frame, signal)
    errors = np.sort(some["npde"].dropna().to_numpy())
    figure, axes = canvas(2, 2, width=6.2, row_height=2.4)
    _quantiles(axes[0][0], errors)
    _density(axes[0][1], errors)
    _against(axes[1][0], some["time"], some["npd"], label_with_unit("time", time_unit), "prediction discrepancy (npd)")
    _against(axes[1][1], some["prediction"], some["npd"], "prediction", "")
    return figure


def _of(frame: pd.DataFrame, signal: str) -> pd.DataFrame:
    some = frame[frame["signal"] == signal]
    if some.empty:
        raise ValueError(f"There are no measurements of {signal} to draw.")
    return some


def _quantiles(ax: Axes, errors: np.ndarray) -> None:
    count = len(errors)
    places = (np.arange(1, count + 1) - 0.5) / count
    # Pointwise 95% of ordered standard normal values, by the large-sample variance of a quantile.
    normal = ndtri(places)
    wide = 1.96 * np.sqrt(places * (1 - places) / count) / normal_density(normal, 0.0, 1.0)
    ax.fill_between(normal, normal - wide, normal + wide, color=PALE, linewidth=0)
    ax.plot(normal, normal, color=GREY, linewidth=0.9)
    ax.plot(normal, errors, ".", color=BLUE, markersize=3, markeredgewidth=0, rasterized=count > 1000)
    _labels(ax, "standard normal quantile", "npde")


def _density(ax: Axes, errors: np.ndarray) -> None:
    ax.hist(errors, bins=int(np.clip(2 * len(errors) ** (1 / 3), 8, 50)), density=True, color=SKY, alpha=0.6)
    places = np.linspace(min(-3.5, errors.min()), max(3.5, errors.max()), 200)
    ax.plot(places, normal_density(places, 0.0, 1.0), color=GREY, linewidth=1.2)
    _labels(ax, "npde", "density")


def _against(ax: Axes, across: pd.Series, residual: pd.Series, label: str, up: str) -> None:
    """Residuals with lines at 0 and ±1.96, and their running mean."""
    _cloud(ax, across, residual)
    for height, style in ((0.0, "-"), (1.96, ":"), (-1.96, ":")):
        ax.axhline(height, color=GREY, linewidth=0.8, linestyle=style)
    there = across.notna() & residual.notna()
    groups = pd.qcut(across[there].rank(method="first"), min(_BINS, max(1, int(there.sum()) // 8)), labels=False)
    means = pd.DataFrame({"x": across[there], "y": residual[there], "bin": groups}).groupby("bin").mean()
    ax.plot(means["x"], means["y"], color=VERMILION, linewidth=1.4)
    _labels(ax, label, up)


def _cloud(ax: Axes, across: pd.Series, up: pd.Series) -> None:
    chosen = np.random.default_rng(0).permutation(len(across))[:_POINTS]
    many = len(chosen) > 300
    ax.plot(
        across.to_numpy()[chosen],
        up.to_numpy()[chosen],
        ".",
        color=_CLOUD if len(chosen) > 1000 else BLUE,
        markersize=2.0 if many else 4.0,
        alpha=0.4 if many else 0.8,
        markeredgewidth=0,
        rasterized=len(chosen) > 1000,
    )


def _labels(ax: Axes, across: str, up: str) -> None:
    ax.set_xlabel(across, fontsize=TEXT_SIZE)
    ax.set_ylabel(up, fontsize=TEXT_SIZE)


def plot_measurements(predicted: np.ndarray, measured: np.ndarray, far: np.ndarray) -> Figure:
    """Measurements against predictions; those with far residuals are marked.

    Args:
        predicted: one a measurement.
        measured: the values.
        far: which of them lie far off.
    """
    figure, axes = canvas(1, 1, width=4.5, row_height=3.4)
    ax = axes[0][0]
    for chosen, marker, colour in ((~far, "o", BLUE), (far, "D", VERMILION)):
        ax.plot(
            predicted[chosen],
            measured[chosen],
            marker,
            color=colour,
            markersize=2.5,
            alpha=0.6,
            markeredgewidth=0,
            linestyle="none",
            rasterized=len(predicted) > 1000,
        )
    both = np.concatenate([predicted, measured])
    ends = [float(np.nanmin(both)), float(np.nanmax(both))]
    ax.plot(ends, ends, color=GREY, linewidth=0.9)
    _labels(ax, "individual prediction", "measured")
    return figure
