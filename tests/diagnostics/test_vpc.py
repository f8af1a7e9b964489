"""Visual predictive checks against NumPy, closed forms and the paper's formulas; false alarms and rejections."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_people import MEAN, NOISE, SD, Lines, data_set, measured, people, without
from scipy.stats import binom, norm

from nlme_sbi.diagnostics.fit.vpc import visual_predictive_check, vpc_finding
from nlme_sbi.types import Censoring, Design

TIMES = torch.tensor([0.0, 0.5, 1.0, 2.0])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_observed_quantiles_are_numpys_and_bands_hold_the_true_ones() -> None:
    data = data_set(40, TIMES, _seeded(1))
    found = visual_predictive_check(Lines(), people(40, _seeded(2), replicates=500), data, generator=_seeded(3))
    (signal,) = found.signals
    np.testing.assert_array_equal(signal.times, TIMES.numpy())
    np.testing.assert_array_equal(signal.counts, [40] * 4)
    expected = np.quantile(data.values[..., 0].numpy(), found.probabilities, axis=0)
    np.testing.assert_allclose(signal.observed, expected, rtol=1e-12)
    # The median over data sets of a median is the population's; five standard errors, with sqrt(pi/2) for medians.
    spread = (SD[0] ** 2 + (SD[1] * TIMES) ** 2 + NOISE**2).sqrt().numpy()
    error = 5 * (math.pi / 2) * spread / math.sqrt(40 * 500)
    assert (np.abs(signal.median[1] - (MEAN[0] + MEAN[1] * TIMES).numpy()) < error).all()
    # Half the width of the median's band: 1.96 standard errors of a median of 40, to a tenth (500 data sets).
    width = 0.5 * (signal.upper[1] - signal.lower[1])
    np.testing.assert_allclose(width, norm.ppf(0.975) * spread * math.sqrt(math.pi / 2 / 40), rtol=0.2)
    frame = found.to_frame()
    assert len(frame) == 12
    assert frame.query("probability == 0.5").observed.to_numpy() == pytest.approx(expected[1])


@pytest.mark.slow
def test_false_alarms_are_rare_and_wrong_spreads_and_trends_are_seen() -> None:
    alarms = 0
    for seed in range(40):
        data = data_set(20, TIMES, _seeded(seed))
        phi = people(20, _seeded(1000 + seed), replicates=150)
        alarms += vpc_finding(visual_predictive_check(Lines(), phi, data, generator=_seeded(seed))).light != "green"
    assert alarms <= binom.isf(1e-3, 40, 0.05)  # stated: at most 5%
    data = data_set(60, TIMES, _seeded(5))
    wide = people(60, _seeded(6), replicates=200)
    wide[..., :2] = MEAN + 2.5 * (wide[..., :2] - MEAN)
    assert vpc_finding(visual_predictive_check(Lines(), wide, data, generator=_seeded(7))).light in ("amber", "red")
    shifted = people(60, _seeded(6), replicates=200) + torch.tensor([2.0, 0.0, 0.0])
    assert vpc_finding(visual_predictive_check(Lines(), shifted, data, generator=_seeded(7))).light == "red"


def test_corrections_are_the_papers_formulas() -> None:
    data = data_set(30, TIMES + 1, _seeded(1))
    typical = torch.cat([MEAN.expand(30, 2), torch.zeros(30, 1)], 1)
    typical[:15, 0] += 3.0  # as a covariate would move half of them
    phi = people(30, _seeded(2), replicates=100)
    predictions = (typical[:, :1] + typical[:, 1:2] * (TIMES + 1)).double().numpy()
    values = data.values[..., 0].numpy()
    # torch's median of an even number is the lower of the two in the middle.
    middle = np.sort(predictions, axis=0)[(len(predictions) - 1) // 2]
    for correction, expected in (
        ("ratio", values * middle / predictions),
        ("difference", values + middle - predictions),
    ):
        found = visual_predictive_check(
            Lines(), phi, data, generator=_seeded(3), correction=correction, typical=typical.double()
        )
        np.testing.assert_allclose(
            found.signals[0].observed, np.quantile(expected, found.probabilities, axis=0), rtol=1e-10
        )
    auto = visual_predictive_check(
        Lines(), phi, data, generator=_seeded(3), correction="auto", typical=typical.double()
    )
    assert auto.signals[0].correction == "ratio"
    assert vpc_finding(auto).check == "vpc_corrected"


def test_irregular_times_get_bins_of_about_equal_counts_and_missing_values_count_for_none() -> None:
    random = np.random.default_rng(0)
    times = torch.tensor(np.sort(random.exponential(3.0, (50, 6)), axis=1))
    design = Design(times, torch.ones((50, 6, 2), dtype=torch.bool))
    phi = people(50, _seeded(1))
    values = Lines(2).simulate(phi, design, _seeded(2)).values
    mask = torch.rand(values.shape, generator=_seeded(3)) > 0.3
    data = without(replace(measured(values, times[0]), design=design), mask)
    found = visual_predictive_check(Lines(2), people(50, _seeded(4), replicates=100), data, generator=_seeded(5))
    for place, signal in enumerate(found.signals):
        there = mask[..., place]
        assert signal.counts.sum() == int(there.sum())
        assert signal.counts.max() - signal.counts.min() <= 2
        for low, high, count, observed in zip(
            signal.edges[:-1].tolist(), signal.edges[1:].tolist(), signal.counts, signal.observed.T, strict=True
        ):
            inside = there & (times >= low) & (times < (high if high < signal.edges[-1] else math.inf))
            assert int(inside.sum()) == count
            expected = np.quantile(data.values[..., place][inside].numpy(), found.probabilities)
            np.testing.assert_allclose(observed, expected, rtol=1e-10)


def test_values_below_a_limit_leave_quantiles_that_do_not_depend_on_them() -> None:
    data = data_set(200, TIMES, _seeded(1))
    limit = 0.5
    below = data.values < limit
    censored = replace(
        data,
        values=torch.where(below, limit, data.values),
        censoring=torch.where(below, int(Censoring.LEFT), int(Censoring.NONE)),
        upper=torch.where(below, limit, 0.0).double(),
    )
    phi = people(200, _seeded(2), replicates=100)
    found = visual_predictive_check(Lines(), phi, censored, generator=_seeded(3)).signals[0]
    plain = visual_predictive_check(Lines(), phi, data, generator=_seeded(3)).signals[0]
    known = plain.observed > limit + 0.2
    np.testing.assert_allclose(found.observed[known], plain.observed[known])
    assert np.isnan(found.observed[0, 0])  # a quarter of the first measurements is below
    np.testing.assert_allclose(found.censored[0], below[..., 0].double().mean(0).numpy())
    assert ((found.censored[1] <= found.censored[0]) & (found.censored[0] <= found.censored[3])).all()
    with pytest.raises(ValueError, match="correction=none"):
        visual_predictive_check(Lines(), phi, censored, generator=_seeded(3), correction="auto")
    upper = censored.upper.clone()
    upper[torch.nonzero(below[..., 0])[0, 0], torch.nonzero(below[..., 0])[0, 1]] = 0.4
    with pytest.raises(ValueError, match="2 limits of quantification"):
        visual_predictive_check(Lines(), phi, replace(censored, upper=upper), generator=_seeded(3))
    with pytest.raises(ValueError, match="at least 100 simulated data sets; got 20"):
        visual_predictive_check(Lines(), phi[:, :20], data, generator=_seeded(3))
