"""Monte-Carlo errors as they are reported against those that repeated draws show."""

from __future__ import annotations

import math

import pytest
import torch
from conjugate_case import ConjugateCase

from nlme_sbi.population import GaussianPopulation, PopulationFit, fit_population
from nlme_sbi.population.objective.standard_errors import covariance_from, describe_unidentified, name_weakest

DOUBLE = torch.float64
REPEATS = 30


@pytest.fixture(scope="module")
def repeated() -> tuple[ConjugateCase, list[PopulationFit]]:
    """One data set fitted with many independent sets of few draws, so that their errors are large enough to be seen."""
    case = ConjugateCase.simulated([0.5], torch.tensor([[0.16]], dtype=DOUBLE), individuals=40, seed=1, noise=0.5)
    fits = [
        fit_population(
            case.samples(100, seed=10 + repeat),
            case.observations,
            GaussianPopulation(),
            parameters=case.parameters,
            generator=torch.Generator().manual_seed(0),
            starts=1,
        )
        for repeat in range(REPEATS)
    ]
    return case, fits


@pytest.mark.slow
def test_monte_carlo_standard_errors_are_the_spread_over_draws(
    repeated: tuple[ConjugateCase, list[PopulationFit]],
) -> None:
    _, fits = repeated
    spread = torch.stack([fit.theta for fit in fits]).std(0)
    reported = torch.stack([fit.monte_carlo.se for fit in fits]).square().mean(0).sqrt()
    # A standard deviation from n repeats is known to 1/sqrt(2n); the delta method to a few percent more at this ESS.
    assert float((spread / reported - 1).abs().max()) < 4 / math.sqrt(2 * REPEATS) + 0.1
    objectives = torch.tensor([fit.objective for fit in fits], dtype=DOUBLE)
    told = torch.tensor([fit.monte_carlo.objective_se for fit in fits], dtype=DOUBLE).square().mean().sqrt()
    assert abs(float(objectives.std() / told) - 1) < 4 / math.sqrt(2 * REPEATS) + 0.1


@pytest.mark.slow
def test_the_bias_of_the_objective_is_seen_by_formula_and_jackknife(
    repeated: tuple[ConjugateCase, list[PopulationFit]],
) -> None:
    case, fits = repeated
    _, _, maximum = case.maximum(fits[0].population, fits[0].theta)
    errors = torch.tensor([fit.objective - maximum for fit in fits], dtype=DOUBLE)
    noise = float(errors.std()) / math.sqrt(REPEATS)
    formula = sum(fit.monte_carlo.objective_bias for fit in fits) / REPEATS
    # The maximum on noisy draws lies above the objective at the truth by half a square of each unknown's error.
    climbed = sum(float(((fit.monte_carlo.se / fit.standard_errors) ** 2).sum()) / 2 for fit in fits) / REPEATS
    assert abs(float(errors.mean()) - (formula + climbed)) < 4 * noise
    halves = [fit.monte_carlo.objective_bias_jackknife for fit in fits]
    assert all(value is not None for value in halves)
    jackknife = torch.tensor(halves, dtype=DOUBLE)
    spread = math.hypot(noise, float(jackknife.std()) / math.sqrt(REPEATS))
    assert abs(float(errors.mean() - jackknife.mean())) < 4 * spread
    assert float(jackknife.mean()) < 0


@pytest.mark.slow
def test_the_jackknife_sees_the_bias_of_the_estimates(repeated: tuple[ConjugateCase, list[PopulationFit]]) -> None:
    case, fits = repeated
    exact, _, _ = case.maximum(fits[0].population, fits[0].theta)
    errors = torch.stack([fit.theta for fit in fits]) - exact
    told = torch.stack([fit.monte_carlo.bias for fit in fits])
    noise = (errors.var(0) + told.var(0)).sqrt() / math.sqrt(REPEATS)
    assert bool(((errors.mean(0) - told.mean(0)).abs() < 4 * noise).all())


def test_a_covariance_is_given_only_where_there_is_one() -> None:
    good = torch.tensor([[4.0, 1.0], [1.0, 9e8]], dtype=DOUBLE)
    found = covariance_from(good)
    assert found is not None
    torch.testing.assert_close(found, torch.linalg.inv(good))
    saddle = torch.tensor([[1.0, 0.0], [0.0, -1e-9]], dtype=DOUBLE)
    flat = torch.ones((2, 2), dtype=DOUBLE)
    broken = torch.tensor([[math.nan, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    assert [covariance_from(bad) for bad in (saddle, flat, broken)] == [None, None, None]


def test_unknowns_of_which_only_the_sum_is_known_are_named() -> None:
    information = torch.tensor([[4.0, 0.0, 0.0], [0.0, 900.0, 900.0], [0.0, 900.0, 900.0]], dtype=torch.float64)
    assert covariance_from(information) is None
    names = name_weakest(information, ["CL", "V", "F"])
    assert sorted(names.split(", ")) == ["F", "V"]
    assert describe_unidentified(names).endswith(f"data say next to nothing about {names}")


def test_an_unknown_that_the_likelihood_bends_up_in_is_named() -> None:
    information = torch.diag(torch.tensor([4.0, -0.1, 9.0], dtype=torch.float64))
    assert name_weakest(information, ["CL", "V", "F"]) == "V"
    assert name_weakest(torch.full((2, 2), torch.nan, dtype=torch.float64), ["CL", "V"]) == ""
