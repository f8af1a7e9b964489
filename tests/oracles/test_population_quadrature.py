"""What judges the estimators is itself judged: by closed forms, brute force, differences and published fits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from curves import BIEXPONENTIAL, EMAX, ORAL, Study, emax_curve, log_likelihood, oral_curve
from numpy.testing import assert_allclose
from population_maximum import likelihood_of_linear, maximum, starts_about
from population_quadrature import Population, evaluate, find_modes, importance_sampling, log_joint, widened
from scipy.optimize import minimize
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from small_study_cases import INDOMETH_CONSTANT, ORANGE, simulated_case

ORANGE_THETA = np.array([192.0, 6.59, 5.85, 2.06, 3.45])


def test_quadrature_is_exact_where_the_model_is_linear_in_its_random_effect():
    population = ORANGE.population()
    study = population.study
    for change in (-0.3, 0.0, 0.5):
        theta = ORANGE_THETA + change * np.array([30.0, 0.1, 0.1, 1.0, 1.0])
        found = evaluate(population, theta, find_modes(population, theta), nodes=5)
        slope = 1 / (1 + np.exp((np.exp(theta[1]) - study.times[0]) / np.exp(theta[2])))
        exact = [likelihood_of_linear(y, slope, theta[0], np.exp(theta[4]), np.exp(theta[3])) for y in study.values]
        assert_allclose(found.log_likelihood, exact, rtol=1e-9)


def test_the_closed_form_of_the_test_above_is_a_multivariate_normal_by_simulation():
    random = np.random.default_rng(0)
    design, mean, sd, residual = np.array([0.5, 2.0]), 1.0, 0.7, 0.4
    y = np.array([0.9, 2.4])
    phi = mean + sd * random.standard_normal(400_000)
    densities = norm.pdf(y, design * phi[:, None], residual).prod(1)
    error = densities.std() / np.sqrt(len(phi)) / densities.mean()
    assert abs(np.log(densities.mean()) - likelihood_of_linear(y, design, mean, sd, residual)) < 5 * error


def _two_modes() -> tuple[Population, np.ndarray]:
    """Two exponentials of equal size whose rates both vary widely: every individual has a mirror image."""
    random = np.random.default_rng(3)
    times = np.array([0.2, 0.5, 1.0, 2.0, 4.0])
    people = [
        (times, (np.exp(-1.5 * times) + np.exp(-0.3 * times)) * (1 + 0.1 * random.standard_normal(5)), 0.0)
        for _ in range(2)
    ]
    population = Population(BIEXPONENTIAL, Study.of(people), (1, 3))
    return population, np.array([0.0, -0.4, 0.0, -0.4, -2.3, 0.0, 0.0])


def test_integrands_of_two_modes_agree_with_a_fine_grid():
    population, theta = _two_modes()
    modes = find_modes(population, theta)
    assert np.bincount(modes.rows).tolist() == [2, 2]
    axis = np.linspace(-5, 4, 501)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(1, -1, 2)
    cell = np.log(axis[1] - axis[0]) * 2
    found = evaluate(population, theta, modes, nodes=25).log_likelihood
    for row in range(2):
        values = log_joint(population, theta, np.array([row]), grid)
        assert_allclose(found[row], np.logaddexp.reduce(values.ravel()) + cell, atol=1e-5)


def test_importance_sampling_agrees_and_a_missing_mode_shows():
    population, theta = _two_modes()
    modes = find_modes(population, theta)
    right = evaluate(population, theta, modes, nodes=25).deviance
    value, error = importance_sampling(population, theta, modes)
    assert abs(value - right) < 5 * error
    # The case to be rejected: with one of two equal modes each, quadrature is 4 log 2 off and the sampling is not.
    first = np.array([np.flatnonzero(modes.rows == row)[0] for row in range(2)])
    half = type(modes)(modes.rows[first], modes.places[first], modes.factors[first], np.zeros(2))
    missing = evaluate(population, theta, half, nodes=9).deviance
    value, error = importance_sampling(population, theta, half)
    assert abs(missing - value) > 10 * error
    assert abs(missing - value) > 1.0


def test_scores_are_derivatives_of_the_log_likelihood():
    case = simulated_case(0)
    population = case.population()
    theta = np.array([*case.means.values(), *case.log_sds.values()])
    modes = find_modes(population, theta)
    scores = evaluate(population, theta, modes, nodes=13).scores.sum(0)
    step = 1e-5
    for place in range(len(theta)):
        moved = step * np.eye(len(theta))[place]
        up, down = (
            evaluate(population, theta + sign * moved, modes, nodes=13, gradient=False).deviance for sign in (1, -1)
        )
        assert_allclose(scores[place], -0.5 * (up - down) / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_rule_of_other_places_agrees():
    case = simulated_case(0)
    population = case.population()
    theta = np.array([*case.means.values(), *case.log_sds.values()])
    at_modes = evaluate(population, theta, find_modes(population, theta), nodes=17)
    at_moments = evaluate(population, theta, widened(at_modes.moments, 1.1), nodes=17)
    assert_allclose(at_moments.log_likelihood, at_modes.log_likelihood, atol=2e-4)


def test_orange_is_as_published():
    """Pinheiro and Bates fit this model to these data; nlme prints the same estimates."""
    population = ORANGE.population()
    found = maximum(population, [ORANGE_THETA])
    assert not found.problems
    theta, se = found.best.theta, found.best.se
    assert_allclose(theta[0], 192.053, atol=0.01)
    assert_allclose(np.exp(theta[1:3]), [727.91, 348.07], rtol=1e-4)
    assert_allclose(np.exp(theta[3:]), [7.843, 31.646], rtol=1e-3)
    # Errors of natural values by the delta method.
    assert_allclose(se * np.array([1, *np.exp(theta[1:])]), [15.7, 35.2, 27.1, 1.01, 10.3], rtol=0.01)
    assert_allclose(found.best.deviance, 263.1438, atol=5e-4)


def test_indometh_is_as_two_other_programs_have_it():
    found = maximum(
        INDOMETH_CONSTANT.population(),
        starts_about(
            INDOMETH_CONSTANT.population(), INDOMETH_CONSTANT.means, INDOMETH_CONSTANT.log_sds, seed=0, count=1
        ),
    )
    assert not found.problems
    assert_allclose(found.best.theta[:4], [0.9358, 0.5178, -1.3187, -1.7720], atol=2e-4)
    assert_allclose(np.exp(found.best.theta[4:]), [0.1496, 0.2018, 0.2628], atol=1e-4)
    assert_allclose(found.best.deviance, -178.6277, atol=5e-4)


def test_people_without_variability_get_variances_of_zero_and_the_pooled_fit():
    random = np.random.default_rng(4)
    times = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 12.0])
    phi = np.array([0.3, 1.0, 3.4, -1.0])
    curve = oral_curve(phi, times, np.array(300.0))
    # Residuals of which every individual has the same sum of squares and none a common part.
    noise = random.standard_normal((3, 6))
    noise -= noise.mean(0)
    people = [(times, curve + 0.37 * part, 300.0) for part in noise]
    population = Population(ORAL, Study.of(people), (1,))
    found = maximum(population, [np.array([*phi, -2.0])])
    assert found.best.at_zero == ("CL",)
    assert found.best.theta[-1] == -np.inf
    assert np.isnan(found.best.se[-1])

    def pooled(at: np.ndarray) -> float:
        return -log_likelihood(ORAL, population.study, np.arange(3), np.tile(at, (3, 1, 1))).sum()

    best = minimize(pooled, phi, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9, "maxiter": 4000})
    assert_allclose(found.best.theta[:4], best.x, atol=1e-4)
    assert_allclose(found.best.deviance, 2 * best.fun, atol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-10, 1e-3])
def test_equal_rates_of_absorption_and_elimination_keep_their_digits(gap):
    times, rate = np.array([0.5, 3.0]), 0.4
    phi = np.log([rate * (1 + gap), rate * 10, 10.0, 1.0])
    # The limit, and its first-order change.
    expected = 100 * rate * (1 + gap) / 10 * times * np.exp(-rate * times) * (1 - 0.5 * gap * rate * times)
    assert_allclose(oral_curve(phi, times, np.array(100.0)), expected, rtol=2 * gap**2 + 1e-12)


def test_a_residual_part_that_runs_to_zero_is_no_maximum():
    """The data have a proportional error only: an additive one has its best log SD at minus infinity."""
    random = np.random.default_rng(2)
    doses = np.array([0.0, 1.0, 4.0, 10.0, 30.0, 100.0])
    phi = np.array([2.0, 4.0, 2.3, -np.inf, -2.0])
    people = []
    for _ in range(4):
        curve = emax_curve(phi + np.array([0.3, 0, 0, 0, 0]) * random.standard_normal(), doses, np.array(0.0))
        # The smallest effects scatter less than in proportion.
        people.append((doses, curve * (1 + 0.13 * random.standard_normal(6) * np.array([0.3, 0.6, 1, 1, 1, 1])), 0.0))
    population = Population(EMAX, Study.of(people), (0,))
    found = maximum(population, [np.array([2.0, 4.0, 2.3, -1.0, -2.0, -1.2])])
    assert any("mean.sd" in problem for problem in found.problems)
