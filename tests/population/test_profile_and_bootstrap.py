"""Sandwich errors, profile intervals and the bootstrap against textbook formulas and numerical optimisation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from closed_form import closed_fit, one_level
from conjugate_case import ConjugateCase, Linear
from curved_case import Curved
from linear_case import NO_SIGMA, linear_case
from scipy.optimize import brentq, minimize
from scipy.stats import chi2, norm

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, fit_population
from nlme_sbi.population.estimators import exact_draws
from nlme_sbi.population.objective.objective import contributions, effective_draws
from nlme_sbi.population.uncertainty.bootstrap import bootstrap
from nlme_sbi.population.uncertainty.methods import (
    Assessment,
    add_intervals,
    bootstrap_rows,
    sandwich_covariance,
    wald_intervals,
)
from nlme_sbi.population.uncertainty.profile import profile_interval, profile_intervals
from nlme_sbi.posteriors import PosteriorSamples

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def level() -> tuple[ConjugateCase, PopulationFit]:
    """Forty individuals, one varying parameter, no Monte-Carlo error."""
    case = one_level(mean=1.0, sd=0.6, noise=0.3, individuals=40, seed=3)
    return case, closed_fit(case, GaussianPopulation())


def test_sandwich_errors_are_those_of_the_moments(level: tuple[ConjugateCase, PopulationFit]) -> None:
    case, fit = level
    y = case.y[:, 0].numpy()
    variance, fourth = y.var(), ((y - y.mean()) ** 4).mean()
    omega2 = variance - 0.3**2
    # Of the estimates mean(y) and var(y); log omega = log(var - noise^2) / 2. No normality assumed anywhere.
    expected = [math.sqrt(variance / 40), math.sqrt((fourth - variance**2) / 40) / (2 * omega2)]
    # The fit's Hessian is that of its last step but one, which was up to 0.05 standard errors away.
    np.testing.assert_allclose(sandwich_covariance(fit).diagonal().sqrt(), expected, rtol=0.01)
    # The information assumes normality: with these tails it differs, which is what the sandwich is for.
    assumed = math.sqrt(2 * variance**2 / 40) / (2 * omega2)
    assert float(fit.standard_errors[1]) == pytest.approx(assumed, rel=0.01)
    assert abs(expected[1] / assumed - 1) > 0.03


def test_a_profile_of_a_mean_and_of_an_sd_is_that_of_the_normal_distribution(
    level: tuple[ConjugateCase, PopulationFit],
) -> None:
    case, fit = level
    y = case.y[:, 0].numpy()
    variance, noise2, cut = y.var(), 0.3**2, chi2.ppf(0.9, 1)
    mean, log_sd = profile_intervals(fit, level=0.9)
    # max over omega of the likelihood at mu: n log(var + (ybar - mu)^2), the closed form of the profile.
    half = math.sqrt(variance * (math.exp(cut / 40) - 1))
    tolerance = 0.02 * fit.standard_errors
    assert mean.limits == pytest.approx((y.mean() - half, y.mean() + half), abs=float(tolerance[0]))

    def drop(log_omega: float) -> float:
        total = math.exp(2 * log_omega) + noise2
        return 40 * (math.log(total / variance) + variance / total - 1) - cut

    best = 0.5 * math.log(variance - noise2)
    expected = (brentq(drop, best - 2, best), brentq(drop, best, best + 2))
    assert log_sd.limits == pytest.approx(expected, abs=float(tolerance[1]))
    assert (log_sd.monte_carlo_se, log_sd.redrawn, log_sd.climbed) == ((0.0, 0.0), 0, pytest.approx(0, abs=1e-6))
    # Likelihood intervals of an SD are not symmetric; a Wald interval would be refused here.
    wald = best - norm.ppf(0.95) * float(fit.standard_errors[1])
    assert abs(log_sd.limits[0] - wald) > 2 * float(tolerance[1])
    assert bool((log_sd.points.diff() >= 0).all())
    assert float(log_sd.drops.min()) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_an_sd_that_may_be_zero_has_no_lower_limit() -> None:
    case = one_level(mean=1.0, sd=0.35, noise=1.0, individuals=60, seed=1)
    variance = float(case.y.var(unbiased=False))
    assert 60 * (math.log(1 / variance) + variance - 1) < chi2.ppf(0.95, 1)  # omega = 0 is within the interval
    fit = closed_fit(case, GaussianPopulation())
    assert fit.population.varying  # omega itself is positive here
    profile = profile_interval(fit, "log_sd.uptake")
    assert profile.limits[0] == -math.inf
    assert math.isfinite(profile.limits[1])
    found = add_intervals(fit, Assessment(methods=("information", "profile")), generator=seeded())
    row = next(row for row in found.intervals if (row.unknown, row.method) == ("log_sd.uptake", "profile"))
    assert (row.natural_lower, row.quantity) == (0.0, "omega(uptake)")
    assert "profile [95% CI]" in found.table().text()
    assert (
        next(
            entry for entry in found.to_dict()["intervals"] if entry["method"] == "profile" and "sd" in entry["unknown"]
        )["lower"]
        is None
    )


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["multinomial", "exponential"])
def test_every_bootstrap_replicate_is_the_estimate_with_its_weights(
    level: tuple[ConjugateCase, PopulationFit], weights: str
) -> None:
    case, fit = level
    y = case.y[:, 0].numpy()
    found = bootstrap(fit, generator=seeded(4), replicates=60, weights=weights)
    same, expected = seeded(4), []
    for _ in range(60):
        if weights == "multinomial":
            times = np.bincount(torch.randint(40, (40,), generator=same).numpy(), minlength=40) / 40
        else:
            waits = torch.empty(40, dtype=DOUBLE).exponential_(generator=same).numpy()
            times = waits / waits.sum()
        mean = times @ y
        expected.append((mean, 0.5 * math.log(times @ (y - mean) ** 2 - 0.3**2)))
    assert found.failed == 0
    np.testing.assert_allclose(
        found.theta / fit.standard_errors, np.array(expected) / fit.standard_errors.numpy(), atol=0.05
    )
    ordered = np.sort(np.array(expected)[:, 0])
    limits = found.interval(0.9)  # order statistics 3.05 and 57.95 of 60
    wanted = [0.95 * ordered[2] + 0.05 * ordered[3], 0.05 * ordered[56] + 0.95 * ordered[57]]
    np.testing.assert_allclose(limits[:, 0], wanted, atol=0.05 * float(fit.standard_errors[0]))


@pytest.mark.slow
def test_bootstrap_errors_are_the_analytic_ones_within_their_own(level: tuple[ConjugateCase, PopulationFit]) -> None:
    case, fit = level
    y = case.y[:, 0].numpy()
    spread = float(bootstrap(fit, generator=seeded(5), replicates=100).standard_errors[0])
    noise = 4 / math.sqrt(2 * 100)
    assert abs(spread / (y.std() / math.sqrt(40)) - 1) < noise
    assert abs(spread / (y.std() / math.sqrt(80)) - 1) > noise  # must be rejected


# On draws: estimator exact, with a constant parameter.


@pytest.fixture(scope="module")
def drawn_fit() -> tuple[ConjugateCase, Linear, PopulationFit]:
    case, simulator = linear_case(NO_SIGMA, individuals=25, seed=8)
    fit = fit_population(
        case.samples(100, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        parameters=case.parameters,
        estimator=Exact(simulator=simulator),
        starts=1,
    )
    return case, simulator, fit


def profile_by_optimisation(case: ConjugateCase, fit: PopulationFit, unknown: str) -> tuple[float, float]:
    """Both limits from the closed-form likelihood and a general optimiser."""
    model, place = fit.population, fit.population.unknowns.names.index(unknown)
    best, _, maximum = case.maximum(model, fit.theta)

    def root(value: float) -> float:
        others = [entry for entry in range(len(best)) if entry != place]

        def negative(point: np.ndarray) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(point, requires_grad=True)
            theta = best.index_fill(0, torch.tensor([place]), value).index_copy(0, torch.tensor(others), leaf)
            lost = -case.log_ratio(model.mean(theta), model.covariance(theta)).sum()
            lost.backward()
            return float(lost.detach()), leaf.grad.numpy()

        found = minimize(negative, best[others].numpy(), jac=True, method="BFGS", options={"gtol": 1e-6})
        return 2 * (maximum + found.fun) - chi2.ppf(0.95, 1)

    middle, se = float(best[place]), float(fit.standard_errors[place])
    return brentq(root, middle - 4 * se, middle, xtol=1e-4), brentq(root, middle, middle + 4 * se, xtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("unknown", ["mean.sigma", "log_sd.decay"])
def test_a_profile_on_draws_is_the_closed_form_within_its_own_error(
    drawn_fit: tuple[ConjugateCase, Linear, PopulationFit], unknown: str
) -> None:
    case, _, fit = drawn_fit
    profile = profile_interval(fit, unknown, generator=seeded(2))
    place = fit.population.unknowns.names.index(unknown)
    se, shift = float(fit.standard_errors[place]), float(fit.monte_carlo.se[place])
    for found, expected, error in zip(
        profile.limits, profile_by_optimisation(case, fit, unknown), profile.monte_carlo_se, strict=True
    ):
        assert error < 0.1 * se
        # The limits' own error and that of the estimate, which moves along.
        assert abs(found - expected) < 4 * math.hypot(error, shift) + 0.02 * se


@pytest.mark.slow
def test_draws_for_two_ends_serve_both(drawn_fit: tuple[ConjugateCase, Linear, PopulationFit]) -> None:
    case, _, fit = drawn_fit
    far = fit.theta.clone()
    far[0] += 1.5
    far[3] += 0.8
    state = fit.redraw(far, fit.state, seeded(3))
    both = fit.state.part(torch.arange(25), slice(0, 400)).joint_draws(
        state.part(torch.arange(25), slice(0, 400)), seeded(4)
    )
    assert both.draws == fit.state.draws + state.draws
    for theta in (fit.theta, far):
        exact = case.log_ratio(fit.population.mean(theta), fit.population.covariance(theta))
        exact = exact + case_evidence(case)
        error = (1 / effective_draws(both, theta) - 1 / both.draws).clamp_min(1e-12).sqrt()
        assert float(error.max()) < 0.1
        assert bool(((contributions(both, theta) - exact).abs() < 5 * error).all())


def case_evidence(case: ConjugateCase) -> torch.Tensor:
    """``log p(y_i)`` under the training prior, which the case's ratios are to."""
    marginal = case.loadings @ case.prior.covariance @ case.loadings.T + torch.diag_embed(case.noise.square())
    return torch.distributions.MultivariateNormal(case.prior.mean @ case.loadings.T, marginal).log_prob(case.y)


