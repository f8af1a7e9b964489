"""Whole fits with covariates against regressions in closed form, and the table that tells them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from covariate_regressions import COUNT, DOUBLE, NOISE, data_of, fitted, population, regression, seeded, three_kinds
from scipy.stats import norm
from theophylline_quadrature import people, quadrature
from torch import Tensor

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit
from nlme_sbi.population.objective.objective import contributions, effective_draws
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations
from simulators.theophylline import Theophylline


def named(fit: PopulationFit, values: Tensor) -> dict[str, float]:
    return dict(zip(fit.population.unknowns.names, values.tolist(), strict=True))


def assert_close(fit: PopulationFit, expected: dict[str, tuple[float, float]]) -> None:
    """Estimates within 0.1 standard errors (the Monte-Carlo error that was asked for), errors within 8%."""
    found, se = named(fit, fit.theta), named(fit, fit.standard_errors)
    assert fit.converged, fit.message
    for name, (value, error) in expected.items():
        assert abs(found[name] - value) < 0.15 * error, name
        assert se[name] == pytest.approx(error, rel=0.08), name


@pytest.mark.slow
def test_effects_on_varying_and_constant_parameters_are_those_of_the_regressions() -> None:
    fit, expected = three_kinds()
    assert set(expected) == set(fit.population.unknowns.names)
    assert_close(fit, expected)


def fit_data(fit: PopulationFit) -> Observations:
    return fit.state.joint.observations  # type: ignore[attr-defined]


@pytest.mark.slow
def test_shrinkage_and_individuals_are_about_each_ones_own_typical_value() -> None:
    fit, _ = three_kinds()
    y = fit_data(fit).values[:, 0]
    found = named(fit, fit.theta)
    _, male, _, _ = population()
    sd = math.exp(found["log_sd.decay"])
    typical = found["mean.decay"] + found["effect.decay.sex.m"] * torch.tensor(male, dtype=DOUBLE)
    gain = sd**2 / (sd**2 + NOISE**2)
    expected = typical + gain * (y[:, 1] - typical)
    # Posterior means of at least 30 effective draws; posterior SD 0.19.
    assert float((fit.individuals.mean[:, 1] - expected).abs().max()) < 6 * math.sqrt(gain) * NOISE / math.sqrt(
        float(fit.ess.min())
    )
    row = next(row for row in fit.table().rows if row.parameter == "decay")
    assert row.shrinkage == pytest.approx(1 - float((expected - typical).std()) / sd, abs=0.02)
    # Shrinkage that took the effect for variability would be lower.
    assert 1 - float(expected.std()) / sd < row.shrinkage - 0.03


@pytest.mark.slow
def test_full_covariance_and_effects_without_a_closed_form_step() -> None:
    """The same regressor for both parameters: generalised least squares is ordinary least squares."""
    _, _, logs, normal = population()
    root = np.linalg.cholesky(np.array([[0.16, 0.12], [0.12, 0.25]]))
    y = np.stack([0.5 + 0.75 * logs, -0.3 + 1.0 * logs], 1) + normal[:, :2] @ root.T
    y += NOISE * np.random.default_rng(4).standard_normal(y.shape)
    covariates = {name: {"weight": {"form": "power", "reference": 70}} for name in ("uptake", "decay")}
    fit = fitted(data_of(y), GaussianPopulation(covariance="full", covariates=covariates), estimator=None)
    both = [regression(y[:, column], [logs]) for column in (0, 1)]
    expected = {
        f"{kind}.{name}{tail}": (both[column][0][place], both[column][1][place])
        for column, name in enumerate(("uptake", "decay"))
        for place, (kind, tail) in enumerate((("mean", ""), ("effect", ".weight")))
    }
    assert_close(fit, expected)
    residuals = np.stack([y[:, k] - both[k][0][0] - both[k][0][1] * logs for k in (0, 1)])
    omega = residuals @ residuals.T / COUNT - NOISE**2 * np.eye(2)
    # Relative standard errors of covariances of 90 are about 0.15; 0.15 of that is allowed.
    np.testing.assert_allclose(fit.population.covariance(fit.theta).numpy(), omega, atol=0.15 * 0.15 * 0.25)


@pytest.mark.slow
def test_effects_on_sds_are_those_of_the_groups_alone() -> None:
    _, male, _, normal = population()
    y = (0.5 + 0.4 * male + np.where(male, 0.6, 0.3) * normal[:, 0])[:, None]
    y = y + NOISE * np.random.default_rng(5).standard_normal(y.shape)
    sex = {"uptake": {"sex": "categorical"}}
    fit = fitted(data_of(y), GaussianPopulation(covariates=sex, log_sd_covariates=sex))
    logs, expected = {}, {}
    for group in (False, True):
        some = y[male == group, 0]
        omega2 = some.var() - NOISE**2
        logs[group] = (0.5 * math.log(omega2), 0.5 * some.var() / omega2 * math.sqrt(2 / len(some)))
        expected[group] = (some.mean(), some.std() / math.sqrt(len(some)))
    assert_close(
        fit,
        {
            "mean.uptake": expected[False],
            "effect.uptake.sex.m": (
                expected[True][0] - expected[False][0],
                math.hypot(expected[True][1], expected[False][1]),
            ),
            "log_sd.uptake": logs[False],
            "log_sd_effect.uptake.sex.m": (
                logs[True][0] - logs[False][0],
                math.hypot(logs[True][1], logs[False][1]),
            ),
        },
    )
    row = next(row for row in fit.table().effects if row.on == "log_sd")
    assert row.ratio == pytest.approx(math.exp(row.estimate))
    assert "sex m on log SD of uptake" in fit.table().text()


def test_the_table_tells_effects_with_error_interval_and_test() -> None:
    fit, _ = three_kinds()
    table = fit.table()
    rows = {f"{row.parameter}.{row.covariate}": row for row in table.effects}
    assert list(rows) == ["uptake.weight", "decay.sex", "sigma.weight"]
    found, se = named(fit, fit.theta), named(fit, fit.standard_errors)
    for row in rows.values():
        key = f"effect.{row.parameter}.{row.covariate}" + (f".{row.level}" if row.level else "")
        assert row.estimate == found[key]
        assert row.se == pytest.approx(se[key])
        assert row.rse_percent == pytest.approx(100 * se[key] / abs(found[key]))
        assert row.lower == pytest.approx(found[key] - norm.ppf(0.975) * se[key])
        assert row.upper == pytest.approx(found[key] + norm.ppf(0.975) * se[key])
        assert row.p_value == pytest.approx(2 * norm.sf(abs(found[key]) / se[key]), rel=1e-9)
    assert (rows["decay.sex"].level, rows["decay.sex"].reference) == ("m", "f")
    assert rows["decay.sex"].ratio == pytest.approx(math.exp(found["effect.decay.sex.m"]))
    assert rows["uptake.weight"].ratio is None  # an exponent is no ratio
    text = table.text()
    assert "weight on uptake" in text
    assert "power about 70" in text
    assert "sex m on decay" in text
    assert "categorical vs f" in text
    assert "<0.0001" in text
    frame = table.effects_frame()
    assert frame["p_value"].dtype == np.float64
    assert frame["estimate"].tolist() == [row.estimate for row in table.effects]
    stored = json.loads(json.dumps(fit.to_dict()))
    assert [entry["covariate"] for entry in stored["table"]["covariate_effects"]] == ["weight", "sex", "weight"]
    assert stored["estimated_unknowns"] == 8


@pytest.mark.slow
def test_an_effect_that_is_not_there_is_not_significant() -> None:
    """A covariate of random order has no effect: the test must not reject. (This seed's p is 0.2 by regression.)"""
    weight, _, _, normal = population()
    y = (0.5 + 0.3 * normal[:, :1]) + NOISE * np.random.default_rng(6).standard_normal((COUNT, 1))
    fit = fitted(
        data_of(y),
        GaussianPopulation(covariates={"uptake": {"weight": {"form": "power", "reference": 70}}}),
        estimator=None,
    )
    coefficients, error, _ = regression(y[:, 0], [np.log(weight / 70)])
    (row,) = fit.table().effects
    assert row.p_value == pytest.approx(2 * norm.sf(abs(coefficients[1]) / error[1]), abs=0.1)
    assert row.p_value > 0.05


@pytest.mark.slow
def test_given_effects_are_kept_and_told_as_fixed() -> None:
    fit, _ = three_kinds()
    model = GaussianPopulation(
        covariates={
            "uptake": {"weight": {"form": "power", "reference": 70, "fixed": 0.75}},
            "decay": {"sex": {"form": "categorical", "fixed": {"m": 0.4}}},
        },
        covariance=[["uptake", "decay"]],
    )
    y = fit_data(fit).values[:, 0, :2].numpy()
    again = fitted(data_of(y), model, estimator=None)
    _, male, logs, _ = population()
    left = y - np.stack([0.75 * logs, 0.4 * male], 1)
    mean, omega = left.mean(0), np.cov(left.T, bias=True) - NOISE**2 * np.eye(2)
    np.testing.assert_allclose(again.population.mean(again.theta), mean, atol=0.15 * 0.5 / math.sqrt(COUNT))
    np.testing.assert_allclose(again.population.covariance(again.theta), omega, atol=0.15 * 0.15 * 0.3)
    (first, second) = again.table().effects
    assert (first.estimate, first.se, first.p_value, first.status) == (0.75, 0.0, None, "fixed")
    assert second.estimate == 0.4
    assert "fixed" in again.table().text()


@pytest.mark.slow
def test_blocks_leave_the_other_correlations_out_of_the_table() -> None:
    fit, _ = three_kinds()
    again = fitted(fit_data(fit), GaussianPopulation(covariance=[["uptake", "decay"]]), estimator=None)
    pairs = [(row.first, row.second) for row in again.table().correlations]
    assert pairs == [("uptake", "decay")]
    (row,) = again.table().correlations_frame().to_dict("records")
    assert -1 < row["lower"] < row["correlation"] < row["upper"] < 1


# Theophylline: the objective with weight on clearance and volume, and on the log SD of volume, by quadrature.

ROOT = Path(__file__).resolve().parents[2]
TYPICAL, SDS, RESIDUAL = np.array([0.46, 1.02, 3.46]), np.array([0.64, 0.26, 0.12]), 0.7
EXPONENTS, WIDER = (0.75, 1.0), 0.8  # of weight on CL and V; on the log SD of V


def by_quadrature(person: tuple[np.ndarray, np.ndarray, float], weight: float) -> float:
    share = math.log(weight / 70)
    mean = TYPICAL + share * np.array([0.0, *EXPONENTS])
    sd = SDS * np.array([1.0, 1.0, math.exp(WIDER * share)])
    return quadrature(person, mean=mean, sd=sd, residual=RESIDUAL, nodes=17)


@pytest.mark.slow
def test_proposals_cover_everybodys_own_population_on_theophylline() -> None:
    data = Observations.read_events(
        ROOT / "data" / "theophylline" / "theophylline.csv", signals="concentration", covariates=["WT"], time_unit="h"
    )
    simulator = Theophylline()
    weight = {"WT": {"form": "power", "reference": 70}}
    specification = GaussianPopulation(
        constant=("sigma",), covariates={"CL": weight, "V": weight}, log_sd_covariates={"V": weight}
    )
    model = specification.bind(simulator.parameters, data)
    theta = torch.tensor([*TYPICAL, math.log(RESIDUAL), *np.log(SDS), *EXPONENTS, WIDER], dtype=DOUBLE)
    prior = GaussianPrior({name: {"mean": 0.5, "sd": 1.5} for name in simulator.parameters.names})
    phi = prior.sample(12 * 60, seeded(3)).double().reshape(12, 60, 4)
    samples = PosteriorSamples(prior.names, phi, torch.zeros((12, 60), dtype=DOUBLE), prior)
    estimator = Exact(draws=1000, max_draws=1000, simulator=simulator)
    state = estimator.draws_at(samples, data, theta, estimator.prepare(samples, data, model, seeded()), seeded())
    found = contributions(state, theta)
    weights = data.design.covariates.column("WT").tolist()
    expected = [by_quadrature(person, weight) for person, weight in zip(people(data), weights, strict=True)]
    error = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(1e-12).sqrt()
    assert float(error.max()) < 0.05
    assert bool(((found - torch.tensor(expected, dtype=DOUBLE)).abs() < 5 * error + 1e-3).all())
    # The oracle tells covariates: without them the likelihood of somebody is another one.
    assert abs(by_quadrature(people(data)[-1], 70.0) - expected[-1]) > 0.05
