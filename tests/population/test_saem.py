"""SAEM against closed forms and quadrature: estimates, errors, chains, mirror images, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, Linear, observations
from covariate_regressions import three_kinds
from curved_case import Curved
from linear_case import DOUBLE, MEAN, NO_SIGMA, OMEGA, Opaque, linear_case, log_likelihood, seeded
from omegaconf import OmegaConf
from scipy.optimize import minimize
from scipy.stats import norm
from theophylline_laplace import theophylline

from nlme_sbi.cli import compose_config
from nlme_sbi.compute.progress import FitProgress
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.numerics.t_mixtures import Mixtures
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population import GaussianPopulation, Laplace, Saem, fit_population
from nlme_sbi.population.estimators.interface import SearchResult, SelfOptimizingEstimator, ThetaDependentEstimator
from nlme_sbi.population.estimators.saem.convergence import check_stationarity, drift, mean_covariance
from nlme_sbi.population.estimators.saem.mcmc import CompleteData, Kernels, start_chains, sweep_chains
from nlme_sbi.population.estimators.saem.stochastic_approximation import newton_step
from nlme_sbi.population.likelihood.laplace_components import distinct_modes
from nlme_sbi.population.likelihood.log_joint import JointDensity
from nlme_sbi.population.models.interface import PopulationModel
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations, Simulator

QUICK = {"burn_in": 40, "averaging": 80}


def silent(progress: FitProgress) -> None:
    """Nobody listens."""


def searched(
    estimator: Saem,
    samples: PosteriorSamples,
    data: Observations,
    model: PopulationModel,
    start: torch.Tensor,
    *,
    accuracy: float = 0.3,
) -> SearchResult:
    first = estimator.prepare(samples, data, model, seeded())
    return estimator.search(samples, data, start, first, seeded(), accuracy=accuracy, report=silent)


def displaced(model: PopulationModel, mean: list[float], omega: torch.Tensor) -> torch.Tensor:
    """A start some SDs away, with SDs twice as large."""
    return model.from_moments(torch.tensor(mean, dtype=DOUBLE) + 0.7, 4 * omega)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constant", "covariance", "fixed"),
    [
        ((), "full", {"sd": {"decay": 0.5}}),  # no M-step in closed form: gradients
        (("sigma",), "diagonal", {"mean": {"uptake": math.exp(0.4)}}),
    ],
)
def test_the_search_ends_at_the_maximum_of_the_closed_form(constant, covariance, fixed) -> None:
    omega = NO_SIGMA if constant else OMEGA
    case, simulator = linear_case(omega, individuals=25, seed=3)
    model = GaussianPopulation(constant=constant, covariance=covariance, fixed=fixed).bind(case.parameters)
    start = displaced(model, MEAN, omega)
    found = searched(Saem(simulator=simulator, **QUICK), case.samples(50, seed=1), case.observations, model, start)
    best, se, _ = case.maximum(model, model.from_moments(torch.tensor(MEAN, dtype=DOUBLE), omega))
    assert found.converged, found.message
    apart = (found.theta - best).abs()[model.unknowns.free] / se
    noise = found.monte_carlo_se[model.unknowns.free] / se
    # 0.3 was asked for, and 4.5 of its own standard errors are not exceeded by chance (8 unknowns, 1 in 15,000).
    assert float(noise.max()) < 0.33
    assert bool((apart < 4.5 * noise + 0.02).all())
    assert bool((found.theta == start)[model.unknowns.fixed].all())


@pytest.mark.slow
def test_the_fit_tells_likelihood_and_errors_at_its_estimate_and_what_it_cost() -> None:
    case, simulator = linear_case(NO_SIGMA, individuals=20, seed=5)
    fit = fit_population(
        case.samples(60, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        parameters=case.parameters,
        estimator=Saem(simulator=simulator, max_sweeps=220, **QUICK),
        starts=1,
        accuracy=0.001,
    )
    best, se, _ = case.maximum(fit.population, fit.theta)
    assert float(((fit.theta - best).abs() / se).max()) < 0.3
    torch.testing.assert_close(fit.standard_errors, se, rtol=0.2, atol=0)  # the oracle has its own at the maximum
    mean, omega = fit.population.mean(fit.theta), fit.population.covariance(fit.theta)
    closed = -2 * float(log_likelihood(case, mean, omega).sum())
    assert abs(fit.minus_two_log_likelihood - closed) < 4 * 2 * fit.monte_carlo.objective_se + 1e-3
    assert fit.approximation == ""
    assert "sweeps" in fit.message
    assert "independence" in fit.message
    assert "estimator saem" in fit.table().text()
    # The wish was out of reach, and that is said with the setting that limits it.
    assert any("Monte-Carlo error is above 0.001" in said and "max_sweeps=220" in said for said in fit.warnings)


def quick_saem(simulator: Simulator) -> Saem:
    return Saem(simulator=simulator, chains=2, max_sweeps=220, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "apart"), [(quick_saem, 0.6), (Laplace, 0.01)])
def test_covariate_effects_are_those_of_regressions(estimator: Callable[..., Saem | Laplace], apart: float) -> None:
    """Linear and normal: Laplace is exact; 220 sweeps leave a Monte-Carlo error of 0.1 to 0.15 standard errors."""
    fit, expected = three_kinds(estimator)
    found = dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))
    assert set(found) == set(expected)
    assert max(abs(found[name] - value) / error for name, (value, error) in expected.items()) < apart


@pytest.mark.slow
def test_the_same_seed_gives_the_same_estimate() -> None:
    case, simulator = linear_case(OMEGA, individuals=5, seed=5)
    model = GaussianPopulation().bind(case.parameters)
    start = displaced(model, MEAN, OMEGA)
    estimator = Saem(simulator=simulator, chains=1, max_sweeps=220, **QUICK)
    samples = case.samples(30, seed=1)
    first, again = (searched(estimator, samples, case.observations, model, start) for _ in range(2))
    assert torch.equal(first.theta, again.theta)
    assert torch.equal(first.monte_carlo_se, again.monte_carlo_se)


@pytest.mark.slow
def test_theophylline_from_a_far_start() -> None:
    """Adaptive Gauss-Hermite quadrature's maximum, all 132 observations; see benchmarks/theophylline_exact.py."""
    state, theta, data = theophylline(full=False)
    model = state.population
    start = model.from_moments(torch.tensor([0.0, 1.5, 3.0, 0.5], dtype=DOUBLE), 0.5 * torch.eye(4, dtype=DOUBLE))
    phi, prior = state.training_draws()
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(phi.shape[:2], dtype=DOUBLE), prior=prior)
    estimator = Saem(simulator=state.joint.simulator, chains=12, **QUICK)
    found = estimator.search(samples, data, start, state, seeded(), accuracy=0.3, report=silent)
    se = torch.tensor(
        [0.1929, 0.0843, 0.0462, 0.0497 / 0.6959, 0.1509 / 0.6364, 0.0664 / 0.2652, 0.04 / 0.136], dtype=DOUBLE
    )
    assert found.converged
    assert float(((found.theta - theta).abs() / se).max()) < 0.3
    assert float((found.monte_carlo_se / se).max()) < 0.1


