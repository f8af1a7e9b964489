"""Student-t and Huber random effects against quadrature: normaliser, moments, likelihood, maximum, tables."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, Linear
from jaxtyping import TypeCheckError
from linear_case import DOUBLE, seeded
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import multivariate_t, norm
from scipy.stats import t as student

from nlme_sbi import EllipticalPopulation, Exact, GaussianPopulation, HuberEffects, PriorRatio, StudentTEffects
from nlme_sbi import fit_population as fit
from nlme_sbi.diagnostics.fit.random_effects import distribution_tests, random_effects
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.numerics.pareto_k import pareto_shape
from nlme_sbi.population.models.elliptical import LengthLaw
from nlme_sbi.population.objective.objective import contributions, effective_draws
from nlme_sbi.population.results.estimates import FitEstimates
from nlme_sbi.population.theta_posterior.prior import ThetaPriors
from nlme_sbi.types import Design

NOISE, CENTRE, SCALE = 0.3, 0.5, 0.6
NONE = torch.zeros(0, dtype=DOUBLE)
LAWS = [HuberEffects(), HuberEffects(2.5), StudentTEffects(3)]


def density(law: LengthLaw, length: float, size: int) -> float:
    """Of the length: the law's density times the surface of a sphere."""
    inner = float(law.log_density(torch.tensor([[length * length]], dtype=DOUBLE), size, NONE))
    return math.exp(inner) * 2 * math.pi ** (size / 2) / math.gamma(size / 2) * length ** (size - 1)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_densities_integrate_to_one_and_have_the_variance_that_is_told(law: LengthLaw, size: int) -> None:
    def integral(power: int) -> float:
        ends = (0.0, 1.0, 2.0, 4.0, 8.0, np.inf)
        return sum(quad(lambda r: density(law, r, size) * r**power, *p, epsabs=1e-12)[0] for p in pairwise(ends))

    assert integral(0) == pytest.approx(1, abs=1e-8)
    assert integral(2) / size == pytest.approx(float(law.variance(size, NONE)), rel=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_samples_have_the_distribution(law: LengthLaw) -> None:
    count, size = 100_000, 2
    lengths = law.lengths(count, size, NONE, seeded())
    for radius in (0.5, 1.5, 3.0, 6.0):
        share = quad(lambda r: density(law, r, size), 0, radius, points=[1.6, 2.7])[0]
        # Binomial: five standard errors.
        assert float((lengths < radius).double().mean()) == pytest.approx(
            share, abs=5 * math.sqrt(share * (1 - share) / count)
        )
    direction = torch.randn((count, size), generator=seeded(1), dtype=DOUBLE)
    one = lengths * direction[:, 0] / direction.norm(dim=1)
    below = float((one < law.quantile(0.9, size, NONE)).double().mean())
    assert below == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / count))
    assert law.quantile(0.1, size, NONE) == pytest.approx(-law.quantile(0.9, size, NONE))


def test_correlated_effects_are_the_multivariate_t() -> None:
    case = ConjugateCase.simulated([0.1, 0.2], torch.eye(2, dtype=DOUBLE), individuals=3, seed=0)
    model = EllipticalPopulation(law=StudentTEffects(5), covariance="full").bind(case.parameters)
    omega = torch.tensor([[0.5, 0.2], [0.2, 0.9]], dtype=DOUBLE)
    theta = model.from_moments(torch.tensor([0.1, 0.2], dtype=DOUBLE), 5 / 3 * omega)
    phi = torch.randn((3, 4, 2), generator=seeded(), dtype=DOUBLE)
    oracle = multivariate_t([0.1, 0.2], omega.numpy(), df=5).logpdf(phi.numpy())
    np.testing.assert_allclose(model.log_prob(phi, theta, case.observations.design), oracle, rtol=1e-10)
    assert torch.allclose(model.covariance(theta), 5 / 3 * omega)
    assert torch.allclose(model.dispersion(theta), omega)


def one_parameter(individuals: int, *, outliers: int = 0, seed: int = 0) -> tuple[ConjugateCase, Linear]:
    case = ConjugateCase.simulated([CENTRE], torch.tensor([[SCALE**2]]).double(), individuals=individuals, seed=seed)
    y = torch.tensor(norm(CENTRE, math.hypot(SCALE, NOISE)).rvs((individuals, 1), random_state=seed))
    y[:outliers] += 8 * SCALE
    case = replace(case, y=y, noise=torch.full_like(case.noise, NOISE))
    return case, Linear(case, NOISE)


def marginal(law: LengthLaw | None, value: float, mean: float, sd: float) -> float:
    """Log density of a measurement: the law's convolution with the noise, by the trapezoidal rule, whose error is that
    of the bend at Huber's threshold, below 1e-6."""
    z = np.linspace(-80, 80, 400_001)
    if law is None or isinstance(law, StudentTEffects):
        density = student.pdf(z, 4)
    else:
        density = law.log_density(torch.tensor(z * z)[None], 1, NONE).exp()[0].numpy()
    noise = np.exp(-0.5 * ((mean + sd * z - value) / NOISE) ** 2) / (NOISE * math.sqrt(2 * math.pi))
    return math.log(float(np.trapezoid(density * noise, z)))


