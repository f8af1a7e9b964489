"""The exact estimator against closed forms and quadrature: linear, bimodal, weakly identified, kinked, constant."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, Linear, observations
from curved_case import Curved, by_quadrature
from linear_case import DOUBLE, MEAN, NO_SIGMA, OMEGA, Opaque, linear_case, log_likelihood, seeded
from scipy.stats import t as student
from theophylline_quadrature import ESTIMATE, RESIDUAL, SDS, people, quadrature

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.numerics.t_mixtures import Mixtures
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.estimators.exact_draws import ExactDraws
from nlme_sbi.population.objective.objective import contributions, effective_draws, hessian, scores, value_and_gradient
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations


def drawn(
    case: ConjugateCase, simulator: Linear, population: GaussianPopulation, theta: torch.Tensor, draws: int
) -> ExactDraws:
    estimator = Exact(draws=draws, max_draws=max(draws, 8192), simulator=simulator)
    samples, model = case.samples(100, seed=1), population.bind(case.parameters)
    first = estimator.prepare(samples, case.observations, model, seeded())
    return estimator.draws_at(samples, case.observations, theta, first, seeded())


@pytest.mark.parametrize("constant", [(), ("sigma",)])
def test_the_objective_is_the_log_likelihood(constant: tuple[str, ...]) -> None:
    omega = NO_SIGMA if constant else OMEGA
    case, simulator = linear_case(omega, individuals=20, seed=1)
    population = GaussianPopulation(constant=constant)
    model = population.bind(case.parameters)
    theta = model.from_moments(torch.tensor(MEAN, dtype=DOUBLE), omega)
    state = drawn(case, simulator, population, theta, 4000)
    found = contributions(state, theta)
    error = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(1e-12).sqrt()
    assert float(error.max()) < 0.03
    assert bool(((found - log_likelihood(case, torch.tensor(MEAN, dtype=DOUBLE), omega)).abs() < 5 * error).all())
    # Away from where the draws were made; for a Gaussian likelihood the expansion in the constants is exact.
    away = torch.tensor([0.6, -0.35, 0.83], dtype=DOUBLE)
    there = model.from_moments(away, 1.3 * omega)
    error = (1 / effective_draws(state, there) - 1 / state.draws).clamp_min(1e-12).sqrt()
    assert bool(((contributions(state, there) - log_likelihood(case, away, 1.3 * omega)).abs() < 5 * error).all())


@pytest.mark.slow
@pytest.mark.parametrize("constant", [(), ("sigma",)])
def test_derivatives_against_finite_differences(constant: tuple[str, ...]) -> None:
    omega = NO_SIGMA if constant else OMEGA
    case, simulator = linear_case(omega, individuals=7, seed=2)
    population = GaussianPopulation(constant=constant)
    theta = population.bind(case.parameters).from_moments(torch.tensor(MEAN, dtype=DOUBLE), omega)
    state = drawn(case, simulator, population, theta, 64)
    at = theta + 0.02
    _, gradient = value_and_gradient(state, at)
    curvature = hessian(state, at)
    step = 1e-5 * torch.eye(len(theta), dtype=DOUBLE)
    numeric = [(value_and_gradient(state, at + way)[0] - value_and_gradient(state, at - way)[0]) / 2e-5 for way in step]
    torch.testing.assert_close(gradient, torch.tensor(numeric, dtype=DOUBLE), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores(state, at).sum(0), gradient, rtol=1e-10, atol=1e-10)
    slopes = [(value_and_gradient(state, at + way)[1] - value_and_gradient(state, at - way)[1]) / 2e-5 for way in step]
    torch.testing.assert_close(curvature, torch.stack(slopes), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("constant", [(), ("sigma",)])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_fit_is_the_maximum_of_the_closed_form(constant: tuple[str, ...], covariance: str) -> None:
    omega = NO_SIGMA if constant else OMEGA
    case, simulator = linear_case(omega, individuals=80, seed=3)
    population = GaussianPopulation(constant=constant, covariance=covariance)
    fit = fit_population(
        case.samples(300, seed=1),
        case.observations,
        population,
        generator=seeded(),
        parameters=case.parameters,
        estimator=Exact(simulator=simulator),
        starts=1,
    )
    start = fit.population.from_moments(torch.tensor(MEAN, dtype=DOUBLE), omega)
    best, se, _ = case.maximum(fit.population, start)
    assert fit.converged
    assert float(((fit.theta - best).abs() / se).max()) < 0.15  # Monte-Carlo error was asked to be below 0.1
    torch.testing.assert_close(fit.standard_errors, se, rtol=0.1, atol=0)
    closed = -2 * float(log_likelihood(case, fit.population.mean(best), fit.population.covariance(best)).sum())
    assert abs(fit.minus_two_log_likelihood - closed) < 4 * 2 * fit.monte_carlo.objective_se + 0.05
    assert fit.objective_function_value == pytest.approx(
        fit.minus_two_log_likelihood - 240 * math.log(2 * math.pi), abs=1e-6
    )
    assert "OFV" in fit.table().text()


# One dimension, by quadrature.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("square", [0.0, 0.3, 1.5, 3.0]),  # two modes
        ("saturating", [0.999, 0.97, 0.5, 1.05]),  # flat on one side: the likelihood never ends
        ("kinked", [0.05, 0.2, 1.0, -0.2]),  # no curvature at the best point
    ],
)
def test_modes_tails_and_kinks_are_all_found(shape: str, values: list[float]) -> None:
    mean, sd, sigma = -0.4, 1.5, 0.05
    data = observations(torch.tensor(values, dtype=DOUBLE)[:, None])
    data = replace(data, signals=("y",))
    simulator = Curved(shape)
    model = GaussianPopulation(constant=("sigma",)).bind(simulator.parameters)
    theta = model.from_moments(
        torch.tensor([mean, math.log(sigma)], dtype=DOUBLE), torch.diag(torch.tensor([sd**2, 0.0], dtype=DOUBLE))
    )
    # Starts know nothing of the data: draws of a prior in place of a network's.
    prior = GaussianPrior({"x": {"mean": 0.0, "sd": 2.0}, "sigma": {"mean": -3.0, "sd": 0.5}})
    phi = prior.sample(4 * 60, seeded(3)).double().reshape(4, 60, 2)
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(4, 60, dtype=DOUBLE), prior=prior)
    estimator = Exact(draws=4000, simulator=simulator)
    state = estimator.draws_at(samples, data, theta, estimator.prepare(samples, data, model, seeded()), seeded())
    expected = [by_quadrature(shape, y, mean=mean, sd=sd, sigma=sigma) for y in values]
    error = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(1e-12).sqrt()
    assert float(error.max()) < 0.1
    found = contributions(state, theta)
    assert bool(((found - torch.tensor(expected, dtype=DOUBLE)).abs() < 4 * error + 1e-3).all())


def test_proposals_are_normalised_t_mixtures_in_the_proportions_drawn() -> None:
    counts = torch.tensor([[300, 100], [400, 0]])
    means = torch.tensor([[[0.0], [4.0]], [[1.0], [0.0]]], dtype=DOUBLE)
    factors = torch.tensor([[[[1.0]], [[0.5]]], [[[2.0]], [[1.0]]]], dtype=DOUBLE)
    mixture = Mixtures(counts, means, factors)
    phi, log_q = mixture.sample(seeded())
    x = phi[0, :, 0].numpy()
    expected = 0.75 * student.pdf(x, 6) + 0.25 * student.pdf(x, 6, loc=4.0, scale=0.5)
    np.testing.assert_allclose(log_q[0].exp().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(log_q[1].exp().numpy(), student.pdf(phi[1, :, 0].numpy(), 6, loc=1.0, scale=2.0))
    assert 60 < int((x > 2.5).sum()) < 140  # 100 of component two, tails of both
    many, _ = mixture.with_draws(40_000).sample(seeded(1))
    assert float(many[1].mean()) == pytest.approx(1.0, abs=5 * 2 * math.sqrt(1.5 / 40_000))
    assert float(many[1].var()) == pytest.approx(4 * 1.5, rel=0.1)  # nu / (nu - 2)
    assert mixture.with_draws(41).counts.sum(1).tolist() == [41, 41]
    assert mixture.with_draws(1).counts.sum(1).tolist() == [1, 1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_fit_and_another_one_the_same_within_its_error() -> None:
    case, simulator = linear_case(NO_SIGMA, individuals=25, seed=5)

    def fitted(seed: int):
        return fit_population(
            case.samples(100, seed=1),
            case.observations,
            GaussianPopulation(constant=("sigma",)),
            generator=seeded(seed),
            parameters=case.parameters,
            estimator=Exact(simulator=simulator),
            starts=2,
        )

    first, again, other = fitted(0), fitted(0), fitted(9)
    assert torch.equal(first.theta, again.theta)
    spread = math.hypot(first.monte_carlo.objective_se, other.monte_carlo.objective_se)
    assert abs(first.objective - other.objective) < 5 * spread
    assert float(((first.theta - other.theta).abs() / first.standard_errors).max()) < 0.3


def test_a_simulator_without_likelihood_is_refused_with_the_remedy() -> None:
    case, _ = linear_case(OMEGA, individuals=6, seed=6)
    samples, model = case.samples(50, seed=1), GaussianPopulation().bind(case.parameters)
    with pytest.raises(ValueError, match=r"exact needs a likelihood, and Opaque has none.*prior_ratio"):
        Exact(simulator=Opaque()).prepare(samples, case.observations, model, seeded())
    with pytest.raises(ValueError, match=r"draws do not name the simulator; pass Exact\(simulator="):
        Exact().prepare(samples, case.observations, model, seeded())


def test_data_that_the_model_cannot_produce_are_refused_by_name() -> None:
    case, _ = linear_case(OMEGA, individuals=6, seed=7)

    class Impossible(Linear):
        def log_likelihood(self, data: Observations, phi: torch.Tensor) -> torch.Tensor:
            found = super().log_likelihood(data, phi)
            wrong = (data.values[:, 0, 0] > 50).reshape(-1, *(1,) * (found.ndim - 1))
            return torch.where(wrong, -torch.inf, found)

    data = replace(case.observations, values=case.observations.values.clone())
    data.values[2] = 99.0
    samples, model = case.samples(50, seed=1), GaussianPopulation().bind(case.parameters)
    estimator = Exact(simulator=Impossible(case, 0.3))
    first = estimator.prepare(samples, data, model, seeded())
    theta = model.from_moments(torch.tensor(MEAN, dtype=DOUBLE), OMEGA)
    with pytest.raises(ValueError, match=r"likelihood of 1 of 6 individuals is 0.*first: cell_2"):
        estimator.draws_at(samples, data, theta, first, seeded())


@pytest.mark.parametrize("settings", [{"draws": 8}, {"draws": 100, "max_draws": 50}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="estimator: needs"):
        Exact(**settings)


# Theophylline, all 132 observations.

DATA = Path(__file__).resolve().parents[2] / "data" / "theophylline"


@pytest.mark.slow
def test_theophylline_against_quadrature_at_the_exact_estimate() -> None:
    from omegaconf import OmegaConf

    from nlme_sbi.cli import compose_config
    from nlme_sbi.config.instantiate import instantiate

    plain = OmegaConf.to_container(compose_config("fit_population", ["experiment=theophylline"]), resolve=True)
    plain["data"]["path"] = str(DATA.parents[1] / plain["data"]["path"])
    data = instantiate(plain["data"], where="data").read()
    simulator = instantiate(plain["simulator"], where="simulator")
    prior = instantiate(plain["prior"], where="prior")
    model = GaussianPopulation(constant=("sigma",)).bind(simulator.parameters)
    theta = model.from_moments(
        torch.tensor([*ESTIMATE.values(), math.log(RESIDUAL)], dtype=DOUBLE),
        torch.diag(torch.tensor([*SDS.values(), 0.0], dtype=DOUBLE).square()),
    )
    phi = prior.sample(12 * 200, seeded(3)).double().reshape(12, 200, 4)
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(12, 200, dtype=DOUBLE), prior=prior)
    estimator = Exact(draws=4000, simulator=simulator)
    state = estimator.draws_at(samples, data, theta, estimator.prepare(samples, data, model, seeded()), seeded())
    found = contributions(state, theta)
    mean, sd = list(ESTIMATE.values()), list(SDS.values())
    expected = [quadrature(person, mean=mean, sd=sd, residual=RESIDUAL, nodes=21) for person in people(data)]
    assert -2 * sum(expected) == pytest.approx(360.7009, abs=0.01)  # the published one, with rounded estimates
    error = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(1e-12).sqrt()
    assert float(error.max()) < 0.03
    assert bool(((found - torch.tensor(expected, dtype=DOUBLE)).abs() < 5 * error + 1e-4).all())
