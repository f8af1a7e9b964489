"""Posterior predictive checks from exact draws of a linear model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_people import Lines, data_set, posterior_draws, without

from nlme_sbi.diagnostics.fit.posterior_predictive import posterior_predictive_check, posterior_predictive_finding
from nlme_sbi.types import Observations

TIMES = torch.linspace(0, 3, 8)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _checked(data: Observations, seed: int, *, draws: int = 200):
    phi = posterior_draws(data, draws, _seeded(seed))
    return posterior_predictive_check(Lines(), phi, data, generator=_seeded(seed + 1))


def test_statistics_are_numpys_and_missing_values_are_left_out() -> None:
    data = data_set(12, TIMES, _seeded(1))
    mask = torch.rand(data.values.shape, generator=_seeded(2)) > 0.3
    some = without(data, mask)
    phi = posterior_draws(data, 60, _seeded(3))
    table = posterior_predictive_check(Lines(), phi, some, generator=_seeded(4)).table.set_index("statistic")
    series = [data.values[row, mask[row, :, 0], 0].numpy() for row in range(12)]
    expected = {
        "mean": np.mean([one.mean() for one in series]),
        "spread": np.mean([one.std(ddof=1) for one in series]),
        "smallest": np.mean([one.min() for one in series]),
        "largest": np.mean([one.max() for one in series]),
        "roughness": np.mean([np.abs(np.diff(one)).mean() for one in series]),
    }
    for name, value in expected.items():
        assert table.observed[name] == pytest.approx(value, rel=1e-10)


@pytest.mark.slow
def test_good_data_pass_and_too_rough_or_too_extreme_ones_do_not() -> None:
    # Conservative: of 25 at most 5% are wished, and at most 4 happen but once in 500.
    lights = [
        posterior_predictive_finding(_checked(data_set(15, TIMES, _seeded(seed)), 50 + seed)).light
        for seed in range(25)
    ]
    assert sum(light != "green" for light in lights) <= 4
    data = data_set(40, TIMES, _seeded(3))
    rough = replace(data, values=data.values + 0.9 * torch.randn(data.values.shape, generator=_seeded(4)))
    finding = posterior_predictive_finding(_checked(rough, 5))
    assert finding.light == "amber"
    assert "roughness of signal_0" in finding.sentence
    with pytest.raises(ValueError, match="at least 50 draws"):
        _checked(data, 1, draws=20)
