"""Laplace's approximation against closed forms, an own NumPy Laplace, quadrature and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conjugate_case import observations
from curved_case import Curved, by_quadrature
from linear_case import DOUBLE, MEAN, NO_SIGMA, OMEGA, Opaque, linear_case, log_likelihood, seeded
from scipy.optimize import minimize
from scipy.stats import norm
from theophylline_laplace import theophylline
from theophylline_quadrature import ESTIMATE, RESIDUAL, SDS

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import GaussianPopulation, Laplace, fit_population
from nlme_sbi.population.estimators import laplace_terms as laplace_pieces
from nlme_sbi.population.estimators.laplace_draws import LaplaceDraws
from nlme_sbi.population.objective.objective import contributions, hessian, scores, value_and_gradient
from nlme_sbi.posteriors import PosteriorSamples


@pytest.mark.slow
@pytest.mark.parametrize(("constant", "covariance"), [(("sigma",), "diagonal"), ((), "full")])
def test_where_everything_is_linear_it_is_exact(constant: tuple[str, ...], covariance: str) -> None:
    omega = NO_SIGMA if constant else OMEGA
    # Of few individuals the search for a full covariance takes four times as long.
    case, simulator = linear_case(omega, individuals=60, seed=3)
    fit = fit_population(
        case.samples(80, seed=1),
        case.observations,
        GaussianPopulation(constant=constant, covariance=covariance),
        generator=seeded(),
        parameters=case.parameters,
        estimator=Laplace(simulator=simulator),
        starts=1,
    )
    best, se, _ = case.maximum(fit.population, fit.population.from_moments(torch.tensor(MEAN, dtype=DOUBLE), omega))
    # Both searches end within 1e-3 of a standard error in their gradients, quadratic in the objective.
    assert fit.converged
    assert float(((fit.theta - best).abs() / se).max()) < 1e-3
    closed = -2 * float(log_likelihood(case, fit.population.mean(best), fit.population.covariance(best)).sum())
    assert fit.minus_two_log_likelihood == pytest.approx(closed, abs=1e-6)
    # The information is that where the last Newton step began, up to 0.05 standard errors from here.
    torch.testing.assert_close(fit.standard_errors, se, rtol=0.05, atol=0)
    # Nothing is sampled; and the draws that stand for the individuals have their exact moments.
    assert fit.monte_carlo.objective_se < 1e-6
    assert float(fit.monte_carlo.se.max()) < 1e-9
    mean, spread = case.posterior(fit.population.mean(fit.theta), fit.population.covariance(fit.theta))
    torch.testing.assert_close(fit.individuals.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fit.individuals.sd.square(), spread.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=1e-9)
    # It is named wherever it is shown, with what tells its error; nobody is called poor.
    text = fit.table().text()
    assert fit.approximation == fit.to_dict()["approximation"] == "Laplace"
    assert "compare only with other fits of it" in text
    assert "Monte-Carlo SE" not in "".join(fit.table().heading)
    assert any("estimator=exact computes it" in warning for warning in fit.warnings)
    assert not any("is poor" in warning for warning in fit.warnings)


# Theophylline: third derivatives that matter, a constant, correlations.


def laplace_of_one(times: np.ndarray, values: np.ndarray, dose: float) -> float:
    """NumPy's own: mode by BFGS, Hessian by central differences, eta in units of its SD."""
    beta, sd = np.array(list(ESTIMATE.values())), np.array(list(SDS.values()))

    def negative(eta: np.ndarray) -> float:
        ka, clearance, volume = np.exp(beta + sd * eta)
        elimination = clearance / volume
        level = dose * ka / (volume * (ka - elimination)) * (np.exp(-elimination * times) - np.exp(-ka * times))
        return -float(norm.logpdf(values, level, RESIDUAL).sum() + norm.logpdf(eta).sum())

    mode = minimize(negative, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
    step = 1e-3 * np.eye(3)
    curvature = [
        [
            (negative(mode + a + b) - negative(mode + a - b) - negative(mode - a + b) + negative(mode - a - b)) / 4e-6
            for a in step
        ]
        for b in step
    ]
    return -negative(mode) + 1.5 * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(np.array(curvature))[1]


@pytest.mark.slow
def test_theophylline_against_a_laplace_of_numpy() -> None:
    state, theta, data = theophylline(full=False)
    found = contributions(state, theta)
    expected = []
    for row in range(12):
        seen = data.design.observed[row, :, 0].numpy()
        times, values = data.design.times[row].double().numpy()[seen], data.values[row, :, 0].double().numpy()[seen]
        expected.append(laplace_of_one(times, values, float(data.design.events.amount[row, 0])))
    # Differences of the oracle: step^2 / 12 times fourth derivatives of order 10, half of it in the log determinant.
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    # 0.3 above the exact 360.7009: the approximation's own error, which its check by sampling finds.
    assert -2 * float(found.sum()) == pytest.approx(361.10, abs=0.02)
    (said,) = state.warnings(theta, data.ids)
    assert "true -2 log L 0.4" in said or "true -2 log L 0.3" in said


@pytest.mark.slow
def test_derivatives_against_finite_differences() -> None:
    state, theta, _ = theophylline(full=True)
    state = state.part(torch.arange(2), slice(0, 8))
    theta = theta.clone()
    theta[-3:] = torch.tensor([0.2, -0.3, 0.1])
    _, gradient = value_and_gradient(state, theta)
    curvature = hessian(state, theta)
    generator = seeded(5)
    for _ in range(2):
        way = torch.randn(len(theta), generator=generator, dtype=DOUBLE)
        (up, rising), (down, falling) = (value_and_gradient(state, theta + sign * 1e-4 * way) for sign in (1, -1))
        # Central differences are off by step^2 / 6 times third derivatives of order 100.
        assert float(gradient @ way) == pytest.approx((up - down) / 2e-4, abs=3e-6)
        torch.testing.assert_close(curvature @ way, (rising - falling) / 2e-4, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(state, theta).sum(0), gradient, rtol=1e-10, atol=1e-10)


def test_the_gradient_needs_the_movement_of_the_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    state, theta, _ = theophylline(full=False)
    _, gradient = value_and_gradient(state, theta)
    way = torch.zeros_like(theta)
    way[1] = 1e-4
    monkeypatch.setattr(laplace_pieces, "_exact_modes", lambda joint, rows, starts, near: starts)
    frozen = (value_and_gradient(state, theta + way)[0] - value_and_gradient(state, theta - way)[0]) / 2e-4
    assert abs(float(gradient[1]) - frozen) > 1e-2


# One dimension, by quadrature.


def one_dimension(shape: str, values: list[float], *, sd: float, sigma: float) -> tuple[LaplaceDraws, torch.Tensor]:
    data = replace(observations(torch.tensor(values, dtype=DOUBLE)[:, None]), signals=("y",))
    simulator = Curved(shape)
    model = GaussianPopulation(constant=("sigma",)).bind(simulator.parameters)
    theta = model.from_moments(
        torch.tensor([-0.4, math.log(sigma)], dtype=DOUBLE), torch.diag(torch.tensor([sd**2, 0.0], dtype=DOUBLE))
    )
    prior = GaussianPrior({"x": {"mean": 0.0, "sd": 2.0}, "sigma": {"mean": -3.0, "sd": 0.5}})
    count = len(values)
    phi = prior.sample(count * 60, seeded(3)).double().reshape(count, 60, 2)
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(count, 60, dtype=DOUBLE), prior=prior)
    estimator = Laplace(simulator=simulator)
    return estimator.draws_at(samples, data, theta, estimator.prepare(samples, data, model, seeded()), seeded()), theta


