"""Maxima that the training prior rules out: named with their height, not taken; taken where the data outweigh it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from theophylline_quadrature import people, quadrature

from nlme_sbi import Exact, GaussianPopulation, GaussianPrior, PopulationFit, fit_population
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population.estimators.likelihood_weighted_prior import LikelihoodWeightedPrior
from nlme_sbi.population.fitting.beyond_prior import _exchanges, find_prior_conflict
from nlme_sbi.types import Observations
from simulators.theophylline import Theophylline

DATA = Path(__file__).resolve().parents[2] / "data" / "theophylline" / "theophylline.csv"
PARAMETERS = ParameterSpace((Parameter("level", "mm", transform="identity"), Parameter("rate", "1/h")))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("gain", "expected"), [(2.0, ("level",)), (6.0, ())])
def test_the_prior_decides_where_it_falls_by_more_than_the_likelihood_rises(
    gain: float, expected: tuple[str, ...]
) -> None:
    population = GaussianPopulation().bind(PARAMETERS)
    prior = GaussianPrior({"level": {"mean": 0.0, "sd": 1.0}, "rate": {"mean": 0.0, "sd": 1.0}})
    source = LikelihoodWeightedPrior(Theophylline(), prior, torch.device("cpu"))
    cov = 0.01 * torch.eye(2, dtype=torch.float64)
    here = population.from_moments(torch.tensor([0.1, 0.3], dtype=torch.float64), cov)
    there = population.from_moments(torch.tensor([3.0, 0.3], dtype=torch.float64), cov)
    assert find_prior_conflict(population, here, there, gain, source) == expected  # the prior falls by 4.5


def test_parameters_of_one_unit_change_places_alone_and_with_those_of_another() -> None:
    names = (("a", "mg/L"), ("k", "1/h"), ("b", "mg/L"), ("m", "1/h"), ("cv", "1"))
    found = _exchanges(ParameterSpace(tuple(Parameter(name, unit) for name, unit in names)))
    assert sorted(found) == sorted([[2, 1, 0, 3, 4], [0, 3, 2, 1, 4], [2, 3, 0, 1, 4]])


def source(absorption: float, volume: float) -> LikelihoodWeightedPrior:
    """Theophylline under a prior about these logs of ka (1/h) and V (L)."""
    centre = {"ka": absorption, "CL": 1.0, "V": volume, "sigma": -0.5}
    prior = GaussianPrior({name: {"mean": value, "sd": 1.0} for name, value in centre.items()})
    return LikelihoodWeightedPrior(Theophylline(), prior, torch.device("cpu"))


def deviance(fit: PopulationFit, data: Observations) -> float:
    """-2 log L at a fit's estimate by quadrature."""
    values = dict(zip(fit.population.unknowns.names, fit.theta.tolist(), strict=True))
    mean = [values[f"mean.{name}"] for name in ("ka", "CL", "V")]
    sd = [math.exp(values.get(f"log_sd.{name}", -math.inf)) for name in ("ka", "CL", "V")]
    residual = math.exp(values["mean.sigma"])
    return -2 * sum(quadrature(person, mean=mean, sd=sd, residual=residual, nodes=11) for person in people(data))


@pytest.mark.slow
def test_flip_flop_is_named_with_its_height_where_the_prior_rules_it_out_and_taken_where_it_does_not() -> None:
    data = Observations.read_events(DATA, signals="concentration", covariates=["WT"], time_unit="h")
    settings = {"estimator": Exact(max_draws=256), "starts": 2}
    usual = fit_population(
        source(0.5, 3.5), data, GaussianPopulation(constant=("sigma",)), generator=seeded(), **settings
    )
    same_ka = GaussianPopulation(constant=("sigma", "ka"))  # the SD of ka is 0 there
    flipped = fit_population(source(-2.4, 0.6), data, same_ka, generator=seeded(), **settings)
    assert usual.converged
    assert flipped.converged
    assert float(flipped.theta[0]) < -2.0
    assert float(usual.theta[0]) > 0.0
    gain = deviance(usual, data) - deviance(flipped, data)
    assert 5.0 < gain < 8.0
    (named,) = [restart for restart in usual.restarts if restart.verdict == "beyond the prior"]
    assert named.differing == ("ka", "V")
    assert -2 * named.below == pytest.approx(gain, abs=0.5)
    assert any("Another maximum" in warning and "ka and V" in warning for warning in usual.warnings)
    assert not any("Another maximum" in warning for warning in flipped.warnings)
    assert "2 of 2 starts reached this maximum" in usual.message
