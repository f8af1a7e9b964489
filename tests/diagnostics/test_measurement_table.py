"""The table of measurements against closed forms: typical curves, modes, residuals and whitened prediction errors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from linear_people import MEAN, NOISE, SD, Lines, data_set, people, without
from scipy.stats import kstest, norm

from nlme_sbi.diagnostics.fit.npde import prediction_errors, prediction_errors_finding
from nlme_sbi.diagnostics.measurement_table import COLUMNS, individual_predictions, measurement_table, scatter
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Exponential, Proportional
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Censoring, Observations

TIMES = torch.tensor([0.0, 0.5, 1.0, 2.0])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _typical(count: int) -> torch.Tensor:
    return torch.cat([MEAN, torch.tensor([math.log(NOISE)])]).expand(count, 3)


def _best(data: Observations) -> np.ndarray:
    """Best linear unbiased predictor of each individual's level and slope: its mode, from the textbook."""
    mask, times = data.design.observed[..., 0].numpy(), data.design.times.double().numpy()
    found = []
    for row in range(len(data)):
        loadings = np.stack([np.ones(mask[row].sum()), times[row][mask[row]]], 1)
        total = loadings @ np.diag(SD.numpy() ** 2) @ loadings.T + NOISE**2 * np.eye(len(loadings))
        apart = data.values[row, :, 0].numpy()[mask[row]] - loadings @ MEAN.numpy()
        found.append(MEAN.numpy() + np.diag(SD.numpy() ** 2) @ loadings.T @ np.linalg.solve(total, apart))
    return np.array(found)


def _table(data: Observations, *, simulations: int = 4000, seed: int = 2) -> tuple[pd.DataFrame, np.ndarray]:
    best = _best(data)
    own = torch.cat([torch.tensor(best), torch.full((len(data), 1), math.log(NOISE))], 1)
    predictions = individual_predictions(Lines(), _typical(len(data)), own, data)
    phi = people(len(data), _seeded(seed), replicates=simulations)
    errors = prediction_errors(Lines(), phi, data, generator=_seeded(seed + 1), null=0)
    return measurement_table(data, predictions, errors), best


def test_predictions_residuals_and_errors_are_those_of_the_closed_form() -> None:
    data = data_set(12, TIMES, _seeded(1))
    frame, best = _table(data)
    assert list(frame.columns) == ["id", "time", "signal", "DV", "status", *COLUMNS]
    assert frame["id"].tolist() == [name for name in data.ids for _ in TIMES]
    assert frame["time"].tolist() == TIMES.tolist() * 12
    assert set(frame["status"]) == {"measured"}
    times, values = TIMES.double().numpy(), data.values[..., 0].numpy()
    own = best[:, :1] + best[:, 1:] * times
    np.testing.assert_allclose(frame["DV"], values.ravel())
    np.testing.assert_allclose(frame["PRED"], np.tile(float(MEAN[0]) + float(MEAN[1]) * times, 12))
    np.testing.assert_allclose(frame["IPRED"], own.ravel())
    np.testing.assert_allclose(frame["IRES"], (values - own).ravel(), atol=1e-12)
    np.testing.assert_allclose(frame["IWRES"], ((values - own) / NOISE).ravel(), atol=1e-12)
    # Brendel et al. (2006) by hand, with the exact moments instead of simulated ones.
    loadings = np.stack([np.ones(4), times], 1)
    covariance = loadings @ np.diag(SD.numpy() ** 2) @ loadings.T + NOISE**2 * np.eye(4)
    apart = values - loadings @ MEAN.numpy()
    white = np.linalg.solve(np.linalg.cholesky(covariance), apart.T).T.ravel()
    plain = (apart / np.sqrt(np.diag(covariance))).ravel()
    for name, expected in (("NPDE", white), ("NPD", plain)):
        p = norm.cdf(expected)
        error = 6 * np.sqrt(p * (1 - p) / 4000) / norm.pdf(expected)
        assert (np.abs(frame[name] - expected) < error + 0.01).all()
    np.testing.assert_allclose(frame["PWRES"], white, atol=6 * 3 / math.sqrt(4000))
    np.testing.assert_allclose(frame["PDE"], norm.cdf(frame["NPDE"]), rtol=1e-9)


def test_errors_of_a_right_model_are_standard_normal_and_of_a_wrong_one_are_not() -> None:
    right, _ = _table(data_set(150, TIMES, _seeded(4)), simulations=1000, seed=5)
    # Kolmogorov's test at one false alarm in a thousand.
    assert kstest(right["NPDE"], "norm").pvalue > 1e-3
    wrong = data_set(150, TIMES, _seeded(4))
    wrong = replace(wrong, values=wrong.values * 1.5)
    assert kstest(_table(wrong, simulations=1000, seed=5)[0]["NPDE"], "norm").pvalue < 1e-3