@pytest.mark.parametrize("law", [StudentTEffects(4), HuberEffects()], ids=str)
def test_the_exact_likelihood_is_that_of_quadrature(law: LengthLaw) -> None:
    case, simulator = one_parameter(8, outliers=2)
    model = EllipticalPopulation(law=law).bind(case.parameters)
    theta = torch.tensor([CENTRE, math.log(SCALE)], dtype=DOUBLE)
    estimator, samples = Exact(draws=2000, simulator=simulator), case.samples(100, seed=1)
    state = estimator.draws_at(
        samples, case.observations, theta, estimator.prepare(samples, case.observations, model, seeded()), seeded()
    )
    oracle = np.array([marginal(law, float(value), CENTRE, SCALE) for value in case.y[:, 0]])
    # Delta method: the log of a mean of S weights has the standard error sqrt(1/ESS - 1/S).
    error = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(1e-12).sqrt().numpy()
    assert error.max() < 0.03
    assert (np.abs(contributions(state, theta).numpy() - oracle) < 5 * error + 1e-6).all()


def test_the_exact_estimate_is_the_maximum_of_quadrature_with_its_degrees_of_freedom() -> None:
    case, simulator = one_parameter(200)
    effects = student(3.5).rvs((200, 1), random_state=4)
    case = replace(case, y=torch.tensor(CENTRE + SCALE * effects + norm(0, NOISE).rvs((200, 1), random_state=5)))
    law = StudentTEffects("estimated")
    found = fit(
        case.samples(100, seed=1),
        case.observations,
        EllipticalPopulation(law=law),
        generator=seeded(),
        estimator=Exact(simulator=simulator),
        parameters=case.parameters,
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    values = case.y[:, 0].numpy()

    def deviance(theta: np.ndarray) -> float:  # the noise is narrow: Gauss-Hermite about each measurement
        sd = math.exp(theta[1])
        inner = student(2 + math.exp(theta[2])).pdf((values[:, None] + NOISE * nodes - theta[0]) / sd) / sd
        return -2 * float(np.log(inner @ weights / math.sqrt(2 * math.pi)).sum())

    best = minimize(deviance, found.theta.numpy(), method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-8})
    assert found.converged
    # Monte-Carlo error is below 0.1 standard errors by the fit's own target.
    assert (np.abs(found.theta.numpy() - best.x) < 0.1 * found.standard_errors.numpy()).all()
    error = 2 * found.monte_carlo.objective_se
    assert error < 0.6
    assert found.minus_two_log_likelihood == pytest.approx(best.fun, abs=5 * error)
    assert "degrees of freedom (estimated)" in found.table().text()


def test_the_ratio_over_posterior_draws_is_that_of_quadrature() -> None:
    case, _ = one_parameter(5)
    case = replace(case, prior=GaussianPrior({"uptake": {"mean": 0.2, "sd": 3.0}}))
    model = EllipticalPopulation(law=StudentTEffects(4)).bind(case.parameters)
    theta = torch.tensor([CENTRE, math.log(SCALE)], dtype=DOUBLE)
    state = PriorRatio().prepare(case.samples(20_000, seed=1), case.observations, model, seeded())
    evidence = norm(0.2, math.hypot(3.0, NOISE)).logpdf(case.y[:, 0].numpy())
    oracle = np.array([marginal(None, float(value), CENTRE, SCALE) for value in case.y[:, 0]]) - evidence
    error = (1 / effective_draws(state, theta) - 1 / state.draws).clamp_min(1e-12).sqrt().numpy()
    assert (np.abs(contributions(state, theta).numpy() - oracle) < 5 * error + 1e-6).all()


def test_proposals_are_as_heavy_as_the_population_where_data_say_nothing() -> None:
    case, _ = one_parameter(4)
    simulator = Linear(case, 1e3)
    model = EllipticalPopulation(law=StudentTEffects(2.5)).bind(case.parameters)
    theta = torch.tensor([CENTRE, math.log(SCALE)], dtype=DOUBLE)
    estimator, samples = Exact(draws=4000, simulator=simulator), case.samples(100, seed=1)
    state = estimator.draws_at(
        samples, case.observations, theta, estimator.prepare(samples, case.observations, model, seeded()), seeded()
    )
    log_weights = state.blocks[0].log_weights(theta)
    assert state.mixed.freedom == 2
    # A t with 2 degrees of freedom over one with 2.5 is bounded: no weight is many times the mean.
    assert float(torch.softmax(log_weights, 1).max()) < 10 / state.draws
    assert float(pareto_shape(log_weights).max()) < 0.5


