"""Evenly spread draws: quantiles, errors that their two halves tell, and the draws for all that some needed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conjugate_case import ConjugateCase, Linear
from scipy.stats import gamma
from scipy.stats import t as student
from torch.distributions import Normal

from nlme_sbi.numerics.t_mixtures import Mixtures, gamma_3_quantile
from nlme_sbi.population import Exact, GaussianPopulation, fit_population
from nlme_sbi.population.estimators.exact_draws import ExactDraws
from nlme_sbi.population.fitting import likelihood_search

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_quantiles_of_the_gamma_distribution_are_those_of_scipy() -> None:
    probability = np.concatenate(
        [10.0 ** np.arange(-12, -1), np.linspace(0.05, 0.95, 19), 1 - 10.0 ** np.arange(-12, -1)]
    )
    found = gamma_3_quantile(torch.tensor(probability))
    np.testing.assert_allclose(found.numpy(), gamma(3).ppf(probability), rtol=1e-6)


def test_two_halves_tell_the_error_which_is_smaller_than_that_of_random_draws() -> None:
    # 3000 individuals are 3000 repetitions of one integral, a normal density over a mixture of two components.
    repeats, draws = 3000, 64
    counts = torch.tensor([[40, 24]]).expand(repeats, -1)
    means = torch.tensor([[[0.0], [3.0]]], dtype=DOUBLE).expand(repeats, -1, -1)
    factors = torch.tensor([[[[1.0]], [[0.5]]]], dtype=DOUBLE).expand(repeats, -1, -1, -1)
    phi, log_q = Mixtures(counts, means, factors).sample(seeded())
    values = (Normal(1.0, 1.2).log_prob(phi[..., 0]) - log_q).exp()  # integrates to 1
    estimates = values.mean(1)
    error = estimates - 1
    assert float(error.mean()) == pytest.approx(0, abs=4 * float(error.std()) / math.sqrt(repeats))
    told = 0.25 * (values[:, ::2].mean(1) - values[:, 1::2].mean(1)).square()
    assert float(told.mean()) == pytest.approx(float(error.square().mean()), rel=0.15)
    assert float(error.square().mean()) < 0.6 * float(values.var(1).mean()) / draws
    # Each draw alone has the distribution of the mixture.
    quarter = phi[:, 5, 0].numpy()
    x = 0.7
    share = 0.625 * student.cdf(x, 6) + 0.375 * student.cdf(x, 6, loc=3.0, scale=0.5)
    assert float((quarter < x).mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / repeats))


@pytest.mark.slow
def test_most_of_the_way_is_gone_with_few_draws_of_some_individuals(monkeypatch: pytest.MonkeyPatch) -> None:
    omega = torch.diag(torch.tensor([0.6, 0.5, 0.0], dtype=DOUBLE).square())
    case = ConjugateCase.simulated([0.5, -0.3, 0.8], omega, individuals=150, seed=3, noise=0.3)
    case.noise[:] = 0.3
    asked: list[tuple[int, int]] = []
    follow = Exact.draws_at

    def watched(self: Exact, *arguments: object) -> ExactDraws:
        state = follow(self, *arguments)  # type: ignore[arg-type]
        asked.append((state.individuals, state.draws))
        return state

    monkeypatch.setattr(Exact, "draws_at", watched)
    monkeypatch.setattr(likelihood_search, "_PART", 40)
    monkeypatch.setattr(likelihood_search, "STARTS_ON", 20)
    found = fit_population(
        case.samples(200, seed=1),
        case.observations,
        GaussianPopulation(constant=("sigma",)),
        generator=seeded(),
        parameters=case.parameters,
        estimator=Exact(simulator=Linear(case, 0.3)),
        accuracy=0.02,
    )
    start = found.population.from_moments(torch.tensor([0.5, -0.3, 0.8], dtype=DOUBLE), omega)
    best, se, _ = case.maximum(found.population, start)
    assert found.converged
    assert float(((found.theta - best).abs() / se).max()) < 0.05
    assert {individuals for individuals, _ in asked} == {20, 40, 150}
    # The wish for precision is met by more draws of everybody.
    assert found.draws > min(draws for individuals, draws in asked if individuals == 150)
    assert max(found.monte_carlo.worst(found.standard_errors, found.population.unknowns.free)) < 0.02
