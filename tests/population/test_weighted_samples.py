"""Posterior draws without a density, and with weights: the same estimates and honest errors, against closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from conjugate_case import ConjugateCase
from torch import Tensor
from torch.distributions import MultivariateNormal

from nlme_sbi.individual_model.priors import GaussianPrior, UniformPrior
from nlme_sbi.numerics.weighted_draws import equal_draws, systematic_places
from nlme_sbi.parameters import ParameterSpace
from nlme_sbi.population import GaussianPopulation, PriorRatio, fit_population
from nlme_sbi.population.estimators.initialization import _network_draws
from nlme_sbi.population.estimators.prior_ratio import RatioDraws
from nlme_sbi.population.objective.objective import contributions, effective_draws, log_mean_error
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations

DOUBLE = torch.float64
MEAN = [0.5, -0.3, 0.8]
OMEGA = torch.diag(torch.tensor([0.6, 0.5, 0.4], dtype=DOUBLE).square())
NO_SIGMA = torch.diag(torch.tensor([0.6, 0.5, 0.0], dtype=DOUBLE).square())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(centre: Tensor, covariance: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws of Gaussians with their log densities."""
    law = MultivariateNormal(centre[:, None], covariance[:, None])
    noise = torch.randn((len(centre), draws, centre.shape[1]), generator=seeded(seed), dtype=DOUBLE)
    phi = centre[:, None] + noise @ torch.linalg.cholesky(covariance).mT
    return phi, law.log_prob(phi)


def weighted(
    case: ConjugateCase, draws: int, *, seed: int, widened: float = 1.5, moved: float = 0.4
) -> PosteriorSamples:
    """Draws from Gaussians beside and wider than the posteriors, weighted to them; each individual's weights in a
    normalisation of its own, as an importance sampler without the evidence has them."""
    centre, covariance = case.posterior(case.prior.mean, case.prior.covariance)
    sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
    phi, log_q = drawn(centre + moved * sd, widened * covariance, draws, seed)
    exact = MultivariateNormal(centre[:, None], covariance[:, None]).log_prob(phi)
    anything = torch.linspace(-40.0, 60.0, len(centre), dtype=DOUBLE)[:, None]
    return PosteriorSamples(case.prior.names, phi, None, case.prior, exact - log_q + anything)


def state_of(samples: PosteriorSamples, case: ConjugateCase, population: GaussianPopulation) -> RatioDraws:
    return PriorRatio().prepare(samples, case.observations, population.bind(case.parameters), seeded())


@pytest.mark.slow
@pytest.mark.parametrize("omega", [OMEGA, NO_SIGMA], ids=["varying", "constant"])
def test_the_objective_of_weighted_draws_is_the_log_evidence_ratio(omega: Tensor) -> None:
    case = ConjugateCase.simulated(MEAN, omega, individuals=60, seed=1)
    population = GaussianPopulation(constant=("sigma",) if float(omega[2, 2]) == 0 else ())
    samples = weighted(case, 4000, seed=3)
    state = state_of(samples, case, population)
    theta = state.population.from_moments(torch.tensor([0.4, -0.2, 0.7], dtype=DOUBLE), omega)
    exact = case.log_ratio(torch.tensor([0.4, -0.2, 0.7], dtype=DOUBLE), omega)
    variance, _ = log_mean_error(state, theta)
    if population.constant:
        # The error of a Gaussian log density fitted to as many draws as count; see test_prior_ratio.
        centre, spread = case.posterior(case.prior.mean, case.prior.covariance)
        squares = (0.7 - centre[:, 2]).square() / spread[:, 2, 2]
        counting = 1 / torch.softmax(samples.log_weights, 1).square().sum(1)
        variance = variance + (3 * squares + (squares - 1).square() / 2) / counting
    error = (contributions(state, theta) - exact).abs()
    assert bool((error < 5 * variance.sqrt()).all())
    # A case that must be told apart: the same draws, were their weights passed by.
    plain = state_of(replace(samples, log_weights=None), case, population)
    assert bool(((contributions(plain, theta) - exact).abs() > 5 * variance.sqrt()).any())


