"""The posterior of theta against quadrature, its priors against their definitions, and chains that must be rejected."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, parameter_space
from scipy.integrate import quad
from scipy.stats import halfnorm, norm

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import GaussianPopulation, PriorRatio
from nlme_sbi.population.models.correlation import cholesky_from_partial
from nlme_sbi.population.objective.objective import effective_draws
from nlme_sbi.population.theta_posterior.draws import ThetaDraws, convergence_warnings, normal_theta
from nlme_sbi.population.theta_posterior.prior import ThetaPriors
from nlme_sbi.population.theta_posterior.sampler import EnsembleSampler, sample_theta, support_warnings

DOUBLE = torch.float64
SHORT = EnsembleSampler(ensembles=2, walkers=8, warmup=20, steps=150, ess=400)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_parameter(individuals: int = 15) -> ConjugateCase:
    return ConjugateCase.simulated([0.5], torch.tensor([[0.36]], dtype=DOUBLE), individuals=individuals, seed=4)


# Priors.


def three_parameters(**options: object):
    names = ("a", "b", "c")
    given = {"a": (1.0, 0.5), "b": (0.0, 2.0), "c": (-1.0, 1.0)}
    training = GaussianPrior({name: {"mean": mean, "sd": sd} for name, (mean, sd) in given.items()})
    model = GaussianPopulation(covariance="full").bind(parameter_space(names))
    return model, ThetaPriors(**options).bind(model, training)


def test_the_defaults_are_what_the_module_says() -> None:
    model, prior = three_parameters()
    theta = torch.tensor([1.3, -0.4, 0.2, -0.7, 0.1, 0.3, 0.0, 0.0, 0.0], dtype=DOUBLE)
    expected = norm.logpdf(1.3, 1.0, 1.0) + norm.logpdf(-0.4, 0.0, 4.0) + norm.logpdf(0.2, -1.0, 2.0)
    for log_sd, scale in zip(theta[3:6].tolist(), (0.5, 2.0, 1.0), strict=True):
        expected += halfnorm.logpdf(math.exp(log_sd), scale=scale) + log_sd  # of the SD, times d SD / d log SD
    at_zero = float(prior.log_prob(theta)) - expected
    # LKJ(2) for 3 variables: z given nobody has exponent 2 - 1 + 1/2, given one 2 - 1; the constants by quadrature.
    constants = [quad(lambda u, a=a: math.cosh(u) ** (-2 * a), -40, 40)[0] for a in (2.5, 2.5, 2.0)]
    assert at_zero == pytest.approx(-sum(math.log(value) for value in constants), abs=1e-9)
    assert model.unknowns.names[6:] == (
        "partial_correlation.a.b",
        "partial_correlation.a.c",
        "partial_correlation.b.c",
    )


def test_correlations_follow_the_lkj_density() -> None:
    """p(R) ~ det(R)^(shape - 1) over the three correlations, whatever the vine: the Jacobian by finite differences."""
    _, prior = three_parameters(correlation_shape=3.0)

    def correlations(u: torch.Tensor) -> torch.Tensor:
        factor = cholesky_from_partial(u, 3)
        return (factor @ factor.T)[torch.tril_indices(3, 3, -1).unbind()]

    found = []
    for seed in range(6):
        u = torch.randn(3, generator=seeded(seed), dtype=DOUBLE)
        factor = cholesky_from_partial(u, 3)
        jacobian = torch.linalg.slogdet(torch.func.jacfwd(correlations)(u))[1]
        theta = torch.cat([torch.zeros(6, dtype=DOUBLE), u])
        found.append(float(prior.log_prob(theta) - 2 * 2 * factor.diagonal().log().sum() - jacobian))
    np.testing.assert_allclose(found, found[0], atol=1e-9)  # log det R^2 = 2 * 2 log diag L, up to one constant


def test_own_priors_take_the_place_of_defaults_and_unknown_names_are_refused() -> None:
    _, prior = three_parameters(given={"log_sd.b": {"mean": -1.0, "sd": 0.3}})
    assert prior.describe()[4] == "normal(-1, 0.3)"
    theta = torch.zeros(9, dtype=DOUBLE)
    moved = theta.clone()
    moved[4] = -1.3
    difference = norm.logpdf(-1.3, -1.0, 0.3) - norm.logpdf(0.0, -1.0, 0.3)
    assert float(prior.log_prob(moved) - prior.log_prob(theta)) == pytest.approx(difference)
    with pytest.raises(ValueError, match=r"priors\.given\.log_sd\.bb: the fit estimates .*Did you mean log_sd\.b\?"):
        three_parameters(given={"log_sd.bb": {"mean": 0.0, "sd": 1.0}})
    with pytest.raises(ValueError, match=r"priors\.given\.mean\.a needs a mean and a positive sd"):
        three_parameters(given={"mean.a": {"mean": 0.0, "sd": 0.0}})
    with pytest.raises(ValueError, match=r"priors\.sd_scale must be positive"):
        three_parameters(sd_scale=0.0)


# The posterior.


def by_quadrature(case: ConjugateCase, *, mean_sd: float, sd_scale: float, centre: float) -> dict[str, np.ndarray]:
    """Mean, SD and 5%, 50%, 95% quantiles of (mu, log omega) on a grid."""
    y, noise = case.y[:, 0].numpy(), case.noise[:, 0].numpy()
    mu, log_sd = np.linspace(-1.5, 2.5, 401), np.linspace(-5.0, 1.5, 651)
    spread = np.sqrt(np.exp(2 * log_sd)[:, None] + noise**2)  # (G, I)
    likelihood = norm.logpdf(y, mu[:, None, None], spread).sum(-1)  # (mu, log_sd)
    prior = norm.logpdf(mu, centre, mean_sd)[:, None] + halfnorm.logpdf(np.exp(log_sd), scale=sd_scale) + log_sd
    density = np.exp(likelihood + prior - (likelihood + prior).max())
    told = {}
    for name, grid, weights in (("mu", mu, density.sum(1)), ("log_sd", log_sd, density.sum(0))):
        weights = weights / weights.sum()
        mean = (grid * weights).sum()
        ends = np.interp([0.05, 0.5, 0.95], np.cumsum(weights), grid)
        told[name] = np.array([mean, np.sqrt(((grid - mean) ** 2 * weights).sum()), *ends])
    return told


@pytest.fixture(scope="module")
def drawn() -> tuple[ConjugateCase, object, ThetaDraws]:
    case = one_parameter()
    model = GaussianPopulation().bind(case.parameters)
    state = PriorRatio().prepare(case.samples(500, seed=1), case.observations, model, seeded())
    theta = model.from_moments(torch.tensor([0.5], dtype=DOUBLE), torch.tensor([[0.36]], dtype=DOUBLE))
    prior = ThetaPriors().bind(model, case.prior)
    settings = EnsembleSampler(ensembles=2, walkers=12, warmup=30, steps=500, ess=1000, effective=500)
    return case, state, sample_theta(state, theta, prior, generator=seeded(3), settings=settings)


@pytest.mark.slow
def test_the_posterior_is_that_of_quadrature(drawn: tuple) -> None:
    case, _, found = drawn
    sd = float(case.prior.covariance[0, 0].sqrt())
    expected = by_quadrature(case, mean_sd=2 * sd, sd_scale=sd, centre=float(case.prior.mean[0]))
    for place, name in enumerate(("mu", "log_sd")):
        draws = found.theta[..., place].numpy()
        mean, spread, low, middle, high = expected[name]
        # Effective draws are above 1000: 4 standard errors of a mean are 0.13 SD, of a 5% quantile about twice that.
        # 500 draws of every individual move the likelihood's maximum by up to about 0.07 SD (seen over seeds).
        assert abs(draws.mean() - mean) < 0.2 * spread
        assert draws.std() == pytest.approx(spread, rel=0.13)
        np.testing.assert_allclose(np.quantile(draws, [0.05, 0.5, 0.95]), [low, middle, high], atol=0.3 * spread)
    assert found.warnings == ()
    frame = found.summary().set_index("quantity")
    assert (frame["rhat"] < 1.01).all()
    assert (frame[["ess_bulk", "ess_tail"]] > 1000).all().all()
    omega = frame.loc["SD uptake"]
    assert omega["median"] == pytest.approx(math.exp(frame.loc["log_sd.uptake", "median"]), rel=1e-6)
    assert frame.loc["typical uptake", "q97.5"] == pytest.approx(math.exp(frame.loc["mean.uptake", "q97.5"]), rel=1e-3)
    # A prior that is wrong by much must show: the test would see it.
    narrow = by_quadrature(case, mean_sd=0.1 * sd, sd_scale=sd, centre=float(case.prior.mean[0]))["mu"]
    assert abs(narrow[0] - expected["mu"][0]) > 0.2 * expected["mu"][1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_draws(drawn: tuple) -> None:
    case, state, _ = drawn
    model = state.population
    prior, theta = ThetaPriors().bind(model, case.prior), torch.tensor([0.5, -0.5], dtype=DOUBLE)
    few = EnsembleSampler(ensembles=2, walkers=4, warmup=10, steps=50)
    first, again, other = (
        sample_theta(state, theta, prior, generator=seeded(seed), settings=few) for seed in (5, 5, 6)
    )
    assert torch.equal(first.theta, again.theta)
    assert not torch.equal(first.theta, other.theta)
    frame = first.frame()
    assert list(frame.columns) == ["ensemble", "walker", "draw", "mean.uptake", "log_sd.uptake"]
    assert len(frame) == len(first.flat)


@pytest.mark.slow
def test_fixed_unknowns_stay(drawn: tuple) -> None:
    case, *_ = drawn
    model = GaussianPopulation(fixed={"sd": {"uptake": 0.6}}).bind(case.parameters)
    state = PriorRatio().prepare(case.samples(300, seed=1), case.observations, model, seeded())
    theta = torch.tensor([0.5, math.log(0.6)], dtype=DOUBLE)
    prior = ThetaPriors().bind(model, case.prior)
    found = sample_theta(state, theta, prior, generator=seeded(), settings=SHORT)
    assert bool((found.theta[..., 1] == math.log(0.6)).all())
    # With a normal prior and known variances the posterior of mu is normal, in closed form.
    precision = 1 / (0.36 + case.noise[:, 0].square())
    sd = 2 * case.prior.covariance[0, 0].sqrt()
    total = precision.sum() + sd**-2
    mean = float((precision * case.y[:, 0]).sum() + case.prior.mean[0] / sd**2) / float(total)
    assert float(found.theta[..., 0].mean()) == pytest.approx(mean, abs=0.25 / math.sqrt(float(total)))
    assert float(found.theta[..., 0].std()) == pytest.approx(1 / math.sqrt(float(total)), rel=0.15)


@pytest.mark.slow
def test_chains_stuck_apart_and_short_ones_are_told(drawn: tuple) -> None:
    _, state, found = drawn
    apart = found.theta.clone()
    apart[:1, ..., 0] += 3 * found.theta[..., 0].std()
    said = convergence_warnings(state.population, apart)
    assert any("have not converged" in word and "uptake (" in word and "omega" not in word for word in said)
    short = convergence_warnings(state.population, found.theta[:, :4, :20])
    assert any("Fewer than 400 effective draws" in word for word in short)


@pytest.mark.slow
def test_draws_that_do_not_support_the_spread_are_told(drawn: tuple) -> None:
    _, state, found = drawn
    model = state.population
    assert support_warnings(state, found.estimate, found.flat) == ()
    far = found.flat.clone()
    far[:, 1] -= 6.0  # a population so narrow that next to no draw lies in it
    assert float(effective_draws(state, far[0]).min()) < 10
    (word,) = support_warnings(state, found.estimate, far, tuple(f"cell_{row}" for row in range(15)))
    assert "do not support the spread of theta" in word
    assert "worst: cell_" in word
    assert model.unknowns.names == ("mean.uptake", "log_sd.uptake")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler\.ensembles must be at least 2"):
        EnsembleSampler(ensembles=1)
    with pytest.raises(ValueError, match=r"sampler: needs warmup >= 10, steps >= 50"):
        EnsembleSampler(steps=10)
    with pytest.raises(ValueError, match=r"sampler\.walkers must be even and at least twice the 12 unknowns; got 20"):
        EnsembleSampler(walkers=20).walkers_for(12)
    assert EnsembleSampler().walkers_for(3) == 16


@pytest.mark.slow
def test_without_emcee_the_remedy_is_told(drawn: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    case, state, _ = drawn
    monkeypatch.setitem(sys.modules, "emcee", None)
    prior = ThetaPriors().bind(state.population, case.prior)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[posterior\]"'):
        sample_theta(state, torch.tensor([0.5, -0.5], dtype=DOUBLE), prior, generator=seeded(), settings=SHORT)


def test_normal_draws_have_the_moments_of_the_estimates() -> None:
    model, _ = three_parameters()
    theta = torch.arange(9, dtype=DOUBLE) / 10
    mixing = torch.randn((9, 9), generator=seeded(1), dtype=DOUBLE)
    covariance = mixing @ mixing.T / 9
    draws = normal_theta(model, theta, covariance, 40_000, seeded(2))
    # Standard errors at 40,000 draws: 0.005 SD of a mean, 0.7% of a variance.
    assert bool(((draws.mean(0) - theta).abs() < 5 * covariance.diagonal().sqrt() / 200).all())
    torch.testing.assert_close(torch.cov(draws.T), covariance, rtol=0.05, atol=0.03)
    covariance[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"no standard errors.*theta=estimate"):
        normal_theta(model, theta, covariance, 10, seeded())
