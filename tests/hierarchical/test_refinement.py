"""Refined posteriors of individuals: densities against closed forms, from a network that knows nothing."""

from __future__ import annotations

import math

import pytest
import torch
from linear_hierarchy import NOISE, linear_model, simulated

from nlme_sbi.hierarchical.population import FittedPopulation
from nlme_sbi.hierarchical.predictions import draws_near, log_densities, log_weights_given, measured_parameters
from nlme_sbi.hierarchical.regressors import regressors_of

ALONE = {
    "own": {"level": "individual", "mean": 0.0, "sd": 2.0},
    "common": {"level": "constant", "value": 0.0},
    "device": {"level": "constant", "value": 0.0},
    "sd": {"level": "constant", "value": math.log(NOISE)},
}
MEAN, SD = 0.9, 0.3  # of the population, natural scale: priors have 0 and 2


@pytest.mark.slow
def test_densities_and_posteriors_of_refined_individuals_are_exact() -> None:
    observations = simulated(6, 20)
    model = linear_model(observations, parameters=ALONE, start=0.02)  # far too narrow, and at the prior's mean
    individuals = model.individuals(observations, 1)
    population = FittedPopulation(
        regressors_of(observations.design, groups=False, covariates=False, squares=False),
        torch.tensor([[MEAN / 2]], dtype=torch.float64),
        torch.zeros((1, 1, 1, 1), dtype=torch.float64),
        torch.tensor([[(SD / 2) ** 2]], dtype=torch.float64),
        torch.zeros((0, 1), dtype=torch.float64),
    )
    made = draws_near(model, population, individuals, 3000, 3, refine_steps=150, priors=True)
    vague, given = log_densities(population, individuals, made)
    values, times = observations.values[..., 0], 20
    for found, mean, sd in ((vague, 0.0, 2.0), (given, MEAN, SD)):
        covariance = NOISE**2 * torch.eye(times, dtype=torch.float64) + sd**2
        law = torch.distributions.MultivariateNormal(torch.full((times,), mean, dtype=torch.float64), covariance)
        # Of 3000 draws 600 are effective at least: the log of their mean weight has a standard error below 0.04.
        torch.testing.assert_close(found, law.log_prob(values), atol=0.2, rtol=0)
    effective = 1 / torch.softmax(log_weights_given(population, individuals, made), 1).square().sum(1)
    assert bool((effective > 600).all())
    # Those alone whom the network finds: none, it looks elsewhere.
    alone = draws_near(model, population, individuals, 2000, 3, refine_steps=0)
    assert float(log_densities(population, individuals, alone)[1].sum()) < float(given.sum()) - 10
    kept = measured_parameters(model, population, individuals, 1000, 3, refine_steps=150)
    precision = times / NOISE**2 + 1 / SD**2
    wanted = (values.sum(1) / NOISE**2 + MEAN / SD**2) / precision
    own = kept.phi[..., 0].double()
    torch.testing.assert_close(own.mean(1), wanted, atol=0.03, rtol=0)
    torch.testing.assert_close(own.std(1), torch.full((6,), precision**-0.5, dtype=torch.float64), atol=0.02, rtol=0)