@pytest.mark.slow
@pytest.mark.parametrize("omega", [OMEGA, NO_SIGMA], ids=["varying", "constant"])
def test_weighted_and_unweighted_draws_give_the_estimates_of_maximum_likelihood(omega: Tensor) -> None:
    case = ConjugateCase.simulated(MEAN, omega, individuals=80, seed=1)
    population = GaussianPopulation(constant=("sigma",) if float(omega[2, 2]) == 0 else ())
    unweighted = replace(case.samples(2000, seed=2), log_q=None)
    fits = [
        fit_population(samples, case.observations, population, parameters=case.parameters, generator=seeded(), starts=2)
        for samples in (weighted(case, 4000, seed=3), unweighted)
    ]
    exact, se, maximum = case.maximum(fits[0].population, fits[0].theta)
    for fit in fits:
        assert fit.converged
        assert fit.estimator == "prior_ratio"
        error = fit.monte_carlo.se.square().add(fit.monte_carlo.bias.square()).sqrt()
        assert bool(((fit.theta - exact).abs() <= 4 * error + 0.01 * fit.standard_errors).all())
        free = fit.population.unknowns.free
        assert float((fit.standard_errors[free] / se - 1).abs().max()) < 0.1
        reach = 4 * fit.monte_carlo.objective_se + 2 * abs(fit.monte_carlo.objective_bias)
        assert abs(fit.objective - maximum) < reach
    apart = (fits[0].theta - fits[1].theta).abs()
    both = (fits[0].monte_carlo.se.square() + fits[1].monte_carlo.se.square()).sqrt()
    assert bool((apart <= 4 * both + 0.02 * fits[0].standard_errors).all())


@pytest.mark.slow
@pytest.mark.parametrize("cancelling", [False, True])
def test_errors_of_weighted_means_are_those_that_repeated_draws_show(cancelling: bool) -> None:
    """Also where the weights cancel the ratio: then all draws are effective at theta, and the mean is not sure at all,
    because the normalisation of the weights is not."""
    case = ConjugateCase.simulated([0.5], torch.tensor([[0.16]], dtype=DOUBLE), individuals=200, seed=5, noise=0.5)
    mean, omega = torch.tensor([0.4], dtype=DOUBLE), torch.tensor([[1.0]], dtype=DOUBLE)
    exact = case.log_ratio(mean, omega)
    errors, variances, biases, effective = [], [], [], []
    for seed in range(100):
        if cancelling:  # draws given theta, weighted back to the training prior
            phi, _ = drawn(*case.posterior(mean, omega), 50, seed)
            log_weights = case.prior.log_prob(phi) - MultivariateNormal(mean, omega).log_prob(phi)
            samples = PosteriorSamples(case.prior.names, phi, None, case.prior, log_weights)
        else:
            samples = weighted(case, 50, seed=seed)
        state = state_of(samples, case, GaussianPopulation())
        theta = state.population.from_moments(mean, omega)
        variance, excess = log_mean_error(state, theta)
        errors.append(contributions(state, theta) - exact)
        variances.append(variance)
        biases.append(-0.5 * excess)
        effective.append(effective_draws(state, theta))
    spread = torch.stack(errors).var(0)
    # A variance from 100 repeats is known to sqrt(2/99) = 14% for one individual, to 1% over 200; the rest is the delta
    # method's, of second order in 1/50.
    assert float(torch.stack(variances).mean() / spread.mean()) == pytest.approx(1.0, abs=0.1)
    noise = float(torch.stack(errors).mean(1).std()) / 10
    assert float(torch.stack(errors).mean() - torch.stack(biases).mean()) == pytest.approx(0.0, abs=4 * noise + 2e-3)
    if cancelling:
        assert bool((torch.stack(effective) > 49.9).all())
        naive = (1 / torch.stack(effective) - 1 / 50).mean()
        assert float(naive) < 0.01 * float(spread.mean())


@dataclass(frozen=True, eq=False)
class WeightedPosterior:
    """Gives draws with weights and without a density."""

    case: ConjugateCase

    @property
    def parameters(self) -> ParameterSpace:
        return self.case.parameters

    @property
    def prior(self) -> GaussianPrior:
        return self.case.prior

    def sample(self, observations: Observations, draws: int, generator: torch.Generator) -> PosteriorSamples:
        return weighted(self.case, draws, seed=int(torch.randint(2**31, (1,), generator=generator)))

    def log_prob(self, phi: Tensor, observations: Observations) -> Tensor:
        raise ValueError("There is none.")


def test_more_draws_keep_their_weights() -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=60, seed=1)
    population = GaussianPopulation().bind(case.parameters)
    estimator = PriorRatio(draws=1000, max_draws=4000)
    state = estimator.prepare(WeightedPosterior(case), case.observations, population, seeded())
    theta = population.from_moments(torch.tensor([0.4, -0.2, 0.7], dtype=DOUBLE), OMEGA)
    more = estimator.improve(state, theta, case.observations, seeded(7), times=4)
    assert isinstance(more, RatioDraws)
    assert more.draws == 4000
    before, _ = log_mean_error(state, theta)
    after, _ = log_mean_error(more, theta)
    assert float(after.mean() / before.mean()) == pytest.approx(0.25, abs=0.05)
    exact = case.log_ratio(torch.tensor([0.4, -0.2, 0.7], dtype=DOUBLE), OMEGA)
    assert bool(((contributions(more, theta) - exact).abs() < 5 * after.sqrt()).all())
    half = more.half(1)
    assert bool(((contributions(half, theta) - exact).abs() < 5 * (2 * after).sqrt() + 0.05).all())


