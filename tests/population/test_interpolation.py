"""Likelihoods far from the constants that exact draws were made for, and the posterior of theta that needs them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import halfnorm, norm

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import Exact, GaussianPopulation
from nlme_sbi.population.estimators import exact_draws
from nlme_sbi.population.estimators.exact_draws import ExactDraws
from nlme_sbi.population.estimators.interpolation import InterpolatedDraws, interpolate_along_constants
from nlme_sbi.population.likelihood.log_joint import interleave
from nlme_sbi.population.objective.objective import hessian, value_and_gradient
from nlme_sbi.population.theta_posterior.prior import ThetaPriors
from nlme_sbi.population.theta_posterior.sampler import EnsembleSampler, _prepare_draws, sample_theta, support_warnings
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Design, Observations

DOUBLE = torch.float64
INDIVIDUALS, TIMES = 8, 4
PRIOR = GaussianPrior(
    {"x": {"mean": 0.0, "sd": 2.0}, "scale": {"mean": 0.0, "sd": 0.5}, "sigma": {"mean": 0.0, "sd": 1.0}}
)


class Levels(MechanisticSimulator):
    """``y_it = scale x_i + sigma eps``."""

    parameters = ParameterSpace((Parameter("x", transform="identity"), Parameter("scale"), Parameter("sigma")))
    signals, signal_units, time_unit = ("y",), ("",), ""
    noise = Additive(sd="sigma")

    def predict(self, phi, design):
        level = (phi[..., :1] * phi[..., 1:2].exp())[..., None]
        return level.expand(*phi.shape[:-1], design.times.shape[1], 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured() -> Observations:
    x = 0.4 + 0.8 * torch.randn((INDIVIDUALS, 1, 1), generator=seeded(1), dtype=DOUBLE)
    values = x + 0.5 * torch.randn((INDIVIDUALS, TIMES, 1), generator=seeded(2), dtype=DOUBLE)
    design = Design.regular(torch.arange(float(TIMES)), INDIVIDUALS)
    return Observations(tuple("abcdefgh"), values, design, ("y",), ("",))


def drawn(population: GaussianPopulation, draws: int) -> tuple[ExactDraws, torch.Tensor]:
    """Draws for the truth, and that."""
    data, simulator = measured(), Levels()
    model = population.bind(simulator.parameters)
    theta = model.from_moments(
        torch.tensor([0.4, 0.0, math.log(0.5)], dtype=DOUBLE),
        torch.diag(torch.tensor([0.64, 0.0, 0.0], dtype=DOUBLE)),
    )
    phi = PRIOR.sample(INDIVIDUALS * 40, seeded(3)).double().reshape(INDIVIDUALS, 40, 3)
    log_q = torch.zeros(phi.shape[:2], dtype=DOUBLE)
    samples = PosteriorSamples(names=PRIOR.names, phi=phi, log_q=log_q, prior=PRIOR)
    estimator = Exact(draws=draws, max_draws=draws, simulator=simulator)
    first = estimator.prepare(samples, data, model, seeded())
    return estimator.draws_at(samples, data, theta, first, seeded()), theta


def test_likelihoods_hold_as_far_as_constants_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_draws, "_DIRECT", 0)  # as where the data are many: expanded, not evaluated
    state, theta = drawn(GaussianPopulation(constant=("scale", "sigma")), 128)
    covariance = torch.diag(torch.full((4,), 0.08, dtype=DOUBLE).square())
    far = interpolate_along_constants(state, covariance)
    assert far.reach.tolist() == pytest.approx([0.48, 0.48])
    block, plain = far.blocks[0], state.blocks[0]
    inside = plain.log_ratio > plain.log_ratio.amax(1, keepdim=True) - 10  # draws that can matter
    for change in ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.4, 0.0], [0.0, -0.15, -0.2, 0.0], [0.3, 0.1, 0.3, 0.2]):
        at = theta + torch.tensor(change, dtype=DOUBLE)
        constants = at[1:3].expand(len(plain.rows), plain.phi.shape[1], -1)
        phi = interleave(state.population, plain.phi, constants)
        exact = Levels().log_likelihood(measured(), phi) - Levels().log_likelihood(
            measured(), interleave(state.population, plain.phi, theta[1:3].expand_as(constants))
        )
        exact = exact + plain.log_ratio + state.population.log_prob(plain.phi, at, plain.design)
        # exp(-2 u) through five points of [-0.48, 0.48] is off by 2e-4 of the sum of squares at most; products of two
        # changes are kept to second order.
        error = (block.log_weights(at) - exact)[inside].abs()
        assert float(error.max()) < (0.5 if change[1] else 0.02)
        if change[2] == 0.4:  # which one expansion about the middle with a common curvature misses by far
            assert float((plain.log_weights(at) - exact)[inside].abs().max()) > 1.0
    at = theta + torch.tensor([0.0, 0.0, 0.6, 0.0], dtype=DOUBLE)
    assert bool((block.log_weights(at) < plain.log_ratio - 50).all())  # nothing is claimed beyond
    for distance in (1.0, 10.0, 1e3, 1e6):  # however far: polynomials would win over any penalty there
        for side in (1.0, -1.0):
            near, far_away = (
                block.log_weights(theta + torch.tensor([0.0, 0.0, side * away, 0.0], dtype=DOUBLE))
                for away in (distance, 2 * distance)
            )
            assert bool((near < plain.log_ratio - 50).all())
            assert bool((far_away < near).all())
    assert float(interpolate_along_constants(state, None).reach.min()) == 1.0
    part = far.part(torch.tensor([1, 4]), slice(0, 20))
    torch.testing.assert_close(part.blocks[0].log_weights(theta), block.log_weights(theta)[[1, 4], :20])


@pytest.mark.slow
def test_the_posterior_of_a_noise_level_is_that_of_quadrature() -> None:
    population = GaussianPopulation(constant=("scale", "sigma"), fixed={"mean": {"scale": 1.0}})
    state, theta = drawn(population, 256)
    prior = ThetaPriors().bind(state.population, PRIOR)
    covariance = torch.diag(torch.tensor([0.3, 0.0, 0.15, 0.28], dtype=DOUBLE).square())
    settings = EnsembleSampler(ensembles=2, walkers=12, warmup=30, steps=400, ess=1000)
    found = sample_theta(state, theta, prior, covariance=covariance, generator=seeded(5), settings=settings)
    assert found.warnings == ()

    y = measured().values[..., 0].numpy()
    grids = {
        "mu": np.linspace(-1.6, 2.4, 81),
        "log_sigma": np.linspace(-1.5, 0.3, 91),
        "log_sd": np.linspace(-4, 1.6, 113),
    }
    mu, log_sigma, log_sd = np.meshgrid(*grids.values(), indexing="ij")
    squares, means = ((y - y.mean(1, keepdims=True)) ** 2).sum(), y.mean(1)
    total = np.exp(2 * log_sd) + np.exp(2 * log_sigma) / TIMES
    # Within individuals T - 1 squares of sigma; means of individuals are N(mu, omega^2 + sigma^2 / T).
    likelihood = -0.5 * squares * np.exp(-2 * log_sigma) - INDIVIDUALS * (TIMES - 1) * log_sigma
    likelihood += sum(-0.5 * (one - mu) ** 2 / total - 0.5 * np.log(total) for one in means)
    priors = norm.logpdf(mu, 0, 4.0) + norm.logpdf(log_sigma, 0, 2.0)
    priors += halfnorm.logpdf(np.exp(log_sd), scale=2.0) + log_sd
    density = np.exp(likelihood + priors - (likelihood + priors).max())
    for axis, (place, grid) in enumerate(zip((0, 2, 3), grids.values(), strict=True)):
        weights = density.sum(tuple({0, 1, 2} - {axis}))
        weights = weights / weights.sum()
        mean = (grid * weights).sum()
        sd = math.sqrt(((grid - mean) ** 2 * weights).sum())
        draws = found.theta[..., place].numpy()
        # 1000 effective draws: four standard errors are 0.13 SD of a mean and 9% of an SD.
        assert abs(draws.mean() - mean) < 0.17 * sd
        assert draws.std() == pytest.approx(sd, rel=0.15)


def test_draws_are_asked_what_they_can_do_and_not_what_they_are() -> None:
    state, theta = drawn(GaussianPopulation(constant=("scale", "sigma")), 128)
    members = ("population", "blocks", "individuals", "draws", "fitted", "part", "half", "training_draws", "warnings")
    plain = SimpleNamespace(**{name: getattr(state, name) for name in members})
    assert _prepare_draws(plain, theta, None, 1000) is plain
    reached = SimpleNamespace(**vars(plain))
    able = SimpleNamespace(**vars(plain), along_constants=lambda _: reached)
    assert _prepare_draws(able, theta, None, 1000) is reached
    assert isinstance(_prepare_draws(state, theta, None, 1000), InterpolatedDraws)


@pytest.mark.slow
def test_constants_that_reach_the_end_are_told() -> None:
    state, theta = drawn(GaussianPopulation(constant=("scale", "sigma")), 64)
    far = interpolate_along_constants(state, torch.diag(torch.full((4,), 0.02, dtype=DOUBLE).square()))
    thetas = theta.repeat(50, 1)
    assert support_warnings(far, theta, thetas) == ()
    thetas[:10, 2] += 0.119
    (word,) = support_warnings(far, theta, thetas)
    assert word.startswith("sigma: posterior draws reach the end of the range, six standard errors")


@pytest.mark.slow
def test_draws_evaluate_the_likelihood_wherever_the_constants_go() -> None:
    """Half a unit away an expansion has exploded; value, slope and curvature must be those of the likelihood itself."""
    model = GaussianPopulation(constant=("scale", "sigma"), fixed={"mean": {"scale": 1.0}})
    state, theta = drawn(model, 300)
    assert state.is_direct
    noise = state.population.unknowns.names.index("mean.sigma")
    (block,) = state.blocks
    for shift in (-1.5, 0.0, 0.7):
        moved = theta.index_add(0, torch.tensor([noise]), torch.tensor([shift], dtype=DOUBLE))
        constants = state.population.constants(moved, block.design)[:, None].expand(-1, block.phi.shape[1], -1)
        phi = interleave(state.population, block.phi, constants)
        observations = state.joint.observations
        expected = state.joint.simulator.log_likelihood(observations, phi) - block.log_q
        expected = expected + state.population.log_prob(block.phi, moved, block.design)
        # Sums of some tens of squares in float64.
        torch.testing.assert_close(block.log_weights(moved), expected, rtol=1e-9, atol=1e-9)
        step = 1e-4 * torch.nn.functional.one_hot(torch.tensor(noise), len(theta)).to(DOUBLE)
        _, gradient = value_and_gradient(state, moved)
        above, below = (value_and_gradient(state, moved + sign * step) for sign in (1, -1))
        assert float(gradient[noise]) == pytest.approx((above[0] - below[0]) / 2e-4, rel=1e-5, abs=1e-4)
        free = state.population.unknowns.free.tolist()
        row = hessian(state, moved)[free.index(noise)]
        torch.testing.assert_close(row, ((above[1] - below[1]) / 2e-4)[free], rtol=1e-4, atol=1e-3)
