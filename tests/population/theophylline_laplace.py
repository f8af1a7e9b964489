"""Theophylline at the maximum of its likelihood, prepared by Laplace's estimator."""

from __future__ import annotations

import math
from functools import cache

import torch
from linear_case import DOUBLE, seeded
from theophylline_quadrature import ESTIMATE, RESIDUAL, SDS

from nlme_sbi.cli import compose_config
from nlme_sbi.config.instantiate import instantiate
from nlme_sbi.population import GaussianPopulation, Laplace
from nlme_sbi.population.estimators.laplace_draws import LaplaceDraws
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Observations


@cache
def theophylline(*, full: bool) -> tuple[LaplaceDraws, torch.Tensor, Observations]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(compose_config("fit_population", ["experiment=theophylline"]), resolve=True)
    data = instantiate(plain["data"], where="data").read()
    simulator = instantiate(plain["simulator"], where="simulator")
    prior = instantiate(plain["prior"], where="prior")
    population = GaussianPopulation(constant=("sigma",), covariance="full" if full else "diagonal")
    model = population.bind(simulator.parameters)
    theta = model.from_moments(
        torch.tensor([*ESTIMATE.values(), math.log(RESIDUAL)], dtype=DOUBLE),
        torch.diag(torch.tensor([*SDS.values(), 0.0], dtype=DOUBLE).square()),
    )
    phi = prior.sample(12 * 60, seeded(3)).double().reshape(12, 60, 4)
    samples = PosteriorSamples(names=prior.names, phi=phi, log_q=torch.zeros(12, 60, dtype=DOUBLE), prior=prior)
    estimator = Laplace(simulator=simulator)
    first = estimator.prepare(samples, data, model, seeded())
    return estimator.draws_at(samples, data, theta, first, seeded()), theta, data