# Chains leave the individuals' posteriors as they are: one dimension, two modes, by quadrature.


def square_case() -> tuple[CompleteData, Kernels, torch.Tensor, torch.Tensor]:
    values = torch.tensor([0.1, 1.0], dtype=DOUBLE)
    data = replace(observations(values[:, None]), signals=("y",))
    simulator = Curved("square")
    model = GaussianPopulation(constant=("sigma",)).bind(simulator.parameters)
    theta = model.from_moments(
        torch.tensor([0.3, math.log(0.4)], dtype=DOUBLE), torch.diag(torch.tensor([1.0, 0.0], dtype=DOUBLE))
    )
    joint = JointDensity(simulator, model, data, theta)
    rows, starts = torch.tensor([0, 0, 1, 1]), torch.tensor([-0.5, 0.5, -1.0, 1.0], dtype=DOUBLE)[:, None]
    found, at = distinct_modes(joint, rows, starts)
    kernels = Kernels.around(joint, found, at, target=0.35)
    return CompleteData.of(simulator, model, data, chains=300), kernels, theta, values


def chained(sweeps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Time averages of x and of x < 0 of every chain, ``(2, individuals, chains)``, and their oracles."""
    data, kernels, theta, values = square_case()
    generator = seeded(2)
    chains = start_chains(data, theta, torch.full((2, 300, 1), 0.5, dtype=DOUBLE))
    total = torch.zeros(2, 2, 300, dtype=DOUBLE)
    for turn in range(20 + sweeps):
        chains, kernels, _ = sweep_chains(
            data, chains, kernels, theta, generator, turn=turn, rate=0.5 if turn < 20 else 0.0
        )
        if turn >= 20:
            total += torch.stack([chains.points[..., 0], (chains.points[..., 0] < 0).double()]) / sweeps
    x = np.linspace(-4, 5, 20001)
    density = norm.pdf(x, 0.3, 1.0) * norm.pdf(values.numpy()[:, None], x**2, 0.4)
    density /= density.sum(1, keepdims=True)
    return total, torch.tensor(np.stack([density @ x, density @ (x < 0)]))


def worst_z(total: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((total.mean(2) - exact) / (total.std(2) / total.shape[2] ** 0.5)).abs().max())


@pytest.mark.slow
def test_chains_visit_both_modes_in_their_proportions(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four averages over 300 independent chains: beyond 4.5 standard errors once in 30,000 runs.
    assert worst_z(*chained(40)) < 4.5
    # Without the ratio of proposal densities the same chains are wrong.
    monkeypatch.setattr(Mixtures, "log_prob", lambda self, phi: torch.zeros_like(phi[..., 0]))
    assert worst_z(*chained(40)) > 8


# Mirror images: two parameters that may be exchanged, and a population that prefers one labelling.


class Pair(MechanisticSimulator):
    """Sum and squared difference of two parameters: exchanging them changes nothing."""

    parameters = ParameterSpace((*(Parameter(name, transform="identity") for name in ("a", "b")), Parameter("sigma")))
    signals, signal_units, time_unit = ("sum", "square"), ("", ""), ""
    noise = Additive(sd="sigma")

    def __init__(self, exchangeable: tuple[tuple[str, str], ...]) -> None:
        self.exchangeable = exchangeable

    def predict(self, phi, design):
        a, b = phi[..., 0], phi[..., 1]
        return torch.stack([a + b, (a - b).square()], -1)[..., None, :]


NOISE = 0.1


def pairs(count: int) -> np.ndarray:
    random = np.random.default_rng(4)
    a, b = 0.5 + 0.7 * random.standard_normal(count), -0.5 + 0.9 * random.standard_normal(count)
    return np.stack([a + b, (a - b) ** 2], 1) + NOISE * random.standard_normal((count, 2))


def pair_maximum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and SEs of both means and log SDs: the sum is integrated in closed form, the difference on a grid."""
    grid = np.linspace(-6, 6, 6001)

    def negative(theta: np.ndarray) -> float:
        variance = np.exp(2 * theta[2:])
        total, cross = variance.sum(), variance[0] - variance[1]
        slope = cross / total
        centre = theta[0] + theta[1] + slope * (grid - theta[0] + theta[1])
        spread = np.sqrt(total - cross * slope + NOISE**2)
        log_density = norm.logpdf(grid, theta[0] - theta[1], np.sqrt(total))
        log_density = log_density + norm.logpdf(values[:, :1], centre, spread)
        log_density = log_density + norm.logpdf(values[:, 1:], grid**2, NOISE)
        return -float(np.logaddexp.reduce(log_density, axis=1).sum() + len(values) * math.log(grid[1] - grid[0]))

    found = minimize(negative, np.array([0.5, -0.5, math.log(0.7), math.log(0.9)]), method="BFGS", tol=1e-4)
    return found.x, np.sqrt(np.diag(found.hess_inv))


def pair_fit(values: np.ndarray, exchangeable: tuple[tuple[str, str], ...]) -> torch.Tensor:
    """From draws that all have a above b, as a network may have learnt it."""
    data = replace(observations(torch.tensor(values)), signals=("sum", "square"), signal_units=("", ""), time_unit="")
    prior = GaussianPrior(
        {"a": {"mean": 0.0, "sd": 2.0}, "b": {"mean": 0.0, "sd": 2.0}, "sigma": {"mean": -2.3, "sd": 0.3}}
    )
    apart = torch.tensor(values[:, 1]).clamp_min(0.01).sqrt()
    centre = torch.stack([0.5 * (torch.tensor(values[:, 0]) + apart), 0.5 * (torch.tensor(values[:, 0]) - apart)], 1)
    noise = 0.05 * torch.randn((len(values), 40, 3), generator=seeded(1), dtype=DOUBLE)
    sigma = torch.full((len(values), 1), math.log(NOISE), dtype=DOUBLE)
    phi = torch.cat([centre, sigma], 1)[:, None] + noise
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(phi.shape[:2], dtype=DOUBLE), prior=prior)
    simulator = Pair(exchangeable)
    model = GaussianPopulation(fixed={"mean": {"sigma": NOISE}}, constant=("sigma",)).bind(simulator.parameters)
    start = model.from_moments(phi.mean((0, 1)), torch.eye(3, dtype=DOUBLE))
    estimator = Saem(simulator=simulator, chains=3, **QUICK)
    return searched(estimator, samples, data, model, start, accuracy=1.0).theta


