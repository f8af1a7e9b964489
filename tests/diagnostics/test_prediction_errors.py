"""Prediction distribution errors against closed forms; false alarms and rejections; limits and thinning."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_people import MEAN, NOISE, SD, Lines, data_set, people, without
from scipy.stats import binom, norm

from nlme_sbi.diagnostics.fit.iwres import anderson_darling_p
from nlme_sbi.diagnostics.fit.npde import anderson_darling, prediction_errors, prediction_errors_finding
from nlme_sbi.types import Censoring

TIMES = torch.tensor([0.0, 0.5, 1.0, 2.0])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _moments(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loadings = np.stack([np.ones_like(times), times], 1)
    return loadings @ MEAN.numpy(), loadings @ np.diag(SD.numpy() ** 2) @ loadings.T + NOISE**2 * np.eye(len(times))


def test_errors_of_a_normal_population_are_its_whitened_residuals() -> None:
    replicates = 4000
    data = data_set(12, TIMES, _seeded(1))
    phi = people(12, _seeded(2), replicates=replicates + 99)
    found = prediction_errors(Lines(), phi, data, generator=_seeded(3), null=99)
    mean, covariance = _moments(TIMES.double().numpy())
    apart = data.values[..., 0].numpy() - mean
    white = np.linalg.solve(np.linalg.cholesky(covariance), apart.T).T
    plain = apart / np.sqrt(np.diag(covariance))
    # A normal score from K draws has SE sqrt(p(1-p)/K)/density; means and covariances add about as much.
    for scores, expected in ((found.npde, white), (found.npd, plain)):
        p = norm.cdf(expected)
        error = 6 * np.sqrt(p * (1 - p) / replicates) / norm.pdf(expected)
        assert (np.abs(scores[..., 0].numpy() - expected) < error + 0.01).all()
    np.testing.assert_allclose(found.pwres[..., 0].numpy(), white, atol=6 * 3 / math.sqrt(replicates))
    np.testing.assert_allclose(found.prediction[0, :, 0].numpy(), mean, atol=6 * 2 / math.sqrt(replicates))
    frame = found.to_frame(data)
    assert len(frame) == 48
    assert set(frame.columns) >= {"id", "time", "signal", "value", "prediction", "npd", "pwres", "npde"}


@pytest.mark.slow
def test_false_alarms_are_rare_and_each_fault_is_seen_by_its_test() -> None:
    alarms = 0
    for seed in range(30):
        data = data_set(15, TIMES, _seeded(seed), signals=2)
        phi = people(15, _seeded(1000 + seed), replicates=499)
        found = prediction_errors(Lines(2), phi, data, generator=_seeded(seed))
        alarms += prediction_errors_finding(found).light != "green"
    assert alarms <= binom.isf(1e-3, 30, 0.05)  # stated: at most 5%
    data = data_set(40, TIMES, _seeded(5))
    for change, field in (
        (lambda phi: phi + torch.tensor([1.0, 0.0, 0.0]), "p_mean"),
        (lambda phi: phi + torch.tensor([0.0, 0.0, 0.6]), "p_variance"),
        (lambda phi: torch.cat([phi[..., :2], phi[..., 2:] - 0.5], -1), "p_shape"),
    ):
        tests = prediction_errors(
            Lines(), change(people(40, _seeded(6), replicates=499)), data, generator=_seeded(7)
        ).tests
        assert getattr(tests, field) <= 0.02
    gross = prediction_errors(
        Lines(), people(40, _seeded(6), replicates=499) + torch.tensor([3.0, 0, 0]), data, generator=_seeded(7)
    )
    assert prediction_errors_finding(gross).light == "red"


def test_missing_values_have_no_errors_and_long_series_are_thinned_evenly() -> None:
    times = torch.linspace(0, 3, 60)
    data = data_set(6, times, _seeded(1))
    mask = torch.rand(data.values.shape, generator=_seeded(2)) > 0.4
    data = without(data, mask)
    found = prediction_errors(Lines(), people(6, _seeded(3), replicates=399), data, generator=_seeded(4))
    assert found.used == 10  # a twentieth of the 200 data sets
    known = ~found.npde[..., 0].isnan()
    assert bool((mask[..., 0] | ~known).all())
    assert known.sum(1).tolist() == [10] * 6
    for row in range(6):
        ranks = mask[row, :, 0].cumsum(0)[known[row]].double()  # places among the row's own measurements
        step = float(mask[row].sum()) / 10
        assert float((ranks.diff() - step).abs().max()) <= 1.0


@pytest.mark.slow
def test_censored_measurements_enter_as_what_is_known_of_them() -> None:
    alarms = 0
    for seed in range(20):
        data = data_set(25, TIMES, _seeded(seed))
        below = data.values < 1.0
        censored = replace(
            data,
            values=torch.where(below, 1.0, data.values),
            censoring=torch.where(below, int(Censoring.LEFT), int(Censoring.NONE)),
            upper=torch.where(below, 1.0, 0.0).double(),
        )
        phi = people(25, _seeded(500 + seed), replicates=499)
        errors = prediction_errors(Lines(), phi, censored, generator=_seeded(seed))
        alarms += prediction_errors_finding(errors).light != "green"
        known = ~below & (errors.npd.abs() < 3)
        assert bool((errors.npd[below].max() < errors.npd[:, 0][known[:, 0]].max()).all())
    assert alarms <= binom.isf(1e-3, 20, 0.05)


def test_anderson_darling_is_scipys_and_its_p_values_are_uniform() -> None:
    random = np.random.default_rng(0)
    sample = random.standard_normal((2000, 50))
    found = anderson_darling(torch.tensor(sample)).numpy()
    ordered = np.sort(sample[0])
    weights = 2 * np.arange(1, 51) - 1
    expected = -50 - np.mean(weights * (norm.logcdf(ordered) + norm.logsf(ordered[::-1])))
    assert found[0] == pytest.approx(expected, rel=1e-10)
    p = np.sort([anderson_darling_p(float(one)) for one in found])
    # Kolmogorov's distance of 2000 uniform numbers: above 0.044 once in a thousand; the limit of large samples: 0.01.
    assert np.abs(p - (np.arange(2000) + 0.5) / 2000).max() < 0.054


def test_too_few_data_sets_are_refused_with_the_number_that_is_needed() -> None:
    data = data_set(3, TIMES, _seeded(1))
    with pytest.raises(ValueError, match="at least 200 simulated data sets and 59 more"):
        prediction_errors(Lines(), people(3, _seeded(2), replicates=250), data, generator=_seeded(3))