def test_the_modes_of_an_individual_are_added_up() -> None:
    values = [1.5]
    state, theta = one_dimension("square", values, sd=1.5, sigma=0.05)
    expected = [by_quadrature("square", y, mean=-0.4, sd=1.5, sigma=0.05) for y in values]
    # Next term of Laplace's series at these modes: sigma^2 / y^2 of order 1e-3.
    np.testing.assert_allclose(contributions(state, theta).numpy(), expected, atol=3e-3)
    assert torch.bincount(state.modes.rows).tolist() == [2]
    one = replace(state.blocks[0], place=state.blocks[0].place[:, :1])
    assert bool((one.log_weights(theta)[:, 0] < contributions(state, theta) - 0.2).all())
    mean = state.blocks[0].varying().mean(1)[:, 0]
    share = torch.sigmoid(torch.tensor([2 * 0.4 * math.sqrt(y) / 1.5**2 for y in values]))  # of the mode below 0
    torch.testing.assert_close(
        mean, (1 - 2 * share) * torch.tensor(values).sqrt(), rtol=0, atol=0.02, check_dtype=False
    )


def test_individuals_for_whom_it_is_poor_are_named() -> None:
    state, theta = one_dimension("kinked", [0.05, 3.0], sd=1.5, sigma=0.05)
    said = " ".join(state.warnings(theta, ("bent", "plain")))
    exact = by_quadrature("kinked", 0.05, mean=-0.4, sd=1.5, sigma=0.05)
    assert abs(float(contributions(state, theta)[0]) - exact) > 0.25
    assert "is poor" in said
    assert "bent" in said
    assert "plain" not in said


def test_a_simulator_without_likelihood_is_refused_with_the_remedy() -> None:
    case, _ = linear_case(OMEGA, individuals=6, seed=6)
    samples, model = case.samples(50, seed=1), GaussianPopulation().bind(case.parameters)
    with pytest.raises(ValueError, match=r"laplace needs a likelihood, and Opaque has none.*prior_ratio"):
        Laplace(simulator=Opaque()).prepare(samples, case.observations, model, seeded())
    with pytest.raises(ValueError, match=r"draws do not name the simulator; pass Laplace\(simulator="):
        Laplace().prepare(samples, case.observations, model, seeded())
