"""Residuals of individuals' fits, from exact posterior draws of a linear model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_people import MEAN, NOISE, Lines, data_set, posterior_draws
from scipy.stats import binom

from nlme_sbi.diagnostics.fit.iwres import GoodnessOfFit, goodness_finding, goodness_of_fit
from nlme_sbi.types import Censoring, Observations

TIMES = torch.linspace(0, 3, 8)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _typical(count: int) -> torch.Tensor:
    return torch.cat([MEAN, torch.tensor([np.log(NOISE)])]).expand(count, 3)


def _found(data: Observations, seed: int, *, draws: int = 60) -> GoodnessOfFit:
    generator = _seeded(seed)
    phi = posterior_draws(data, draws, generator)
    return goodness_of_fit(Lines(), phi, _typical(len(data)), data, generator=generator)


def test_predictions_are_the_models_and_residuals_at_means_are_shrunk() -> None:
    data = data_set(50, TIMES, _seeded(1))
    found = _found(data, 2, draws=400)
    typical = (MEAN[0] + MEAN[1] * TIMES.double()).expand(50, -1)
    torch.testing.assert_close(found.population_prediction[..., 0], typical)
    draws = posterior_draws(data, 400, _seeded(2))
    curve = draws[:, :, :1] + draws[:, :, 1:2] * TIMES.double()
    torch.testing.assert_close(found.individual_prediction[..., 0], curve.mean(1))
    torch.testing.assert_close(found.iwres[..., 0], (data.values[..., 0] - curve.mean(1)) / NOISE)
    # A fit of two parameters takes up to 2 of 8 dimensions: SD at least sqrt(6/8); five SEs of an SD of 400.
    assert 0 < float(found.shrinkage[0]) < 1 - (6 / 8) ** 0.5 + 5 / (2 * 400) ** 0.5
    frame = found.to_frame(data)
    assert len(frame) == 400
    assert set(frame.columns) >= {"id", "time", "value", "population_prediction", "individual_prediction", "iwres"}


@pytest.mark.slow
def test_false_alarms_are_rare() -> None:
    alarms = sum(
        goodness_finding(_found(data_set(15, TIMES, _seeded(seed)), 1000 + seed)).light != "green" for seed in range(60)
    )
    assert alarms <= binom.isf(1e-3, 60, 0.05)  # stated: at most 5%


@pytest.mark.parametrize(
    ("fault", "field", "light"),
    [
        ("waves", "p_correlation", "red"),
        ("noise", "p_shape", "amber"),
        ("outlier", "p_outliers", "amber"),
    ],
)
def test_each_fault_is_seen_by_its_test(fault: str, field: str, light: str) -> None:
    data = data_set(40, TIMES, _seeded(3))
    values = data.values.clone()
    if fault == "waves":
        values += 1.5 * torch.sin(2 * TIMES.double())[None, :, None]
    elif fault == "noise":
        values += 0.9 * torch.randn(values.shape, generator=_seeded(4))
    else:
        values[7, 2] += 6.0
    found = _found(replace(data, values=values), 5)
    assert getattr(found, field) < 0.01
    finding = goodness_finding(found)
    assert finding.light == light
    if fault == "outlier":
        assert '"p7"' in finding.sentence


def test_censored_residuals_are_drawn_beyond_their_limits() -> None:
    data = data_set(60, TIMES, _seeded(6))
    draws = posterior_draws(data, 60, _seeded(7))
    below = data.values < 1.0
    censored = replace(
        data,
        values=torch.where(below, 1.0, data.values),
        censoring=torch.where(below, int(Censoring.LEFT), int(Censoring.NONE)),
        upper=torch.where(below, 1.0, 0.0).double(),
    )
    found = goodness_of_fit(Lines(), draws, _typical(60), censored, generator=_seeded(8))
    limit = (1.0 - found.individual_prediction) / NOISE
    assert bool((found.iwres[below] <= limit[below] + 1e-9).all())
    assert goodness_finding(found).light == "green"


def test_a_simulator_without_predictions_is_refused_with_the_way_out() -> None:
    class Black:
        pass

    data = data_set(3, TIMES, _seeded(1))
    with pytest.raises(ValueError, match="prediction errors"):
        goodness_of_fit.__wrapped__.__wrapped__(  # behind the checks of types
            Black(), posterior_draws(data, 5, _seeded(1)), _typical(3), data, generator=_seeded(1)
        )
