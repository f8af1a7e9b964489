"""The population by EM over draws, correlated residuals, scores: each against what is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_hierarchy import NOISE, PARAMETERS, Sums, linear_model, simulated
from scipy import stats

from nlme_sbi.hierarchical.fitting import HierarchicalSettings, prepare_model
from nlme_sbi.hierarchical.levels import Hierarchy
from nlme_sbi.hierarchical.population import (
    IndividualPopulation,
    fit_population,
)
from nlme_sbi.hierarchical.predictions import draw_measurements, predict_new, predictive_log_likelihood, replace_failed
from nlme_sbi.hierarchical.residuals import Residuals
from nlme_sbi.hierarchical.scores import coverage, crps, rmse
from nlme_sbi.individual_model.noise.correlated import correlated_log_prob, residual_correlation
from nlme_sbi.types import Censoring, Covariates, Design

ALONE = {
    "own": {"level": "individual", "mean": 0.0, "sd": 2.0},
    **{name: {"level": "constant", "value": 0.0} for name in ("common", "device")},
    "sd": PARAMETERS["sd"],
}


@pytest.mark.slow
def test_em_finds_mean_slope_and_variance_of_a_normal_population() -> None:
    generator = torch.Generator().manual_seed(2)
    observations = simulated(120, 6)
    dose = torch.exp(torch.randn(120, generator=generator, dtype=torch.float64)) - 0.9
    dose = dose.clamp_min(0)
    own = 0.7 + 0.8 * torch.log1p(dose) + 0.5 * torch.randn(120, generator=generator, dtype=torch.float64)
    noise = NOISE * torch.randn((120, 6), generator=generator, dtype=torch.float64)
    observations = replace(
        observations,
        values=(own[:, None] + noise)[..., None],
        design=replace(observations.design, groups=None, covariates=Covariates(("dose",), dose[:, None])),
    )
    model = linear_model(observations, parameters=ALONE, start=1.0)
    individuals = model.individuals(observations, 1)
    with torch.no_grad():  # a posterior that is right for each: mean by hand, twice the exact SD
        means = observations.values[..., 0].mean(1).float() / 2.0
    model.encoder.forward = lambda features, codes: _known(means)  # type: ignore[method-assign]
    settings = IndividualPopulation(draws=300, squares=False, prior_individuals=0.01, prior_sd=100.0)
    found = fit_population(model, individuals, settings, 3)
    # Maximum likelihood in closed form: the means of readings are normal about the regression.
    columns = found.regressors.place(observations.design).columns
    target = observations.values[..., 0].mean(1)
    exact = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    variance = float((target - columns @ exact).square().mean()) - NOISE**2 / 6
    torch.testing.assert_close(2.0 * found.coefficients[:, 0], exact, atol=0.02, rtol=0)
    assert 4 * float(found.covariance) == pytest.approx(variance, rel=0.1)
    assert found.log_likelihoods[-1] > found.log_likelihoods[0]
    whole = math.sqrt(variance + NOISE**2 / 6)
    # Of the readings of one individual: their mean, and what is around it.
    scale = torch.tensor(NOISE, dtype=torch.float64)
    around = observations.values[..., 0] - target[:, None]
    inner = (
        -0.5 * (around / scale).square().sum(1) - 5 * math.log(NOISE) - 2.5 * math.log(2 * math.pi) - 0.5 * math.log(6)
    )
    wanted = inner + torch.from_numpy(stats.norm.logpdf((target - columns @ exact).numpy(), scale=whole))
    given = predictive_log_likelihood(model, found, individuals, 2000, 9)
    torch.testing.assert_close(given.mean(), wanted.mean(), atol=0.02, rtol=0)
    new = predict_new(model, found, individuals, 2000, 5)
    assert float(new.std()) == pytest.approx(float((columns @ exact).var() + variance + NOISE**2) ** 0.5, rel=0.03)


def test_draws_without_a_solution_are_replaced_by_others_of_the_same_individual() -> None:
    observations = simulated(3, 4)
    observations = replace(observations, design=replace(observations.design, groups=None))
    model = linear_model(observations, parameters=ALONE, start=1.0)
    predict = model.simulator.predict

    def fails_above(phi: torch.Tensor, design: Design) -> torch.Tensor:
        found = predict(phi, design)
        return torch.where(phi[..., :1, None] > 0, torch.nan, found)

    model.simulator.predict = fails_above  # type: ignore[method-assign]
    phi = torch.zeros((3, 5, len(model.simulator.parameters)))
    phi[..., 0] = torch.tensor([[-1.0, 1, -2, 1, -3], [1, 1, 1, 1, -7], [1, 1, 1, 1, 1]])
    phi[..., -1] = -20.0  # no noise to speak of
    made = draw_measurements(model, phi, observations.design, torch.Generator().manual_seed(0))
    low = predict(phi, observations.design)
    expected = torch.tensor([[0, 2, 2, 0, 4], [4, 4, 4, 4, 4]])
    for row in range(2):
        torch.testing.assert_close(made[row], low[row, expected[row]], atol=1e-6, rtol=0)
    assert torch.isnan(made[2]).all()  # nobody can stand for them
    kept = replace_failed(torch.tensor([[True, False, True, False, True]]))
    assert kept.tolist() == [[0, 2, 2, 0, 4]]


def _known(means: torch.Tensor):
    from nlme_sbi.hierarchical.posterior.encoder import Normals

    return Normals(means[:, None], torch.full((len(means), 1), math.log(2 * NOISE / math.sqrt(6) / 2.0)))


def test_correlated_density_is_the_multivariate_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([[0.0, 1.0, 1.5, 4.0], [0.0, 1.0, 1.5, 4.0], [0.0, 2.0, 3.0, 5.0]], dtype=torch.float64)
    observed = torch.ones((3, 4, 2), dtype=torch.bool)
    observed[1, 2, 0] = False
    time, nugget = torch.tensor([2.0, 0.7], dtype=torch.float64), torch.tensor([0.2, 0.5], dtype=torch.float64)
    residuals = torch.randn((3, 5, 4, 2), generator=generator, dtype=torch.float64)
    found = correlated_log_prob(residuals, times, observed, time, nugget)
    for row in range(3):
        correlation = residual_correlation(times[row], time, nugget).numpy()
        wanted = np.zeros(5)
        for signal in range(2):
            there = observed[row, :, signal].numpy()
            law = stats.multivariate_normal(np.zeros(there.sum()), correlation[signal][np.ix_(there, there)])
            wanted += law.logpdf(residuals[row, :, :, signal].numpy()[:, there])
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-10)


def test_a_nugget_of_one_is_independent_noise() -> None:
    observations = simulated(4, 5)
    correlated = Residuals("exponential").build(Sums(), observations)
    with torch.no_grad():
        correlated.slow_nugget.fill_(6.0)
    phi = torch.randn((4, 7, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        correlated(Sums(), observations, phi), Residuals().build(Sums(), observations)(Sums(), observations, phi)
    )


def test_censored_readings_under_correlated_residuals_are_refused() -> None:
    observations = simulated(4, 5)
    codes = torch.full((4, 5, 1), int(Censoring.NONE))
    codes[0, 0, 0] = int(Censoring.RIGHT)
    censored = replace(observations, censoring=codes, lower=observations.values, upper=observations.values)
    with pytest.raises(ValueError, match=r"1 measurements are censored.*preparation.saturated=value"):
        Residuals("exponential").build(Sums(), censored)


def test_scores_of_a_normal_forecast() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn((1, 4000, 300, 1), generator=generator, dtype=torch.float64)
    values = torch.linspace(-2, 2, 300, dtype=torch.float64)[None, :, None]
    observed = torch.ones_like(values, dtype=torch.bool)
    law, point = stats.norm, values.flatten().numpy()
    exact = point * (2 * law.cdf(point) - 1) + 2 * law.pdf(point) - 1 / math.sqrt(math.pi)
    assert float(crps(draws, values, observed)) == pytest.approx(exact.mean(), abs=0.005)
    inside = (np.abs(point) < law.ppf(0.95)).mean()
    assert float(coverage(draws, values, observed)) == pytest.approx(inside, abs=0.02)
    assert float(rmse(torch.zeros_like(values), values, observed)) == pytest.approx(math.sqrt((point**2).mean()))
    half = observed.clone()
    half[:, 150:] = False
    assert float(rmse(torch.zeros_like(values), values, half)) == pytest.approx(math.sqrt((point[:150] ** 2).mean()))
    assert float(crps(draws[:, :1], values, observed)) == pytest.approx(float((draws[:, 0] - values).abs().mean()))


def test_models_and_data_that_do_not_belong_together_are_refused() -> None:
    observations = simulated(4, 3)
    settings = HierarchicalSettings(Hierarchy(PARAMETERS))
    rows = {"fitted": torch.arange(3), "held_out": torch.tensor([3])}
    with pytest.raises(ValueError, match=r"The data have the signals .*z.*, the simulator .*y.*data.signals=\[y\]"):
        prepare_model(Sums(), settings, replace(observations, signals=("z",)), **rows)

    class Dosed(Sums):
        covariates = ("dose",)

    with pytest.raises(ValueError, match=r"reads the covariates .*dose.*, and the data have none"):
        prepare_model(Dosed(), settings, observations, **rows)