@pytest.mark.slow
def test_chains_that_exchange_declared_parameters_find_the_maximum_and_others_do_not() -> None:
    values = pairs(60)
    best, se = pair_maximum(values)
    exchanging = pair_fit(values, (("a", "b"),))
    order = [0, 1, 3, 4]  # means of a and b, their log SDs; sigma is given
    assert float(np.abs((exchanging.numpy()[order] - best) / se).max()) < 0.5
    # About every fifth individual has b above a; chains that keep the label of their first mode cannot know it.
    staying = pair_fit(values, ())
    assert float(np.abs((staying.numpy()[order] - best) / se).max()) > 0.8


# Judging: score and information of chains at a fixed theta.


def standing(case: ConjugateCase, simulator: Linear, model: PopulationModel, theta: torch.Tensor):
    joint = JointDensity(simulator, model, case.observations, theta)
    every = torch.arange(len(case.y))
    found, at = distinct_modes(joint, every, joint.centre.expand(len(every), -1))
    data = CompleteData.of(simulator, model, case.observations, chains=4)
    kernels = Kernels.around(joint, found, at, target=0.35)
    chains = start_chains(data, theta, found.means[:, None].expand(-1, 4, -1).clone())
    return check_stationarity(data, chains, kernels, theta, seeded(), sweeps=60)[0]