@pytest.mark.slow
def test_draws_expanded_anew_are_exact_where_an_expansion_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quadrature, a curved likelihood, and a noise SD 1.6 times that which the draws were made for."""
    values, sd, sigma, other = [0.9, 0.6, 0.3, 1.0], 0.8, 0.1, 0.16
    data = replace(one_level(mean=0, sd=1, noise=1, individuals=4, seed=0).observations, signals=("y",))
    data = replace(data, values=torch.tensor(values, dtype=DOUBLE)[:, None, None])
    simulator = Curved("saturating")
    model = GaussianPopulation(constant=("sigma",)).bind(simulator.parameters)
    theta, moved = (torch.tensor([-1.0, math.log(s), math.log(sd)], dtype=DOUBLE) for s in (sigma, other))
    prior = GaussianPrior({"x": {"mean": 0.0, "sd": 2.0}, "sigma": {"mean": -2.0, "sd": 0.5}})
    phi = prior.sample(4 * 60, seeded(3)).double().reshape(4, 60, 2)
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(4, 60, dtype=DOUBLE), prior=prior)
    monkeypatch.setattr(exact_draws, "_DIRECT", 0)  # as where the data are many: expanded, not evaluated
    estimator = Exact(draws=4000, simulator=simulator)
    state = estimator.draws_at(samples, data, theta, estimator.prepare(samples, data, model, seeded()), seeded())
    x = np.linspace(-1.0 - 10 * sd, -1.0 + 10 * sd, 200_001)
    integrands = [norm.pdf(y, np.exp(-np.exp(x)), other) * norm.pdf(x, -1.0, sd) for y in values]
    expected = torch.tensor([math.log(each.sum() * (x[1] - x[0])) for each in integrands], dtype=DOUBLE)
    again = state.expand_about(moved)
    error = (1 / effective_draws(again, moved) - 1 / again.draws).clamp_min(1e-12).sqrt()
    assert float(error.max()) < 0.1
    assert bool(((contributions(again, moved) - expected).abs() < 4 * error + 1e-3).all())
    stale = (contributions(state, moved) - expected).abs()
    assert float((stale / error).max()) > 8  # the expansion alone must be rejected
    assert torch.equal(again.made_for, moved)


@pytest.mark.slow
def test_wald_intervals_have_natural_scales(drawn_fit: tuple[ConjugateCase, Linear, PopulationFit]) -> None:
    _, _, fit = drawn_fit
    rows = {row.unknown: row for row in wald_intervals(fit)}
    table = fit.table().to_frame().set_index("parameter")
    for name in ("uptake", "decay", "sigma"):
        row = rows[f"mean.{name}"]
        expected = table.loc[name, ["natural", "natural_lower", "natural_upper"]].astype(float)
        np.testing.assert_allclose([row.natural, row.natural_lower, row.natural_upper], expected, rtol=1e-10)
    row = rows["log_sd.decay"]
    expected = table.loc["decay", ["omega", "omega_lower", "omega_upper"]].astype(float)
    np.testing.assert_allclose([row.natural, row.natural_lower, row.natural_upper], expected, rtol=1e-10)
    assert row.monte_carlo_se == pytest.approx(
        float(fit.monte_carlo.se[fit.population.unknowns.names.index("log_sd.decay")])
    )
    assert set(rows) == {"mean.uptake", "mean.decay", "mean.sigma", "log_sd.uptake", "log_sd.decay"}


@pytest.mark.slow
def test_a_bootstraps_natural_error_is_the_replicates_own(level: tuple[ConjugateCase, PopulationFit]) -> None:
    _, fit = level
    found = bootstrap(fit, generator=seeded(1), replicates=60)
    for place, row in enumerate(bootstrap_rows(fit, found)):  # the mean and the SD, both exponentials
        assert row.natural_se == pytest.approx(float(found.theta[:, place].exp().std()))


@pytest.mark.slow
def test_what_has_no_interval_is_refused(level: tuple[ConjugateCase, PopulationFit]) -> None:
    case, fit = level
    with pytest.raises(ValueError, match=r'no unknown "log_sd.decay" in this fit; it has mean.uptake, log_sd.uptake'):
        profile_interval(fit, "log_sd.decay")
    with pytest.raises(ValueError, match=r"level of an interval lies between 0 and 1; got 95\.0"):
        profile_interval(fit, "mean.uptake", level=95.0)
    fixed = closed_fit(case, GaussianPopulation(fixed={"sd": {"uptake": 0.6}}))
    with pytest.raises(ValueError, match=r'"log_sd.uptake" is fixed in this fit'):
        profile_interval(fixed, "log_sd.uptake")
    assert len(profile_intervals(fixed)) == 1
    broken = replace(fit, covariance=torch.full_like(fit.covariance, math.nan))
    for ask in (lambda: profile_interval(broken, "mean.uptake"), lambda: bootstrap(broken, generator=seeded())):
        with pytest.raises(ValueError, match="This fit has no standard errors"):
            ask()
    assert add_intervals(broken, Assessment(), generator=seeded()).intervals == ()
    with pytest.raises(ValueError, match="replicates must be at least 2; got 1"):
        bootstrap(fit, generator=seeded(), replicates=1)
    with pytest.raises(ValueError, match=r"30 replicates have no 95% interval: at least 39"):
        bootstrap(fit, generator=seeded(), replicates=30).interval(0.95)
    for bad, sentence in (
        ({"methods": ("jackknife",)}, "must be different ones of information, sandwich, profile, bootstrap"),
        ({"methods": ("profile", "profile")}, "must be different ones of"),
        ({"replicates": 20}, "20 bootstrap replicates have no 95% interval; at least 39"),
        ({"level": 0.3}, r"level of intervals must be in \[0.5, 1\); got 0.3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Assessment(**bad)
