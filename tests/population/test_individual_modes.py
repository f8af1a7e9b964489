"""Modes of individuals given the fit: closed form where it is Gaussian, the higher of two peaks, honest names."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conjugate_case import ConjugateCase, Linear, observations
from curved_case import Curved
from linear_case import linear_case

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import Exact, GaussianPopulation, Laplace, PopulationFit, PriorRatio, fit_population
from nlme_sbi.population.results.individual_map import individual_modes
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations

DOUBLE = torch.float64
NO_SIGMA = torch.diag(torch.tensor([0.6, 0.5, 0.0], dtype=DOUBLE).square())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def gaussian() -> tuple[ConjugateCase, Linear, PopulationFit]:
    case, simulator = linear_case(NO_SIGMA, individuals=25, seed=1)
    fit = fit_population(
        case.samples(300, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        parameters=case.parameters,
        estimator=Exact(simulator=simulator),
    )
    return case, simulator, fit


def closed_form(case: ConjugateCase, fit: PopulationFit) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, which is the mode, and SDs of phi given y and the fit."""
    mean, covariance = case.posterior(fit.population.mean(fit.theta), fit.population.covariance(fit.theta))
    return mean, covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


@pytest.mark.slow
def test_modes_of_gaussian_individuals_are_their_means(gaussian: tuple) -> None:
    case, _, fit = gaussian
    found = individual_modes(fit, case.observations, generator=seeded())
    mean, sd = closed_form(case, fit)
    assert found.kinds == ("climbed",) * 25
    assert bool(((found.phi - mean).abs() <= 0.005 * sd + 1e-9).all())
    assert bool((found.phi[:, 2] == fit.theta[2]).all())
    # A draw is no mode: the test would see one that is taken for it.
    one = fit.individual_draws(1, seeded())[:, 0]
    assert float(((one - mean).abs() / sd.clamp_min(1e-9))[:, :2].max()) > 0.1


@pytest.mark.slow
def test_whoever_knows_the_likelihood_is_asked_for_it() -> None:
    case, simulator = linear_case(NO_SIGMA, individuals=8, seed=1)
    fit = fit_population(
        case.samples(100, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        parameters=case.parameters,
        estimator=Laplace(simulator=simulator),
        starts=1,
    )
    found = individual_modes(fit, case.observations, generator=seeded())
    mean, sd = closed_form(case, fit)
    assert found.kinds == ("climbed",) * 8
    assert bool(((found.phi - mean).abs() <= 0.005 * sd + 1e-9).all())


@pytest.mark.slow
def test_draws_of_gaussian_individuals_have_the_moments_of_the_closed_form(gaussian: tuple) -> None:
    case, _, fit = gaussian
    drawn = fit.individual_draws(2000, seeded(1))
    mean, sd = closed_form(case, fit)
    # 2000 of thousands of weighted draws: standard error of a mean below 0.03 SD, of an SD below 3%.
    assert bool(((drawn.mean(1) - mean).abs() <= 0.15 * sd + 1e-9).all())
    torch.testing.assert_close(drawn.std(1)[:, :2], sd[:, :2], rtol=0.15, atol=0)


class Known:
    """The exact posterior under the training prior as a posterior with a density, with or without its simulator."""

    def __init__(self, case: ConjugateCase, simulator: object | None) -> None:
        self._case, self.prior, self.parameters = case, case.prior, case.parameters
        if simulator is not None:
            self.simulator = simulator

    def sample(self, data: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        return self._case.samples(draws, seed=3)

    def log_prob(self, phi: torch.Tensor, data: Observations) -> torch.Tensor:
        centre, covariance = self._case.posterior(self.prior.mean, self.prior.covariance)
        return torch.distributions.MultivariateNormal(centre[:, None], covariance[:, None]).log_prob(phi)


def test_after_a_ratio_fit_the_likelihood_is_climbed_where_there_is_one_and_named_otherwise() -> None:
    omega = torch.diag(torch.tensor([0.6, 0.5, 0.4], dtype=DOUBLE).square())
    case, simulator = linear_case(omega, individuals=12, seed=2)
    fit = fit_population(
        case.samples(1000, seed=1),
        case.observations,
        GaussianPopulation(),
        generator=seeded(),
        parameters=case.parameters,
        estimator=PriorRatio(draws=1000, max_draws=1000),
        starts=1,
    )
    mean, sd = closed_form(case, fit)
    climbed = individual_modes(fit, case.observations, Known(case, simulator), generator=seeded())
    assert set(climbed.kinds) == {"climbed"}
    assert float(((climbed.phi - mean).abs() / sd).max()) < 0.005
    best = individual_modes(fit, case.observations, Known(case, None), generator=seeded())
    assert set(best.kinds) == {"best draw"}
    # The best of 50 draws in three dimensions: chi-square(3) is below 0.6 with probability 0.1, and 50 draws have none
    # so near with probability 0.005.
    assert float(((best.phi - mean) / sd).square().sum(1).median()) < 3 * 0.6
    heaviest = individual_modes(fit, case.observations, generator=seeded())
    assert set(heaviest.kinds) == {"heaviest draw"}
    frame = replace(fit, modes=heaviest).individuals_frame()
    assert list(frame.columns)[:5] == ["id", "uptake", "uptake.mean", "uptake.sd", "uptake.mode"]
    assert frame["mode"].unique().tolist() == ["heaviest draw"]
    assert isinstance(frame, pd.DataFrame)
    with pytest.raises(ValueError, match="these observations are of others"):
        individual_modes(fit, case.observations[:5], generator=seeded())


@pytest.mark.slow
def test_the_higher_of_two_modes_is_found_wherever_the_draws_were() -> None:
    """y = x^2 + noise: modes near +-sqrt(y), the negative one higher because the population lies there."""
    data = replace(observations(torch.tensor([[0.8], [1.5], [3.0], [0.1]], dtype=DOUBLE)), signals=("y",))
    prior = GaussianPrior({"x": {"mean": 0.0, "sd": 2.0}, "sigma": {"mean": -3.0, "sd": 0.5}})
    phi = prior.sample(4 * 60, seeded(3)).double().reshape(4, 60, 2)
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(4, 60, dtype=DOUBLE), prior=prior)
    fit = fit_population(
        samples,
        data,
        GaussianPopulation(constant=("sigma",), fixed={"mean": {"x": -0.4, "sigma": 0.05}}),
        generator=seeded(),
        parameters=Curved.parameters,
        estimator=Exact(simulator=Curved("square")),
        starts=1,
    )
    found = individual_modes(fit, data, generator=seeded())
    sd = float(fit.population.covariance(fit.theta)[0, 0].sqrt())
    grid = torch.linspace(-4, 4, 800_001, dtype=DOUBLE)
    for row in range(4):
        density = -0.5 * ((data.values[row, 0, 0] - grid**2) / 0.05) ** 2 - 0.5 * ((grid + 0.4) / sd) ** 2
        assert float(found.phi[row, 0]) == pytest.approx(float(grid[density.argmax()]), abs=1e-3)
    assert bool((found.phi[:3, 0] < 0).all())
