"""Figures of hierarchical fits show the numbers that they are given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nlme_sbi.plots.hierarchy import plot_dose_response, plot_group_effects, plot_shared


def test_shared_parameters_are_in_units_of_their_priors() -> None:
    shared = pd.DataFrame(
        {
            "parameter": ["e76", "aR"],
            "factor": ["", "rbs_R"],
            "level": ["", "R33"],
            "mean": [-1.0, 4.0],
            "sd": [0.5, 3.0],
            "prior_mean": [-3.0, 1.0],
            "prior_sd": [1.0, 3.0],
        }
    )
    (ax,) = plot_shared(shared).axes
    (points,) = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points.get_xdata(), [2.0, 1.0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["e76", "aR[rbs_R=R33]"]
    with pytest.raises(ValueError, match="Nothing is shared"):
        plot_shared(shared[:0])


def test_effects_have_a_panel_for_each_unknown() -> None:
    rows = [
        {
            "unknown": name,
            "factor": "device",
            "level": level,
            "effect": effect,
            "lower": effect - 1,
            "upper": effect + 1,
        }
        for name, effects in (("r", (0.5, -0.5)), ("K", (2.0, -2.0)))
        for level, effect in zip("ab", effects, strict=True)
    ]
    figure = plot_group_effects(pd.DataFrame(rows), "device")
    assert [ax.get_title() for ax in figure.axes] == ["r", "K"]
    only = plot_group_effects(pd.DataFrame(rows), "device", most=1)
    assert [ax.get_title() for ax in only.axes] == ["K"]  # the largest effects


def test_a_titration_shows_those_without_the_other_inducer() -> None:
    doses = [(0.0, 0.0), (9.0, 0.0), (99.0, 0.0), (9.0, 9.0)]
    rows = [
        {"group": "d", "signal": "y", "side": "fitted", "value": 1.0 + place, "q5": 0.0, "q50": 1.0, "q95": 2.0}
        | {"dose A": first, "dose B": second}
        for place, (first, second) in enumerate(doses)
    ]
    (ax,) = plot_dose_response(pd.DataFrame(rows), "A", ["y"]).axes
    points = next(line for line in ax.lines if line.get_marker() == ".")
    np.testing.assert_allclose(points.get_xdata(), [0.0, 1.0, 2.0])
    np.testing.assert_allclose(points.get_ydata(), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="No group has several doses of A"):
        plot_dose_response(pd.DataFrame(rows[:1]), "A", ["y"])
