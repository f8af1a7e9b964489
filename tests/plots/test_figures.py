"""Claims about figures, read from their artists: what is drawn is what was given."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from nlme_sbi.diagnostics.fit.predictive_bands import PROBABILITIES, PredictiveBands
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.plots.canvas import (
    SERIES,
    data_text,
    legend_above,
    panels,
    parameter_labels,
    save_png,
    set_panel_title,
)
from nlme_sbi.plots.individuals.individual_fits import plot_individual_fits
from nlme_sbi.plots.individuals.influence import plot_influence
from nlme_sbi.plots.loss import plot_history
from nlme_sbi.plots.pairs import plot_pairs
from nlme_sbi.plots.population import plot_population
from nlme_sbi.types import Censoring, Design, Observations


def _line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [one for one in ax.lines if str(one.get_label()).startswith(label)]
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def _labels(ax: Axes) -> set[str]:
    return set(ax.get_legend_handles_labels()[1])


def _draws_without_complaint(figure: Figure) -> None:
    """Rendered to memory; warnings (missing glyphs, layouts that collapse) are errors in the test run."""
    target = io.BytesIO()
    figure.savefig(target, dpi=60)
    assert target.getbuffer().nbytes > 1000


# -- training ----------------------------------------------------------------------------------------------------------


def _history() -> pd.DataFrame:
    step = np.arange(1, 41) * 100
    validation = 5 * np.exp(-step / 500.0) + 0.2
    validation[30] = -1.5
    return pd.DataFrame(
        {
            "step": step,
            "train_loss": 5 * np.exp(-step / 500.0),
            "validation_loss": validation,
            "learning_rate": 1e-3 * (1 + np.cos(np.pi * step / 4000)),
        }
    )


@pytest.mark.slow
def test_history_shows_both_losses_the_best_step_and_the_learning_rate() -> None:
    history = _history()
    history.loc[5, "validation_loss"] = np.nan
    figure = plot_history(history)
    above, below = figure.axes
    np.testing.assert_array_equal(_line(above, "training pairs")[1], history["train_loss"])
    assert len(_line(above, "held-out pairs")[0]) == 39
    best = _line(above, "best: -1.5 at step 3100")
    assert (best[0].item(), best[1].item()) == (3100, -1.5)
    np.testing.assert_array_equal(below.lines[0].get_ydata(), history["learning_rate"])
    assert below.get_xlabel() == "training step"
    assert "nats" in above.get_ylabel()
    _draws_without_complaint(figure)


def test_a_huge_first_loss_is_cut_off_and_said_so() -> None:
    history = _history()
    history.loc[0, "train_loss"] = 1e4
    above = plot_history(history).axes[0]
    assert above.get_ylim()[1] < 10
    assert any("early values lie above" in text.get_text() for text in above.texts)
    flat = _history()
    flat["train_loss"] = flat["validation_loss"] = np.linspace(1, 0, 40)
    assert not plot_history(flat).axes[0].texts


@pytest.mark.parametrize("history", [pd.DataFrame({"step": [1]}), _history().iloc[:0]])
def test_a_history_without_losses_is_refused(history: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"training history has no (learning_rate, train_loss|rows)"):
        plot_history(history)


# -- pairs -------------------------------------------------------------------------------------------------------------


def _two_modes(generator: torch.Generator) -> torch.Tensor:
    draws = torch.randn((4000, 3), generator=generator) * torch.tensor([0.1, 0.1, 1.0])
    draws[:2000, :2] += torch.tensor([2.0, -3.0])
    draws[2000:, :2] += torch.tensor([-3.0, 2.0])
    return draws


@pytest.mark.slow
def test_pairs_show_every_pair_once_with_truth_and_prior(generator: torch.Generator) -> None:
    draws = _two_modes(generator)
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 3.0} for name in "abc"})
    figure = plot_pairs(draws, ["a", "b", "c"], prior=prior, truth=torch.tensor([2.0, -3.0, 0.0]))
    assert len(figure.axes) == 6
    first, cloud = figure.axes[0], figure.axes[1]
    assert (cloud.get_ylabel(), figure.axes[-1].get_xlabel()) == ("b", "c")
    assert _labels(first) == {"draws", "prior", "truth"}
    assert _line(first, "truth")[0].tolist() == [2.0, 2.0]
    places, density = _line(first, "prior")
    # A kernel density of 4000 draws: bandwidth 0.2 SD widens it by 2%, its noise is about 3% at the centre.
    np.testing.assert_allclose(density, np.exp(-0.5 * (places / 3) ** 2) / (3 * math.sqrt(2 * math.pi)), rtol=0.15)
    _draws_without_complaint(figure)


def test_histograms_are_densities_and_contours_hold_their_share(generator: torch.Generator) -> None:
    draws = _two_modes(generator)
    figure = plot_pairs(draws, ["a", "b", "c"])
    patch = next(one for one in figure.axes[0].patches if isinstance(one, StepPatch))
    heights, edges, _ = patch.get_data()
    # 0.2% of the draws lie beyond each end of the axis.
    assert float(np.sum(heights * np.diff(edges))) == pytest.approx(1, abs=0.01)
    (contours,) = [one for one in figure.axes[1].collections if hasattr(one, "levels")]
    for path, share in zip(contours.get_paths(), (0.95, 0.5), strict=True):
        inside = sum(part.contains_points(draws[:, :2].numpy()).mean() for part in _closed_parts(path))
        # Both modes are encircled. Levels are quantiles over the draws; contours have straight edges: 2%.
        assert len(_closed_parts(path)) >= 2
        assert inside == pytest.approx(share, abs=0.02)


def _closed_parts(path: object) -> list:  # matplotlib keeps all contours of one level in one path
    return [type(path)(polygon) for polygon in path.to_polygons(closed_only=True) if len(polygon) > 2]


@pytest.mark.slow
def test_several_sets_of_draws_are_told_apart(generator: torch.Generator) -> None:
    draws = [torch.randn((200, 2), generator=generator) for _ in range(2)]
    figure = plot_pairs(draws, ["a", "b"], labels=["network", "exact"])
    assert _labels(figure.axes[0]) == {"network", "exact"}
    colours = {line.get_color() for line in figure.axes[1].lines}
    assert colours == set(SERIES[:2])


def test_a_constant_column_is_drawn_not_divided_by(generator: torch.Generator) -> None:
    draws = torch.randn((300, 2), generator=generator)
    draws[:, 1] = -1.25
    figure = plot_pairs(draws, ["a", "b"])
    low, high = figure.axes[1].get_ylim()
    assert low < -1.25 < high
    _draws_without_complaint(figure)


def test_draws_collapsed_to_one_point_are_drawn() -> None:
    _draws_without_complaint(plot_pairs(torch.full((50, 2), 0.7), ["a", "b"]))


def test_names_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 names"):
        plot_pairs(torch.zeros((5, 2)), ["a"])
    with pytest.raises(ValueError, match="1 labels for 2 sets"):
        plot_pairs([torch.zeros((5, 2))] * 2, ["a", "b"], labels=["x"])


# -- individual fits ---------------------------------------------------------------------------------------------------


def _fits(individuals: int = 5, points: int = 4) -> tuple[Observations, PredictiveBands]:
    design = Design.regular(torch.arange(float(points)), individuals)
    observed = torch.ones((individuals, points, 1), dtype=torch.bool)
    observed[0, 1] = False
    values = torch.arange(float(individuals * points)).reshape(individuals, points, 1)
    observations = Observations(
        tuple(str(i) if i else "cell_a" for i in range(individuals)),
        values * observed,
        Design(design.times, observed),
        ("log_signal",),
        ("mg/L",),
        "h",
    )
    times = torch.linspace(0, 3, 7).expand(individuals, 7)
    spread = torch.tensor(PROBABILITIES)[None, :, None, None] - 0.5
    centre = torch.arange(float(individuals))[:, None, None, None] + torch.zeros((1, 1, 7, 1))
    bands = PredictiveBands(
        times, PROBABILITIES, centre + spread, centre + 3 * spread, torch.zeros(individuals, dtype=torch.int64)
    )
    return observations, bands


@pytest.mark.slow
def test_fits_show_the_measurements_the_median_and_both_bands() -> None:
    observations, bands = _fits()
    figure = plot_individual_fits(observations, bands, rows=[0, 3])
    assert [ax.get_title() for ax in figure.axes] == ["cell_a", "individual 3"]
    first, second = figure.axes
    np.testing.assert_array_equal(_line(first, "measured")[0], [0, 2, 3])  # the masked one is not there
    np.testing.assert_array_equal(_line(second, "measured")[1], [12, 13, 14, 15])
    np.testing.assert_allclose(_line(second, "median")[1], 3)
    extents = {band.get_label(): band.get_paths()[0].get_extents().get_points()[:, 1] for band in second.collections}
    np.testing.assert_allclose(extents["50% of curves"], [2.75, 3.25], rtol=1e-6)
    np.testing.assert_allclose(extents["95% of curves"], [2.525, 3.475], rtol=1e-6)
    np.testing.assert_allclose(extents["95% of new measurements"], [3 - 1.425, 3 + 1.425], rtol=1e-6)
    assert figure.get_supxlabel() == "time (h)"
    assert figure.get_supylabel() == "log signal (mg/L)"
    _draws_without_complaint(figure)


def test_censored_measurements_are_drawn_at_their_bounds() -> None:
    observations, bands = _fits()
    kinds = [Censoring.NONE, Censoring.LEFT, Censoring.RIGHT, Censoring.INTERVAL]
    codes = torch.tensor([int(kind) for kind in kinds])[None, :, None].expand(5, 4, 1)
    censored = Observations(
        observations.ids,
        observations.values,
        observations.design,
        observations.signals,
        observations.signal_units,
        censoring=codes,
        lower=torch.full((5, 4, 1), 0.25),
        upper=torch.full((5, 4, 1), 0.75),
    )
    (ax,) = plot_individual_fits(censored, bands, rows=[2]).axes
    assert _line(ax, "measured")[0].tolist() == [0]
    assert [values.tolist() for values in _line(ax, "below this")] == [[1], [0.75]]
    assert [values.tolist() for values in _line(ax, "above this")] == [[2], [0.25]]
    (bar,) = [one for one in ax.collections if one.get_label() == "between these"]
    np.testing.assert_allclose(bar.get_segments()[0], [[3, 0.25], [3, 0.75]])


def test_many_points_lie_under_the_curve() -> None:
    observations, bands = _fits(points=60)
    (ax,) = plot_individual_fits(observations, bands, rows=[1]).axes
    order = {str(line.get_label()): line.get_zorder() for line in ax.lines}
    assert order["measured"] < order["median"]


@pytest.mark.slow
def test_the_first_twelve_are_shown_and_strange_rows_refused() -> None:
    observations, bands = _fits(individuals=15)
    assert len(plot_individual_fits(observations, bands).axes) == 12
    with pytest.raises(ValueError, match="not all within the 15 individuals"):
        plot_individual_fits(observations, bands, rows=[15])
    with pytest.raises(ValueError, match="3 individuals but predictive bands for 15"):
        plot_individual_fits(observations[:3], bands)


# -- population --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_population_shows_density_pooled_draws_individuals_and_constants(generator: torch.Generator) -> None:
    individuals, count = 80, 200
    centres = torch.tensor([1.0, -2.0, 0.5])
    sds = torch.tensor([0.5, 2.0, 0.0])
    own = centres + sds * torch.randn((individuals, 1, 3), generator=generator)
    draws = own + 0.2 * sds * torch.randn((individuals, count, 3), generator=generator)
    figure = plot_population(["a", "b", "c"], centres, torch.diag(sds**2), draws)
    for ax, centre, sd in zip(figure.axes[:2], centres.tolist(), sds.tolist(), strict=False):
        places, density = _line(ax, "fitted population")
        exact = np.exp(-0.5 * ((places - centre) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
        np.testing.assert_allclose(density, exact, rtol=1e-5)
        assert sum(bar.get_width() * bar.get_height() for bar in ax.patches) == pytest.approx(1, abs=0.01)
        single = [line for line in ax.lines if line.get_label() == "single individuals (scaled)"]
        assert len(single) == 60
        # Scaled by one factor: the tallest tenth at about 0.45 of the population's peak.
        assert np.quantile([line.get_ydata().max() for line in single], 0.9) == pytest.approx(
            0.45 * exact.max(), rel=0.02
        )
    constant = figure.axes[2]
    assert constant.lines[0].get_xdata()[0] == 0.5
    assert "does not vary: 0.5" in {text.get_text() for text in constant.texts}
    assert not constant.patches
    _draws_without_complaint(figure)


def test_individuals_whose_draws_collapsed_to_one_point_do_not_break_the_picture(generator: torch.Generator) -> None:
    draws = torch.randn((4, 50, 1), generator=generator)
    draws[2] = 0.3
    figure = plot_population(["a"], torch.zeros(1), torch.eye(1), draws)
    assert len([line for line in figure.axes[0].lines if line.get_label() == "single individuals (scaled)"]) == 3
    with pytest.raises(ValueError, match="2 names"):
        plot_population(["a", "b"], torch.zeros(1), torch.eye(1), draws)


# -- canvas ------------------------------------------------------------------------------------------------------------


def test_labels_say_scale_and_unit() -> None:
    space = ParameterSpace(
        (
            Parameter("ka", "1/h"),
            Parameter("F", transform="logit"),
            Parameter("slope", "mm", transform="identity"),
            Parameter("sigma"),
        )
    )
    assert parameter_labels(space) == ("log ka (1/h)", "logit F", "slope (mm)", "log sigma")


def test_places_left_over_are_removed() -> None:
    figure, axes = panels(5, columns=4)
    assert len(axes) == len(figure.axes) == 5


# -- text from data ----------------------------------------------------------------------------------------------------


ODD = ("$1_$2", "a$", "$$", r"\alpha$x$", "100%", "{x}", "5 µg", "_hidden", "^", "x_1")


@pytest.mark.parametrize("words", ODD)
def test_text_from_data_is_shown_as_it_is(words: str) -> None:
    figure, (ax,) = panels(1)
    shown = ax.set_title(data_text(words))
    _draws_without_complaint(figure)
    # Matplotlib's own rule of what is mathematics, and what it draws otherwise.
    assert shown._preprocess_math(shown.get_text()) == (words, False)
    assert data_text(data_text(words)) == data_text(words)


@pytest.mark.slow
def test_figures_of_individuals_survive_any_id_name_and_unit(generator: torch.Generator) -> None:
    observations, bands = _fits(individuals=5)
    observations = replace(observations, ids=ODD[:5], signals=("$c_$t",), signal_units=("$/$",), time_unit="$h$")
    _draws_without_complaint(plot_individual_fits(observations, bands))
    space = ParameterSpace((Parameter("$k_$a", "$1/$"), Parameter("V", "identity", "identity")))
    names = parameter_labels(space)
    draws = torch.randn((4, 50, 2), generator=generator).double()
    _draws_without_complaint(plot_pairs([draws[0], draws[1]], names, labels=["training prior: $1_$2", "b"]))
    _draws_without_complaint(plot_population(names, torch.zeros(2), torch.eye(2), draws))
    shifts = pd.DataFrame({"id": list(ODD), "cook": np.arange(10.0) / 10, "shift.mean.$k_$a": np.linspace(-1, 1, 10)})
    _draws_without_complaint(plot_influence(shifts, ["mean.$k_$a"]))


def test_what_is_infinite_cannot_be_drawn_and_says_so(generator: torch.Generator) -> None:
    draws = torch.randn((4, 50, 2), generator=generator).double()
    with pytest.raises(ValueError, match=r"not finite for b\b"):
        plot_population(("a", "b"), torch.tensor([0.0, math.inf]), torch.eye(2), draws)


def test_png_has_the_bytes_of_savefig() -> None:
    def make() -> Figure:
        figure, axes = panels(5)
        for number, ax in enumerate(axes):
            ax.plot([0.0, 1.0, 2.0], [0.0, 10.0**number, 1.0], label="curve")
            set_panel_title(ax, f"panel {number}")
        legend_above(figure, axes[0])
        return figure

    ours, theirs = io.BytesIO(), io.BytesIO()
    save_png(make(), ours)
    make().savefig(theirs, format="png", dpi=150)
    assert ours.getvalue() == theirs.getvalue()
