"""Individuals when theta is uncertain, and new ones: closed forms of the linear Gaussian case, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, parameter_space
from scipy.stats import norm
from torch import Tensor

from nlme_sbi.population import GaussianPopulation
from nlme_sbi.population.theta_posterior.draws import normal_theta
from nlme_sbi.population.theta_posterior.individuals import individuals_over_theta, new_individuals
from nlme_sbi.types import Design

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def never(phi: Tensor, rows: Tensor) -> Tensor:
    raise AssertionError("the likelihood was asked for, and no constant differs")


def gaussian_draws(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    noise = torch.randn((len(mean), count, mean.shape[1]), generator=seeded(seed), dtype=DOUBLE)
    return mean[:, None] + noise @ torch.linalg.cholesky(covariance).mT


@pytest.mark.slow
def test_measured_individuals_follow_the_mixture_over_theta() -> None:
    omega = torch.diag(torch.tensor([0.36, 0.25], dtype=DOUBLE))
    case = ConjugateCase.simulated([0.5, -0.3], omega, individuals=6, seed=3, noise=0.8)
    model = GaussianPopulation().bind(case.parameters)
    estimate = model.from_moments(torch.tensor([0.5, -0.3], dtype=DOUBLE), omega)
    covariance = torch.diag(torch.tensor([0.25, 0.2, 0.2, 0.2], dtype=DOUBLE).square())
    thetas = normal_theta(model, estimate, covariance, 1500, seeded(1))
    at_estimate = case.posterior(model.mean(estimate), model.covariance(estimate))
    found = individuals_over_theta(
        gaussian_draws(*at_estimate, 1000, seed=2),
        estimate,
        thetas,
        model,
        case.observations.design,
        log_likelihood=never,
        generator=seeded(4),
    )
    each = [case.posterior(model.mean(theta), model.covariance(theta)) for theta in thetas]
    means, spreads = torch.stack([mean for mean, _ in each]), torch.stack([spread for _, spread in each])
    mean = means.mean(0)
    variance = spreads.diagonal(dim1=2, dim2=3).mean(0) + means.var(0)
    # 1500 draws and 1000 stored ones: a standard error of a mean is 0.04 SD, of an SD 3%.
    assert bool(((found.phi.mean(1) - mean).abs() < 0.15 * variance.sqrt()).all())
    torch.testing.assert_close(found.phi.std(1), variance.sqrt(), rtol=0.12, atol=0)
    # Each draw belongs to its theta: regressed on the closed form's means the slope is 1; against others it is 0.
    residual = means.transpose(0, 1) - mean[:, None]
    slope = (residual * (found.phi - found.phi.mean(1, keepdim=True))).sum(1) / residual.square().sum(1)
    assert float((slope - 1).abs().max()) < 0.7
    shuffled = (residual.flip(1) * (found.phi - found.phi.mean(1, keepdim=True))).sum(1) / residual.square().sum(1)
    assert float((shuffled.mean() - 1).abs()) > 0.5
    assert bool((found.support > 0.5).all())
    # A population that theta pulls far away leaves little of the stored draws.
    away = estimate + torch.tensor([3.0, 0.0, -2.0, 0.0], dtype=DOUBLE)
    far = individuals_over_theta(
        gaussian_draws(*at_estimate, 1000, seed=2),
        estimate,
        away.expand(50, -1),
        model,
        case.observations.design,
        log_likelihood=never,
        generator=seeded(4),
    )
    assert bool((far.support < 0.1).all())


@pytest.mark.slow
def test_a_constant_that_is_uncertain_enters_through_the_likelihood() -> None:
    """y_it = x_i + sigma eps: with another sigma, x given y has another mean and SD, in closed form."""
    individuals, times, omega, mu = 5, 4, 1.0, 0.0
    y = 1.5 * torch.randn((individuals, times), generator=seeded(5), dtype=DOUBLE)
    model = GaussianPopulation(constant=("sigma",)).bind(parameter_space(("x", "sigma")))
    estimate = torch.tensor([mu, math.log(1.0), math.log(omega)], dtype=DOUBLE)

    def posterior(log_sigma: float) -> tuple[Tensor, float]:
        precision = times / math.exp(2 * log_sigma) + 1 / omega**2
        return (y.sum(1) / math.exp(2 * log_sigma) + mu / omega**2) / precision, precision**-0.5

    def log_likelihood(phi: Tensor, rows: Tensor) -> Tensor:
        residual = y[rows][:, None] - phi[..., :1]
        return -0.5 * (residual / phi[..., 1:].exp()).square().sum(-1) - times * phi[..., 1]

    mean, sd = posterior(0.0)
    x = mean[:, None] + sd * torch.randn((individuals, 2000), generator=seeded(6), dtype=DOUBLE)
    draws = torch.stack([x, torch.zeros_like(x)], -1)
    design = Design.regular(torch.zeros(1, dtype=DOUBLE), individuals)
    for log_sigma in (-0.4, 0.4):
        thetas = torch.tensor([mu, log_sigma, math.log(omega)], dtype=DOUBLE).expand(1000, -1)
        found = individuals_over_theta(
            draws, estimate, thetas, model, design, log_likelihood=log_likelihood, generator=seeded(7)
        )
        assert bool((found.phi[..., 1] == log_sigma).all())
        mean, sd = posterior(log_sigma)
        # 16 candidates leave a sixteenth of the change undone; 1000 draws have standard errors of 0.03 SD and 2%.
        assert float((found.phi[..., 0].mean(1) - mean).abs().max()) < 0.2 * sd
        np.testing.assert_allclose(found.phi[..., 0].std(1), sd, rtol=0.1)
        assert abs(posterior(0.0)[1] - sd) > 0.1 * sd  # as it was without the likelihood: rejected


def test_new_individuals_are_normal_with_the_variance_of_theta_added() -> None:
    model = GaussianPopulation().bind(parameter_space(("x",)))
    estimate = torch.tensor([1.0, math.log(0.5)], dtype=DOUBLE)
    covariance = torch.diag(torch.tensor([0.3, 1e-6], dtype=DOUBLE).square())
    thetas = normal_theta(model, estimate, covariance, 4000, seeded(1))
    phi = new_individuals(model, thetas, Design.regular(torch.zeros(1), 10), seeded(2))
    assert phi.shape == (10, 4000, 1)
    # Normal with variance 0.25 + 0.09: bands in closed form. Ten rows share each theta's mean, so that a quantile's
    # standard error is up to 1.5% of the SD.
    sd = math.sqrt(0.34)
    found = torch.quantile(phi.flatten(), torch.tensor([0.05, 0.5, 0.95], dtype=DOUBLE))
    expected = torch.tensor([1 - 1.645 * sd, 1.0, 1 + 1.645 * sd], dtype=DOUBLE)
    assert float((found - expected).abs().max()) < 0.06 * sd
    assert abs(float(found[2]) - (1 + 1.645 * 0.5)) > 0.06 * sd  # without the uncertainty of theta: rejected


@pytest.mark.slow
def test_bands_of_new_individuals_cover_new_measurements() -> None:
    """150 data sets of 8 individuals: the chance that a new measurement lies within their 90% band, in closed form.

    With known measurement error s the likelihood of (mu, log omega) is that of normal data with variance omega^2 + s^2.
    """
    individuals, mu, omega, noise = 8, 0.5, 1.0, 0.5
    model = GaussianPopulation().bind(parameter_space(("x",)))
    random, truth = np.random.default_rng(3), norm(0.5, math.hypot(1.0, 0.5))
    covered = {"uncertain": [], "certain": []}
    for repetition in range(150):
        y = mu + math.hypot(omega, noise) * random.standard_normal(individuals)
        total = max(float(y.var()), 1.05 * noise**2)
        log_sd = 0.5 * math.log(total - noise**2)
        # Information of log omega: I/2 (d log(omega^2 + s^2) / d log omega)^2.
        slope = 2 * math.exp(2 * log_sd) / total
        errors = torch.tensor([total / individuals, min(1.0, 2 / (individuals * slope**2))], dtype=DOUBLE)
        estimate = torch.tensor([float(y.mean()), log_sd], dtype=DOUBLE)
        thetas = normal_theta(model, estimate, torch.diag(errors), 60, seeded(repetition))
        phi = new_individuals(model, thetas, Design.regular(torch.zeros(1), 10), seeded(repetition))[..., 0]
        measured = phi + noise * torch.randn(phi.shape, generator=seeded(repetition + 1000), dtype=DOUBLE)
        low, high = np.quantile(measured.numpy().ravel(), [0.05, 0.95])
        covered["uncertain"].append(truth.cdf(high) - truth.cdf(low))
        low, high = norm(float(y.mean()), math.sqrt(total)).ppf([0.05, 0.95])
        covered["certain"].append(truth.cdf(high) - truth.cdf(low))
    # Data sets differ by about 0.1, so 150 of them have a standard error of 0.008. Maximum likelihood takes the
    # variance of 8 individuals an eighth too small, which costs some of the 90%.
    assert 0.84 < np.mean(covered["uncertain"]) < 0.93
    assert np.mean(covered["certain"]) < 0.835  # bands that take the estimate for the truth are rejected
