"""The score test of variability against closed forms and over repeated data; variances that run to 0."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from closed_form import ClosedDraws, ClosedForm, closed_fit, even_case
from conjugate_case import ConjugateCase, Linear
from linear_case import NO_SIGMA
from scipy.stats import binom, norm
from torch.distributions import MultivariateNormal

from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.objective.variance_tests import variance_slopes, variance_tests

DOUBLE = torch.float64
CONSTANT = GaussianPopulation(constant=("decay",))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marginal(case: ConjugateCase, mean: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """``log p(y_i)`` in closed form, any covariance between individuals."""
    covariance = case.loadings @ omega @ case.loadings.T + torch.diag_embed(case.noise.square())
    return MultivariateNormal(case.loadings @ mean, covariance).log_prob(case.y)


def two(decay_sd: float, *, individuals: int, seed: int) -> ConjugateCase:
    return even_case([0.5, -0.3], [0.6, decay_sd], noise=0.5, individuals=individuals, seed=seed)


@pytest.mark.slow
def test_the_slope_in_a_variance_at_zero_is_that_of_the_marginal_likelihood() -> None:
    """The heat equation against the derivative of the closed-form likelihood in the variance."""
    case = two(0.2, individuals=12, seed=1)
    fit = closed_fit(case, CONSTANT)
    direction = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)
    omega = fit.population.covariance(fit.theta)

    def of_variance(variance: torch.Tensor) -> torch.Tensor:
        return marginal(case, fit.population.mean(fit.theta), omega + torch.diag(torch.stack([variance * 0, variance])))

    expected = torch.func.jacrev(of_variance)(torch.tensor(0.0, dtype=DOUBLE))
    torch.testing.assert_close(variance_slopes(fit.state, fit.theta, direction), expected, rtol=1e-6, atol=1e-6)
    (test,) = fit.variance_tests
    assert test.slope == pytest.approx(float(expected.sum()), rel=1e-6, abs=1e-6)
    # The efficient score: the sum over what its residuals, given the scores of what was estimated, let expect.
    theta = fit.theta.clone().requires_grad_(True)
    scores = torch.autograd.functional.jacobian(
        lambda at: marginal(case, fit.population.mean(at), fit.population.covariance(at)), theta
    ).numpy()
    design = np.column_stack([np.ones(12), scores])
    residual = expected.numpy() - design @ np.linalg.lstsq(design, expected.numpy(), rcond=None)[0]
    z = float(expected.sum()) / math.sqrt(12 * (residual**2).sum() / (12 - 4))
    assert test.z == pytest.approx(z, rel=1e-3)
    assert test.p == pytest.approx(norm.sf(z), rel=1e-2)


def test_draws_of_the_exact_estimator_give_the_same_within_their_error() -> None:
    case = even_case([0.5, -0.3, 0.8], [0.6, 0.5, 0.0], noise=0.3, individuals=30, seed=3)
    simulator = Linear(case, 0.3)
    population = GaussianPopulation(constant=("sigma",))
    model = population.bind(case.parameters)
    best, _, _ = case.maximum(model, model.from_moments(torch.tensor([0.5, -0.3, 0.8], dtype=DOUBLE), NO_SIGMA))
    estimator = Exact(draws=1000, simulator=simulator)
    samples = case.samples(100, seed=1)
    state = estimator.draws_at(
        samples, case.observations, best, estimator.prepare(samples, case.observations, model, seeded()), seeded()
    )
    (found,) = variance_tests(state, best)
    closed = replace(closed_fit(case, population), theta=best)
    (expected,) = variance_tests(closed.state, best)
    assert found.monte_carlo_se < 0.1
    assert abs(found.z - expected.z) < 4 * found.monte_carlo_se + 0.02
    assert expected.monte_carlo_se == 0.0


def apart(decay_sd: float, *, individuals: int, seed: int) -> tuple[ClosedDraws, torch.Tensor]:
    """One signal for each parameter: then the estimate is known, and the test can be repeated often."""
    case = replace(two(decay_sd, individuals=individuals, seed=seed), loadings=torch.eye(2, dtype=DOUBLE))
    phi = np.array([0.5, -0.3]) + np.array([0.6, decay_sd]) * np.random.default_rng(seed).standard_normal(
        (individuals, 2)
    )
    y = torch.tensor(phi + 0.5 * np.random.default_rng(seed + 10_000).standard_normal((individuals, 2)))
    case = replace(case, y=y)
    model = CONSTANT.bind(case.parameters)
    state = ClosedForm(case).prepare(case.samples(2, seed=1), case.observations, model, seeded())
    log_sd = 0.5 * torch.log(y[:, 0].var(unbiased=False) - 0.25)
    return state, torch.stack([y[:, 0].mean(), y[:, 1].mean(), log_sd])


@pytest.mark.slow
def test_the_level_holds_without_variability_and_variability_is_found() -> None:
    repeats, rejected, seen = 100, 0, []
    for seed in range(repeats):
        (test,) = variance_tests(*apart(0.0, individuals=100, seed=seed))
        seen.append(test.z)
        rejected += test.p < 0.05
    # One in a thousand false alarms each way; an efficient score is standard normal up to terms of 1/sqrt(100).
    assert binom.ppf(5e-4, repeats, 0.03) <= rejected <= binom.ppf(1 - 5e-4, repeats, 0.07)
    assert abs(np.mean(seen)) < 3.3 / math.sqrt(repeats) + 0.1
    assert np.std(seen) == pytest.approx(1.0, abs=3.3 / math.sqrt(2 * repeats) + 0.1)
    for seed in range(5):
        (test,) = variance_tests(*apart(0.5, individuals=100, seed=seed))
        assert test.p < 0.01
        assert not test.estimated


@pytest.mark.slow
def test_a_variance_whose_maximum_is_at_zero_is_reported_as_zero() -> None:
    """By the closed form, the likelihood of one of these data sets falls with the variance, of the other one rises."""
    verdicts = {}
    for seed in (4, 8):
        case = two(0.0, individuals=50, seed=seed)
        smaller = closed_fit(case, CONSTANT)
        fit = closed_fit(case, GaussianPopulation())
        inner = smaller.variance_tests[0].slope > 0
        verdicts[inner] = fit
        if inner:
            assert fit.population.constant == ()
            assert fit.variance_tests == ()
            assert fit.objective > smaller.objective
            continue
        (test,) = fit.variance_tests
        assert (test.parameter, test.estimated, fit.population.constant) == ("decay", True, (1,))
        assert fit.objective == pytest.approx(smaller.objective, abs=1e-6)
        assert fit.estimated == 3
        row = fit.table().rows[1]
        assert (row.omega, row.omega_status) == (0.0, "boundary")
        assert (
            "No variability of decay (its SD was estimated at 0, the boundary); score test: z = -" in fit.table().text()
        )
        assert fit.converged
    assert set(verdicts) == {True, False}


@pytest.mark.slow
def test_the_exact_estimator_survives_a_variance_that_runs_to_zero() -> None:
    case = even_case([0.5, -0.3, 0.8], [0.6, 0.5, 0.0], noise=0.3, individuals=25, seed=2)
    simulator = Linear(case, 0.3)
    fits = [
        fit_population(
            case.samples(100, seed=1),
            case.observations,
            population,
            generator=seeded(),
            parameters=case.parameters,
            estimator=Exact(simulator=simulator, max_draws=256),
            starts=1,
        )
        for population in (GaussianPopulation(), GaussianPopulation(constant=("sigma",)))
    ]
    (given,) = fits[1].variance_tests
    assert given.slope < 0  # the maximum is at 0
    assert fits[0].population.constant == (2,)
    assert fits[0].variance_tests[0].estimated
    assert not given.estimated
    assert fits[0].converged
    distance = (fits[0].theta - fits[1].theta).abs() / fits[1].standard_errors
    assert float(distance.max()) < 0.2


@pytest.mark.slow
def test_bound_models_and_fixed_sds_are_left_alone() -> None:
    case = two(0.0, individuals=50, seed=4)
    bound = closed_fit(case, GaussianPopulation().bind(case.parameters))
    assert bound.population.constant == ()
    fixed = closed_fit(case, GaussianPopulation(fixed={"sd": {"decay": 0.01}}))
    assert fixed.population.constant == ()
    few = closed_fit(two(0.0, individuals=4, seed=1), CONSTANT)
    assert math.isnan(few.variance_tests[0].z)
    assert "no score test: too few individuals" in few.table().text()