def test_outliers_move_robust_estimates_little() -> None:
    case, simulator = one_parameter(100, outliers=5, seed=2)
    regular = case.y[5:, 0]
    moved = {}
    for name, population in {
        "gaussian": GaussianPopulation(),
        "student": EllipticalPopulation(law=StudentTEffects("estimated")),
        "huber": EllipticalPopulation(law=HuberEffects()),
    }.items():
        found = fit(
            case.samples(100, seed=1),
            case.observations,
            population,
            generator=seeded(),
            estimator=Exact(simulator=simulator),
            parameters=case.parameters,
            starts=2,
        )
        assert found.converged
        moved[name] = abs(float(found.theta[0]) - float(regular.mean()))
    assert moved["student"] < 0.25 * moved["gaussian"]
    assert moved["huber"] < 0.4 * moved["gaussian"]  # the bend at 1.345 SDs counts every outlier as 1.345 of 8


def test_tables_say_what_omega_is_and_stored_fits_keep_it() -> None:
    case, simulator = one_parameter(30)
    found = fit(
        case.samples(100, seed=1),
        case.observations,
        EllipticalPopulation(law=StudentTEffects(5)),
        generator=seeded(),
        estimator=Exact(simulator=simulator),
        parameters=case.parameters,
        starts=1,
    )
    (row,) = found.estimates.parameters
    centre, omega = found.theta[0].item(), found.theta[1].exp().item()
    assert row.omega == pytest.approx(omega)
    assert row.cv_percent is None  # the exponential of a Student-t has no mean
    assert row.individuals_upper == pytest.approx(math.exp(centre + student(5).ppf(0.975) * omega))
    again = FitEstimates.from_dict(found.to_dict())
    assert again.random_effects == found.estimates.random_effects
    assert "multivariate Student-t with 5 degrees of freedom (given)" in again.table().text()
    assert "1.29 omega" in again.table().text()  # sqrt(5/3)


def test_random_effects_are_judged_by_their_own_law() -> None:
    rows, sd = 2000, math.sqrt(2.0)
    draws = torch.tensor(student(4).rvs((rows, 20, 1), random_state=0)).double()
    reference = torch.tensor(student(4).rvs((400_000, 1), random_state=1)).double() / sd
    ids, typical = tuple(map(str, range(rows))), torch.zeros((rows, 1), dtype=DOUBLE)
    spread = torch.full((rows, 1), sd, dtype=DOUBLE)
    given = {"ids": ids, "names": ("ka",), "generator": seeded()}
    judged = distribution_tests(random_effects(draws, typical, spread, reference=reference, **given))
    assert not judged.table.rejected.any()
    assert distribution_tests(random_effects(draws, typical, spread, **given)).table.rejected.all()


def test_the_prior_of_degrees_of_freedom_is_normalised() -> None:
    case, _ = one_parameter(3)
    model = EllipticalPopulation(law=StudentTEffects("estimated")).bind(case.parameters)
    prior = ThetaPriors(given={}).bind(model, case.prior)
    assert prior.describe()[2] == "degrees of freedom gamma(2, 0.1) above 2"
    theta = torch.tensor([0.2, 0.0, 0.0], dtype=DOUBLE)

    def at(value: float) -> float:
        theta[2] = value
        return math.exp(float(prior.log_prob(theta)))

    alone = math.exp(float(replace(prior, free=prior.free[:2], entries=prior.entries[:2]).log_prob(theta)))
    assert quad(at, -30, 8, limit=200)[0] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("outliers", "words"), [(0, "no heavier than Gaussian"), (6, "heavier than")])
def test_degrees_of_freedom_at_the_end_of_their_range_are_told(outliers: int, words: str) -> None:
    case, simulator = one_parameter(40)
    # Evenly spread quantiles have lighter tails than any sample; all outliers in one place are a class of their own.
    even = norm.ppf((np.arange(40) + 0.5) / 40)[:, None]
    y = torch.tensor(CENTRE + math.hypot(SCALE, NOISE) * even)
    y[:outliers] = 100.0
    found = fit(
        case.samples(100, seed=1),
        replace(case, y=y).observations,
        EllipticalPopulation(law=StudentTEffects("estimated")),
        generator=seeded(),
        estimator=Exact(simulator=simulator),
        parameters=case.parameters,
        starts=1,
    )
    assert any(words in warning for warning in found.warnings), found.table().text()


@pytest.mark.parametrize("given", [2, 1.5, math.inf, "free"])
def test_degrees_of_freedom_without_a_covariance_are_refused(given: float | str) -> None:
    with pytest.raises(ValueError, match="above 2, or estimated"):
        StudentTEffects(given)


def test_other_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"law\.threshold"):
        HuberEffects(0)
    # Where types are checked, as in these tests, the checker is the first to refuse.
    with pytest.raises((ValueError, TypeCheckError), match=r"law"):
        EllipticalPopulation(law="student")  # type: ignore[arg-type]


def test_a_population_in_which_nothing_varies_has_no_law() -> None:
    case, _ = one_parameter(3)
    model = EllipticalPopulation(constant=["uptake"]).bind(case.parameters)
    assert model.unknowns.names == ("mean.uptake",)
    assert model.sample(torch.tensor([1.0]), Design.regular(torch.zeros(1), 2, 1), seeded()).tolist() == [[1.0], [1.0]]