def test_what_was_not_measured_has_no_row() -> None:
    data = data_set(6, TIMES, _seeded(1))
    mask = data.design.observed.clone()
    mask[2, 1:] = False
    frame, best = _table(without(data, mask), simulations=400)
    assert frame.groupby("id").size().tolist() == [4, 4, 1, 4, 4, 4]
    row = frame[frame["id"] == "p2"].iloc[0]
    assert row["IPRED"] == pytest.approx(best[2, 0])
    assert not frame[["PRED", "IPRED", "IWRES", "NPDE"]].isna().any().any()


def test_censored_measurements_are_marked_and_have_limits_instead_of_residuals() -> None:
    data = data_set(8, TIMES, _seeded(3))
    codes = torch.zeros_like(data.values, dtype=torch.int64)
    codes[0, 0], codes[1, 1], codes[2, 2] = int(Censoring.LEFT), int(Censoring.RIGHT), int(Censoring.INTERVAL)
    lower, upper = torch.full_like(data.values, 3.0), torch.full_like(data.values, 4.0)
    censored = replace(data, censoring=codes, lower=lower, upper=upper)
    frame, _ = _table(censored, simulations=2000)
    marked = frame[frame["status"] != "measured"].set_index("id")
    assert marked["status"].tolist() == ["left", "right", "interval"]
    assert marked["DV"].tolist() == [4.0, 3.0, 4.0]
    assert marked["lower"].isna().tolist() == [True, False, False]
    assert marked["upper"].isna().tolist() == [False, True, False]
    assert marked[["IRES", "IWRES"]].isna().all().all()
    assert not marked[["PRED", "IPRED", "NPD", "NPDE"]].isna().any().any()
    rest = frame[frame["status"] == "measured"]
    assert not rest[list(COLUMNS)].isna().any().any()
    assert rest[["lower", "upper"]].isna().all().all()
    # The one below 4 at time 0 is drawn from what is simulated there: its score is below that of the limit.
    limit = (4.0 - float(MEAN[0])) / math.hypot(float(SD[0]), NOISE)
    assert marked.loc["p0", "NPD"] < limit + 0.1


def test_columns_that_cannot_be_had_are_empty() -> None:
    data = data_set(3, TIMES, _seeded(1))
    frame = measurement_table(data, None, None)
    assert list(frame.columns) == ["id", "time", "signal", "DV", "status", *COLUMNS]
    assert frame[list(COLUMNS)].isna().all().all()
    assert len(frame) == 12
    phi = people(2, _seeded(2), replicates=300)
    errors = prediction_errors(Lines(), phi, data[[0, 2]], generator=_seeded(3), null=0)
    some = measurement_table(data, None, scatter(errors, [0, 2], 3))
    assert some.groupby("id")["NPDE"].count().tolist() == [4, 0, 4]
    with pytest.raises(ValueError, match="were not tested"):
        prediction_errors_finding(errors)


class Levels(MechanisticSimulator):
    """A positive level, with the noise that is asked for."""

    parameters = ParameterSpace((Parameter("level"), Parameter("sd")))
    signals, signal_units = ("y",), ("mg/L",)

    def __init__(self, noise: object) -> None:
        self.noise = noise

    def predict(self, phi, design):
        return phi[..., :1, None].exp().expand(*phi.shape[:-1], design.times.shape[1], 1)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (Exponential(sd="sd"), lambda y, f: (np.log(y) - np.log(f)) / 0.3),
        (Proportional(cv="sd"), lambda y, f: (y - f) / (0.3 * f)),
    ],
)
def test_weighted_residuals_are_on_the_scale_of_the_noise(noise, expected) -> None:
    data = replace(data_set(4, TIMES, _seeded(1)), signals=("y",))
    data = replace(data, values=data.values.abs() + 0.1)
    own = torch.log(torch.tensor([[1.0, 0.3], [2.0, 0.3], [3.0, 0.3], [4.0, 0.3]], dtype=torch.float64))
    found = individual_predictions(Levels(noise), own[:1].expand(4, 2), own, data)
    values, f = data.values[..., 0].numpy(), np.array([[1.0], [2.0], [3.0], [4.0]])
    np.testing.assert_allclose(found.weighted[..., 0].numpy(), expected(values, f))
    np.testing.assert_allclose(found.residual[..., 0].numpy(), values - f)
    np.testing.assert_allclose(found.population[..., 0].numpy(), 1.0)


def test_a_residual_without_noise_to_measure_it_by_is_empty() -> None:
    """A proportional error about a prediction of 0, such as before the dose."""

    class Nothing(Lines):
        noise = Proportional(cv="sd")

    data = data_set(2, TIMES, _seeded(1))
    own = torch.tensor([[0.0, 1.0, -1.0]] * 2, dtype=torch.float64)
    found = individual_predictions(Nothing(), own, own, data)
    assert bool(found.weighted[:, 0].isnan().all())
    assert not bool(found.weighted[:, 1:].isnan().any())
    assert not bool(found.residual.isnan().any())