@pytest.mark.slow
def test_a_standstill_knows_the_maximum_and_how_far_another_point_is_from_it() -> None:
    case, simulator = linear_case(NO_SIGMA, individuals=60, seed=8)
    model = GaussianPopulation(constant=("sigma",)).bind(case.parameters)
    best, se, _ = case.maximum(model, model.from_moments(torch.tensor(MEAN, dtype=DOUBLE), NO_SIGMA))
    there = standing(case, simulator, model, best)
    # Louis' information from 240 draws an individual.
    torch.testing.assert_close(there.se, se, rtol=0.1, atol=0)
    assert bool((there.left.abs() < 4.5 * there.left_se).all())
    away = best.clone()
    away[0] += 0.5 * float(se[0])
    found = standing(case, simulator, model, away)
    assert float(found.left[0] / se[0]) == pytest.approx(0.5, abs=0.1 + 4 * float(found.left_se[0] / se[0]))
    assert float(found.left[0].abs()) > 4 * float(found.left_se[0])


def test_drift_is_told_from_fluctuation() -> None:
    generator = seeded(7)
    noise = torch.randn(100, 400, generator=generator, dtype=DOUBLE)
    wandering = [noise[0]]
    for row in noise[1:]:
        wandering.append(0.5 * wandering[-1] + row)
    sequence = torch.stack(wandering)
    # Batches of 5 see 3/4 of the variance of such a mean, and 9 + 9 of them make a t rather than a normal: 2%.
    assert float((drift(sequence).abs() > 3).double().mean()) < 0.05
    trend = torch.linspace(0, 4, 100, dtype=DOUBLE)[:, None]
    assert float((drift(sequence + trend).abs() > 3).double().mean()) > 0.9
    assert bool((drift(torch.ones(100, 2, dtype=DOUBLE)) == 0).all())
    found = torch.stack([mean_covariance(column[:, None])[0, 0] for column in noise.T]).mean()
    assert float(found) == pytest.approx(1 / 100, rel=0.1)  # 400 estimates with 9 degrees of freedom each: 2.4%
    with pytest.raises(ValueError, match="10 batches need as many members"):
        mean_covariance(noise[:5])


def test_newton_steps_go_uphill_and_are_bounded() -> None:
    gradient = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    information = torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=DOUBLE)
    torch.testing.assert_close(newton_step(gradient, information, 10), torch.linalg.solve(information, gradient))
    saddle = torch.diag(torch.tensor([4.0, -9.0], dtype=DOUBLE))
    assert float(newton_step(gradient, saddle, 10) @ gradient) > 0
    far = newton_step(1e6 * gradient, information, 10)
    assert float(far @ information @ far) < 2 * 9 * 10


@pytest.mark.parametrize(
    "settings",
    [{"burn_in": 10}, {"averaging": 20}, {"max_sweeps": 399}, {"chains": -1}, {"acceptance": 1.5}, {"draws": 3}],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="estimator: needs"):
        Saem(**settings)


@pytest.mark.parametrize(("choice", "expected"), [("saem", Saem()), ("laplace", Laplace())])
def test_the_configuration_files_hold_the_defaults(choice: str, expected: Saem | Laplace) -> None:
    plain = OmegaConf.to_container(compose_config("fit_population", [f"estimator={choice}"]), resolve=True)
    found = instantiate(plain["estimator"], where="estimator")
    assert found == expected
    assert isinstance(found, SelfOptimizingEstimator) == (choice == "saem")
    assert isinstance(found, ThetaDependentEstimator)


def test_a_simulator_without_likelihood_is_refused_with_the_remedy() -> None:
    case, _ = linear_case(OMEGA, individuals=6, seed=6)
    samples, model = case.samples(50, seed=1), GaussianPopulation().bind(case.parameters)
    with pytest.raises(ValueError, match=r"saem needs a likelihood, and Opaque has none.*prior_ratio"):
        Saem(simulator=Opaque()).prepare(samples, case.observations, model, seeded())
    with pytest.raises(ValueError, match=r"draws do not name the simulator; pass Saem\(simulator="):
        Saem().prepare(samples, case.observations, model, seeded())