def test_draws_outside_the_prior_count_by_their_weight() -> None:
    prior = UniformPrior({"uptake": {"lower": -2.0, "upper": 2.0}})
    case = ConjugateCase.simulated([0.5], torch.tensor([[0.16]], dtype=DOUBLE), individuals=5, seed=2)
    phi = 0.5 * torch.randn((5, 400, 1), generator=seeded(), dtype=DOUBLE).clamp(-3, 3)
    phi[:, :40] = 5.0  # a tenth of the draws, which no weight calls for
    log_weights = torch.zeros((5, 400), dtype=DOUBLE)
    log_weights[:, :40] = -torch.inf
    population = GaussianPopulation().bind(case.parameters)

    def prepared(**given: object) -> RatioDraws:
        samples = PosteriorSamples(prior.names, phi, None, prior, **given)
        return PriorRatio().prepare(samples, case.observations, population, seeded())

    theta = population.from_moments(torch.zeros(1, dtype=DOUBLE), torch.eye(1, dtype=DOUBLE))
    inside = PosteriorSamples(prior.names, phi[:, 40:], None, prior)
    expected = contributions(PriorRatio().prepare(inside, case.observations, population, seeded()), theta)
    torch.testing.assert_close(contributions(prepared(log_weights=log_weights), theta), expected)
    with pytest.raises(ValueError, match="The training prior has no density at 200 of 2000 draws"):
        prepared()


def test_starts_and_climbs_begin_where_the_weights_are() -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=40, seed=1)
    samples = weighted(case, 4000, seed=3, moved=1.5)
    centre, covariance = case.posterior(case.prior.mean, case.prior.covariance)
    sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
    counting = 1 / torch.softmax(samples.log_weights, 1).square().sum(1, keepdim=True)
    for found in (
        state_of(samples, case, GaussianPopulation()).training_draws()[0],
        _network_draws(samples, case.observations, seeded()),
    ):
        limit = 5 * (1 / counting + 1 / found.shape[1]).sqrt()
        assert bool(((found.mean(1) - centre).abs() / sd < limit).all())


def test_resampling_takes_each_draw_as_often_as_its_weight_says() -> None:
    log_weights = torch.randn((4, 30), generator=seeded(), dtype=DOUBLE) * 2
    places = systematic_places(log_weights, 100)
    expected = 100 * torch.softmax(log_weights, 1)
    for row in range(4):
        times = torch.bincount(places[row], minlength=30)
        assert bool(((times - expected[row]).abs() < 1).all())
    phi = torch.arange(30.0, dtype=DOUBLE)[None, :, None].expand(4, -1, 1)
    assert torch.equal(equal_draws(phi, None), phi)
    assert torch.equal(equal_draws(phi, None, 7), phi[:, :7])
    assert torch.equal(equal_draws(phi, log_weights, 100)[..., 0], places.double())


def test_draws_are_refused_where_their_weights_mean_nothing() -> None:
    case = ConjugateCase.simulated([0.5], torch.tensor([[0.16]], dtype=DOUBLE), individuals=3, seed=1)
    phi = torch.zeros((3, 4, 1), dtype=DOUBLE)
    for wrong in (math.nan, math.inf):
        log_weights = torch.zeros((3, 4), dtype=DOUBLE)
        log_weights[1, 2] = wrong
        with pytest.raises(ValueError, match=r"log_weights of 1 of 3 individuals .* first: individual 1"):
            PosteriorSamples(case.prior.names, phi, None, case.prior, log_weights)
    none = torch.full((3, 4), -math.inf, dtype=DOUBLE)
    with pytest.raises(ValueError, match="log_weights of 3 of 3 individuals"):
        PosteriorSamples(case.prior.names, phi, None, case.prior, none)
    with pytest.raises(ValueError, match=r"phi \(3, 4, 1\) and 2 names disagree"):
        PosteriorSamples(("uptake", "decay"), phi, None, case.prior)


def test_some_individuals_keep_densities_and_weights() -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=6, seed=1)
    samples = replace(weighted(case, 20, seed=1), log_q=torch.randn((6, 20), dtype=DOUBLE, generator=seeded()))
    some = samples[[4, 1]]
    for name in ("phi", "log_q", "log_weights"):
        assert torch.equal(getattr(some, name), getattr(samples, name)[[4, 1]])
    assert weighted(case, 20, seed=1)[torch.tensor([2])].log_q is None
