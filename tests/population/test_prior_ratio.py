"""The prior-ratio objective against closed forms and quadrature, its derivatives, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conjugate_case import ConjugateCase, observations, parameter_space
from scipy.stats import chi2
from torch.distributions import MultivariateNormal, Normal

from nlme_sbi.individual_model.priors import GaussianPrior, UniformPrior
from nlme_sbi.population import GaussianPopulation, PriorRatio, fit_population
from nlme_sbi.population.estimators.prior_ratio import RatioDraws
from nlme_sbi.population.objective.draw_checks import trained_level
from nlme_sbi.population.objective.objective import (
    contributions,
    effective_draws,
    hessian,
    score_variance,
    scores,
    value_and_gradient,
)
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Prior

DOUBLE = torch.float64
OMEGA = torch.diag(torch.tensor([0.6, 0.5, 0.4], dtype=DOUBLE).square())
NO_SIGMA = torch.diag(torch.tensor([0.6, 0.5, 0.0], dtype=DOUBLE).square())
MEAN = [0.5, -0.3, 0.8]
CORRELATED = [[1.0, 0.4, -0.3], [0.4, 1.0, 0.2], [-0.3, 0.2, 1.0]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepared(
    case: ConjugateCase, population: GaussianPopulation, *, draws: int, seed: int = 1, **settings: object
) -> RatioDraws:
    model = population.bind(case.parameters)
    samples = case.samples(draws, seed=seed)
    return PriorRatio(**settings).prepare(samples, case.observations, model, seeded())


def theta_of(state: RatioDraws, mean: list[float], omega: torch.Tensor) -> torch.Tensor:
    return state.population.from_moments(torch.tensor(mean, dtype=DOUBLE), omega)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_objective_is_the_log_evidence_ratio_of_the_conjugate_case(covariance: str) -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=60, seed=1)
    state = prepared(case, GaussianPopulation(covariance=covariance), draws=4000)
    omega = OMEGA.clone()
    if covariance == "full":
        omega[0, 1] = omega[1, 0] = 0.15
    theta = theta_of(state, [0.4, -0.2, 0.7], omega)
    exact = case.log_ratio(torch.tensor([0.4, -0.2, 0.7], dtype=DOUBLE), omega)
    # Delta method: the log of a mean of S weights has standard error sqrt(1/ESS - 1/S).
    error = (1 / effective_draws(state, theta) - 1 / 4000).sqrt()
    assert bool(((contributions(state, theta) - exact).abs() < 5 * error).all())


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [None, CORRELATED])
def test_constants_are_integrated_out_exactly(correlation: list[list[float]] | None) -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=60, seed=2, correlation=correlation)
    state = prepared(case, GaussianPopulation(constant=("sigma",)), draws=4000)
    theta = theta_of(state, [0.4, -0.2, 0.7], NO_SIGMA)
    exact = case.log_ratio(torch.tensor([0.4, -0.2, 0.7], dtype=DOUBLE), NO_SIGMA)
    # To the delta method comes the error of a Gaussian log density at a point d SDs from its centre, fitted to S draws:
    # mean and two slopes give d^2 (1 + 2)/S, the variance (d^2 - 1)^2/2S.
    centre, spread = case.posterior(case.prior.mean, case.prior.covariance)
    squares = (0.7 - centre[:, 2]).square() / spread[:, 2, 2]
    fitted = (3 * squares + (squares - 1).square() / 2) / 4000
    error = (1 / effective_draws(state, theta) - 1 / 4000 + fitted).sqrt()
    assert bool(((contributions(state, theta) - exact).abs() < 5 * error).all())
    # A case that must be told apart: sigma off by half an individual's posterior SD.
    moved = theta_of(state, [0.4, -0.2, 0.7 + 0.5 * float(spread[:, 2, 2].mean().sqrt())], NO_SIGMA)
    assert bool(((contributions(state, moved) - exact).abs() > 5 * error).any())


class Curved:
    """y_k = exp(v) + exp(s) noise, k = 1..n, under a Gaussian prior: posterior and evidence on a fine grid."""

    def __init__(self, individuals: int, repeats: int, *, seed: int) -> None:
        generator = seeded(seed)
        self.prior = GaussianPrior({"uptake": {"mean": 0.5, "sd": 0.8}, "sigma": {"mean": -0.5, "sd": 0.7}})
        v = 0.8 + 0.4 * torch.randn((individuals, 1), generator=generator, dtype=DOUBLE)
        noise = torch.randn((individuals, repeats), generator=generator, dtype=DOUBLE)
        self.y = v.exp() + math.exp(-0.3) * noise
        self.v = torch.linspace(-3.5, 4.0, 601, dtype=DOUBLE)
        self.s = torch.linspace(-3.5, 2.5, 401, dtype=DOUBLE)

    def log_likelihood(self, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """``(I, ...)`` for v and s that broadcast."""
        repeats, ones = self.y.shape[1], (1,) * v.dim()
        mean = self.y.mean(1).reshape(-1, *ones)
        within = (self.y - self.y.mean(1, keepdim=True)).square().sum(1).reshape(-1, *ones)
        squares = within + repeats * (mean - v.exp()).square()
        return -0.5 * squares * torch.exp(-2 * s) - repeats * (s + 0.5 * math.log(2 * math.pi))

    def samples(self, draws: int, *, seed: int) -> PosteriorSamples:
        v, s = torch.meshgrid(self.v, self.s, indexing="ij")
        log_joint = self.log_likelihood(v, s) + self.prior.log_prob(torch.stack([v, s], -1))
        weights = torch.softmax(log_joint.flatten(1), 1)
        generator = seeded(seed)
        index = torch.multinomial(weights, draws, replacement=True, generator=generator)
        jitter = torch.rand((*index.shape, 2), generator=generator, dtype=DOUBLE) - 0.5
        steps = torch.stack([self.v[1] - self.v[0], self.s[1] - self.s[0]])
        phi = torch.stack([v.flatten()[index], s.flatten()[index]], -1) + jitter * steps
        log_q = weights.gather(1, index).log() - steps.log().sum()
        return PosteriorSamples(names=self.prior.names, phi=phi, log_q=log_q, prior=self.prior)

    def log_evidence(self) -> torch.Tensor:
        v, s = torch.meshgrid(self.v, self.s, indexing="ij")
        log_joint = self.log_likelihood(v, s) + self.prior.log_prob(torch.stack([v, s], -1))
        return torch.logsumexp(log_joint.flatten(1), 1) + math.log((self.v[1] - self.v[0]) * (self.s[1] - self.s[0]))

    def log_marginal(self, mean: float, sd: float, sigma: float) -> torch.Tensor:
        """log p(y | theta) with v ~ N(mean, sd) and s = sigma for all, by quadrature in one dimension."""
        log_joint = self.log_likelihood(self.v, torch.tensor(sigma, dtype=DOUBLE)) + Normal(mean, sd).log_prob(self.v)
        return torch.logsumexp(log_joint, 1) + math.log(self.v[1] - self.v[0])

    def log_marginal_varying(self, mean: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
        """log p(y | theta) with both varying, by quadrature in two dimensions."""
        v, s = torch.meshgrid(self.v, self.s, indexing="ij")
        log_joint = self.log_likelihood(v, s) + MultivariateNormal(mean, omega).log_prob(torch.stack([v, s], -1))
        return torch.logsumexp(log_joint.flatten(1), 1) + math.log((self.v[1] - self.v[0]) * (self.s[1] - self.s[0]))


@pytest.mark.slow
def test_curved_posteriors_agree_with_two_dimensional_quadrature() -> None:
    case = Curved(20, 6, seed=3)
    model = GaussianPopulation(covariance="full").bind(parameter_space(("uptake", "sigma")))
    state = PriorRatio().prepare(case.samples(4000, seed=4), observations(case.y), model, seeded())
    mean = torch.tensor([0.8, -0.3], dtype=DOUBLE)
    omega = torch.tensor([[0.16, 0.03], [0.03, 0.09]], dtype=DOUBLE)
    theta = model.from_moments(mean, omega)
    exact = case.log_marginal_varying(mean, omega) - case.log_evidence()
    error = (1 / effective_draws(state, theta) - 1 / 4000).sqrt()
    # The grid steps are below a tenth of the narrowest SD, where the rule is exact to more digits than are asked.
    assert bool(((contributions(state, theta) - exact).abs() < 5 * error + 1e-4).all())


@pytest.mark.slow
def test_a_constant_with_skewed_posteriors_agrees_with_one_dimensional_quadrature() -> None:
    case = Curved(40, 6, seed=5)
    model = GaussianPopulation(constant=("sigma",)).bind(parameter_space(("uptake", "sigma")))
    state = PriorRatio().prepare(case.samples(4000, seed=6), observations(case.y), model, seeded())
    errors = []
    for sigma in (-0.35, -0.3, -0.25):
        theta = model.from_moments(
            torch.tensor([0.8, sigma], dtype=DOUBLE), torch.diag(torch.tensor([0.16, 0])).double()
        )
        errors.append(contributions(state, theta) - (case.log_marginal(0.8, 0.4, sigma) - case.log_evidence()))
    # No sampling theory bounds the error of a mixture with few components. Six observations each make these posteriors
    # clearly skewed; for a single Gaussian the error is 0.15 nats, and half of it is what the estimator promises.
    assert float(torch.stack(errors).abs().mean()) < 0.075
    # What moves the estimate of sigma is the slope of the error: the maximum shifts by the slope over the curvature.
    slope = float((errors[2] - errors[0]).sum() / 0.1)
    exact = [float(case.log_marginal(0.8, 0.4, sigma).sum()) for sigma in (-0.35, -0.3, -0.25)]
    curvature = -(exact[0] - 2 * exact[1] + exact[2]) / 0.05**2
    assert abs(slope) / math.sqrt(curvature) < 0.5  # in standard errors


def bimodal_samples(individuals: int, draws: int, *, seed: int) -> tuple[PosteriorSamples, list[MultivariateNormal]]:
    """Two mirror modes in (uptake, decay), one sigma: posteriors that are known Gaussian mixtures."""
    generator = seeded(seed)
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 2.0} for name in ("uptake", "decay", "sigma")})
    centre = torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE) + 0.3 * torch.randn(
        (individuals, 3), generator=generator, dtype=DOUBLE
    )
    spread = torch.tensor([[0.06, 0.01, 0.02], [0.01, 0.04, -0.01], [0.02, -0.01, 0.05]], dtype=DOUBLE)
    swap = [1, 0, 2]
    modes = [
        MultivariateNormal(centre, spread.expand(individuals, 3, 3)),
        MultivariateNormal(centre[:, swap], spread[swap][:, swap].expand(individuals, 3, 3)),
    ]
    noise = torch.randn((individuals, draws, 3), generator=generator, dtype=DOUBLE)
    phi = centre[:, None] + noise @ torch.linalg.cholesky(spread).T
    swapped = torch.rand((individuals, draws, 1), generator=generator) < 0.5
    phi = torch.where(swapped, phi[..., swap], phi)
    log_q = torch.zeros(individuals, draws, dtype=DOUBLE)
    return PosteriorSamples(names=prior.names, phi=phi, log_q=log_q, prior=prior), modes


@pytest.mark.slow
def test_two_mirror_modes_with_a_constant_agree_with_quadrature() -> None:
    samples, modes = bimodal_samples(15, 4000, seed=7)
    model = GaussianPopulation(constant=("sigma",)).bind(parameter_space())
    state = PriorRatio().prepare(samples, observations(torch.zeros(15, 1)), model, seeded())
    assert state.mixtures is not None
    assert bool((state.mixtures.components >= 2).all())
    theta = model.from_moments(
        torch.tensor([0.9, -0.8, 0.4], dtype=DOUBLE), torch.diag(torch.tensor([0.16, 0.09, 0.0], dtype=DOUBLE))
    )
    axis = torch.linspace(-3.5, 3.5, 281, dtype=DOUBLE)
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([first, second, torch.full_like(first, 0.4)], -1).flatten(0, 1)[:, None]
    log_posterior = torch.logsumexp(torch.stack([mode.log_prob(points) for mode in modes]), 0) - math.log(2)
    population = Normal(torch.tensor([0.9, -0.8]), torch.tensor([0.4, 0.3])).log_prob(points[..., :2]).sum(-1)
    integrand = log_posterior + population - samples.prior.log_prob(points)
    exact = torch.logsumexp(integrand, 0) + 2 * math.log(axis[1] - axis[0])
    # Delta method, and the mixture's own error: about 10 effective parameters near a mode that holds half of the draws.
    error = (1 / effective_draws(state, theta) - 1 / 4000 + 10 / 2000).sqrt()
    assert bool(((contributions(state, theta) - exact).abs() < 5 * error).all())


def cases_for_derivatives() -> list[tuple[GaussianPopulation, list[list[float]] | None]]:
    return [
        (GaussianPopulation(), None),
        (GaussianPopulation(covariance="full"), None),
        (GaussianPopulation(covariance="full", constant=("sigma",)), None),
        (GaussianPopulation(constant=("uptake", "sigma")), CORRELATED),
        (GaussianPopulation(constant=("sigma",), fixed={"mean": {"uptake": 1.5}}), CORRELATED),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("population", "correlation"), cases_for_derivatives())
def test_derivatives_agree_with_finite_differences(
    population: GaussianPopulation, correlation: list[list[float]] | None
) -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=9, seed=8, correlation=correlation)
    state = prepared(case, population, draws=120, chunk=500)
    theta = theta_of(state, [0.4, -0.2, 0.7], OMEGA + 0.05)
    value, gradient = value_and_gradient(state, theta)
    assert value == pytest.approx(float(contributions(state, theta).sum()), rel=1e-12)
    free, step = state.population.unknowns.free, 1e-5
    moved = [
        (theta.index_add(0, place[None], torch.tensor([h], dtype=DOUBLE))) for place in free for h in (step, -step)
    ]
    ends = [value_and_gradient(state, at) for at in moved]
    slopes = torch.tensor([(up[0] - down[0]) / (2 * step) for up, down in zip(ends[::2], ends[1::2], strict=True)])
    # Central differences: error step^2 f'''/6 + eps |f| / step, both around 1e-9 of the scale here.
    torch.testing.assert_close(gradient[free], slopes.double(), rtol=1e-6, atol=1e-5)
    curves = torch.stack([(up[1] - down[1])[free] / (2 * step) for up, down in zip(ends[::2], ends[1::2], strict=True)])
    torch.testing.assert_close(hessian(state, theta), curves, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scores(state, theta).sum(0), gradient[free], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_score_variance_is_that_of_repeated_draws() -> None:
    case = ConjugateCase.simulated([0.5], torch.tensor([[0.36]], dtype=DOUBLE), individuals=10, seed=9)
    population, repeats = GaussianPopulation(), 100
    states = [prepared(case, population, draws=400, seed=100 + repeat) for repeat in range(repeats)]
    theta = theta_of(states[0], [0.5], torch.tensor([[0.25]], dtype=DOUBLE))
    found = torch.stack([scores(state, theta).sum(0) for state in states])
    reported = torch.stack([score_variance(state, theta).diagonal() for state in states]).mean(0)
    # A variance from n repeats has a relative standard error of sqrt(2/n); 5 of them, and 5% for the delta method.
    assert bool(((found.var(0) / reported - 1).abs() < 5 * math.sqrt(2 / repeats) + 0.05).all())


@pytest.mark.slow
def test_blocks_and_storage_change_nothing_that_matters() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=30, seed=10)
    population = GaussianPopulation(constant=("sigma",))
    whole = prepared(case, population, draws=300)
    theta = theta_of(whole, [0.4, -0.2, 0.7], NO_SIGMA)
    small = prepared(case, population, draws=300, chunk=700)
    assert len(small.blocks) == 15
    torch.testing.assert_close(contributions(small, theta), contributions(whole, theta), rtol=1e-11, atol=1e-11)
    narrow = prepared(case, population, draws=300, memory=1e-6)
    assert narrow.storage == torch.float32
    # float32 keeps 7 digits of terms that are of order 10.
    torch.testing.assert_close(contributions(narrow, theta), contributions(whole, theta), rtol=0, atol=1e-5)


def test_a_product_prior_is_recognised_and_its_shortcut_is_exact() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=10, seed=11)
    population = GaussianPopulation(constant=("sigma",))
    state = prepared(case, population, draws=200)
    assert all(block.anchor is not None for block in state.blocks)
    direct = replace(state, blocks=tuple(replace(block, anchor=None) for block in state.blocks))
    theta = theta_of(state, [0.4, -0.2, 0.7], NO_SIGMA)
    torch.testing.assert_close(contributions(direct, theta), contributions(state, theta), rtol=1e-11, atol=1e-11)
    related = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=10, seed=11, correlation=CORRELATED)
    assert all(block.anchor is None for block in prepared(related, population, draws=200).blocks)


def test_parts_hold_the_same_individuals_and_draws() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=12, seed=12)
    state = prepared(case, GaussianPopulation(constant=("sigma",)), draws=400)
    theta = theta_of(state, [0.4, -0.2, 0.7], NO_SIGMA)
    rows = torch.tensor([7, 2, 11])
    part = state.part(rows, slice(None))
    torch.testing.assert_close(contributions(part, theta), contributions(state, theta)[rows], rtol=1e-10, atol=1e-10)
    assert state.part(rows, slice(0, 400, 4)).draws == 100
    assert torch.equal(state.half(1).phi, state.phi[:, 1::2])


def with_prior(samples: PosteriorSamples, prior: Prior) -> PosteriorSamples:
    return PosteriorSamples(names=samples.names, phi=samples.phi, log_q=samples.log_q, prior=prior)


def box(lower: float, upper: float) -> UniformPrior:
    return UniformPrior({name: {"lower": lower, "upper": upper} for name in ("uptake", "decay", "sigma")})


def test_draws_outside_the_prior_are_refused_or_replaced() -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=6, seed=13, noise=0.1)
    samples = with_prior(case.samples(200, seed=1), box(-6.0, 6.0))
    samples.phi[2, :3, 1] = 7.0
    model = GaussianPopulation().bind(case.parameters)
    with pytest.raises(ValueError, match=r"no density at 3 of 1200 draws \(up to 1.5%.*cell_2.*max_outside"):
        PriorRatio().prepare(samples, case.observations, model, seeded())
    state = PriorRatio(max_outside=0.02).prepare(samples, case.observations, model, seeded())
    assert float(state.phi.max()) < 6
    assert torch.equal(state.phi[2, 3:], samples.phi[2, 3:])
    with pytest.raises(ValueError, match=r"up to 1\.5%"):
        PriorRatio(max_outside=0.01).prepare(samples, case.observations, model, seeded())


def test_a_constant_outside_the_support_has_no_likelihood() -> None:
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=6, seed=14, noise=0.1)
    samples = with_prior(case.samples(300, seed=1), box(-6.0, 6.0))
    model = GaussianPopulation(constant=("sigma",)).bind(case.parameters)
    state = PriorRatio().prepare(samples, case.observations, model, seeded())
    inside, outside = (model.from_moments(torch.tensor([0.5, -0.3, s], dtype=DOUBLE), NO_SIGMA) for s in (0.8, 6.5))
    assert bool(torch.isfinite(contributions(state, inside)).all())
    assert bool((contributions(state, outside) == -math.inf).all())


@pytest.mark.parametrize(
    ("names", "words"),
    [(("uptake", "decay", "noise"), "Parameters disagree.*noise.*sigma"), (None, "not finite; individuals: cell_3")],
)
def test_unfit_draws_are_refused(names: tuple[str, ...] | None, words: str) -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=6, seed=15)
    samples = case.samples(50, seed=1)
    if names is None:
        samples.phi[3, 7, 0] = math.nan
    else:
        samples = replace(samples, names=names)
    with pytest.raises(ValueError, match=words):
        PriorRatio().prepare(samples, case.observations, GaussianPopulation().bind(case.parameters), seeded())


def test_draws_of_other_individuals_are_refused() -> None:
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=6, seed=16)
    with pytest.raises(ValueError, match="6 individuals have draws, but the data have 4"):
        PriorRatio().prepare(
            case.samples(50, seed=1), case.observations[:4], GaussianPopulation().bind(case.parameters), seeded()
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"draws": 1},
        {"draws": 500, "max_draws": 100},
        {"components": 0},
        {"memory": 0},
        {"max_outside": 1},
        {"chunk": 0},
        {"reach": 0.5},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="estimator"):
        PriorRatio(**settings)


def test_draws_where_no_simulation_ever_was_count_as_impossible_and_are_told() -> None:
    """A stray draw's weight 1/p(phi) would otherwise carry everything: 30 prior SDs out it is exp(450)."""
    case = ConjugateCase.simulated(MEAN, OMEGA, individuals=6, seed=17, noise=0.1)
    samples = case.samples(200, seed=1)
    model = GaussianPopulation().bind(case.parameters)
    theta = model.from_moments(torch.tensor(MEAN, dtype=DOUBLE), OMEGA)
    before = contributions(PriorRatio().prepare(samples, case.observations, model, seeded()), theta)
    samples.phi[2, :50] = 45.0
    state = PriorRatio().prepare(samples, case.observations, model, seeded())
    wide = model.from_moments(torch.tensor(MEAN, dtype=DOUBLE), 400 * torch.eye(3, dtype=DOUBLE))
    assert bool((torch.cat([block.log_weights(wide) for block in state.blocks])[2, :50] == -math.inf).all())
    after = contributions(state, theta)
    torch.testing.assert_close(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
    assert abs(float(after[2] - before[2])) < 1  # a quarter of the draws less, no more than that
    said = " ".join(state.warnings(theta, case.observations.ids))
    assert "4.2% of the draws lie so far outside the training prior" in said
    assert "worst first: cell_2." in said
    clean = PriorRatio().prepare(case.samples(200, seed=1), case.observations, model, seeded())
    assert "so far outside" not in " ".join(clean.warnings(theta, case.observations.ids))


def test_stray_draws_carry_no_fit_where_the_prior_has_a_reach() -> None:
    case = ConjugateCase.simulated(MEAN[:2], OMEGA[:2, :2], individuals=80, seed=4)
    samples = case.samples(1000, seed=5)
    # Tails of a network: a draw of a thousand lies 6.5 SDs of the prior away, which no simulation was.
    phi = samples.phi.clone()
    phi[:, 0, 0] = case.prior.mean[0] - 6.5 * 1.5
    leaky = replace(samples, phi=phi, log_q=None)
    model = GaussianPopulation().bind(case.parameters)
    truth, se, _ = case.maximum(model, model.from_moments(torch.tensor(MEAN[:2], dtype=DOUBLE), OMEGA[:2, :2]))
    fits = {
        reach: fit_population(leaky, case.observations, model, estimator=PriorRatio(reach=reach), generator=seeded())
        for reach in (3.0, None)
    }
    errors = {reach: float(((fit.theta - truth).abs() / se).max()) for reach, fit in fits.items()}
    # Monte-Carlo error of 1000 draws, below 0.1 standard errors in one fit, four of them.
    assert errors[3.0] < 0.4
    assert errors[None] > 5


def test_an_individual_beyond_the_reach_keeps_its_draws() -> None:
    case = ConjugateCase.simulated(MEAN[:2], OMEGA[:2, :2], individuals=3, seed=4)
    samples = case.samples(200, seed=5)
    phi = samples.phi.clone()
    phi[0] += 20.0
    phi[1, :50, 0] = 9.0
    model = GaussianPopulation().bind(case.parameters)
    draws = PriorRatio(reach=3.0).prepare(replace(samples, phi=phi, log_q=None), case.observations, model, seeded())
    torch.testing.assert_close(draws.phi[0], phi[0])
    torch.testing.assert_close(draws.phi[1, 50:], phi[1, 50:])
    assert bool(torch.isin(draws.phi[1, :50, 0], phi[1, 50:, 0]).all())
    torch.testing.assert_close(draws.phi[2], phi[2])


def test_a_constant_where_no_simulation_ever_was_has_no_likelihood() -> None:
    """Else a mixture wider than the prior would pull the constant to infinity, where 1/p grows faster than it falls."""
    case = ConjugateCase.simulated(MEAN, NO_SIGMA, individuals=6, seed=18, noise=3.0)
    model = GaussianPopulation(constant=("sigma",)).bind(case.parameters)
    state = PriorRatio().prepare(case.samples(300, seed=1), case.observations, model, seeded())
    near, far = (model.from_moments(torch.tensor([0.5, -0.3, s], dtype=DOUBLE), NO_SIGMA) for s in (5.0, 30.0))
    assert bool(torch.isfinite(contributions(state, near)).all())
    assert bool((contributions(state, far) == -math.inf).all())


def test_the_level_of_the_training_prior_is_that_of_its_farthest_simulations() -> None:
    prior = GaussianPrior({name: {"mean": 1.0, "sd": 2.0} for name in ("uptake", "decay", "sigma")})
    level = trained_level(prior, torch.device("cpu"))
    peak = float(prior.log_prob(torch.ones(3, dtype=DOUBLE)))
    # The largest of 1e5 chi-square(3) numbers: 24 to 38 in all but one of 200 samples.
    assert 0.5 * chi2.isf(0.005 / 1e5, 3) + 20 > peak - level > 0.5 * chi2.isf(5.3 / 1e5, 3) + 20
    assert trained_level(box(-6.0, 6.0), torch.device("cpu")) == pytest.approx(-3 * math.log(12) - 20)
