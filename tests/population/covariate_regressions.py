"""Ninety people whose parameters are measured directly, and fits of them beside regressions in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from conjugate_case import parameter_space, with_covariates
from torch import Tensor
from torch.distributions import Normal

from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.population import Exact, GaussianPopulation, PopulationFit, fit_population
from nlme_sbi.posteriors import PosteriorSamples
from nlme_sbi.types import Design, Observations

DOUBLE = torch.float64
NOISE = 0.2
COUNT = 90


class Direct:
    """``y = phi + noise``, one measurement a parameter."""

    def __init__(self, size: int) -> None:
        self.parameters = parameter_space(("uptake", "decay", "sigma")[:size])
        self.signals = tuple(f"signal_{place}" for place in range(size))
        self.signal_units, self.time_unit, self.covariates, self.takes_doses = ("",) * size, "", (), False

    def simulate(self, phi, design, generator):
        raise NotImplementedError

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        return phi[..., None, :]

    def log_likelihood(self, data: Observations, phi: Tensor) -> Tensor:
        values = data.values.reshape(len(data), *(1,) * (phi.ndim - 2), -1)
        return Normal(phi, NOISE).log_prob(values).sum(-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def population(seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights, sexes, logs of weight over 70, standard normals ``(I, 3)``."""
    random = np.random.default_rng(seed)
    weight = random.uniform(45, 110, COUNT)
    return weight, random.random(COUNT) < 0.4, np.log(weight / 70), random.standard_normal((COUNT, 3))


def data_of(y: np.ndarray) -> Observations:
    weight, male, _, _ = population()
    sexes = ["m" if one else "f" for one in male]
    return with_covariates({"weight": weight.tolist(), "sex": sexes}, torch.tensor(y))


def fitted(
    data: Observations, model: GaussianPopulation, *, estimator: Callable[..., Any] | None = Exact, draws: int = 800
) -> PopulationFit:
    """With draws of the exact posterior under a wide prior, which knows nothing of the covariates."""
    simulator = Direct(data.values.shape[2])
    names = simulator.parameters.names
    prior = GaussianPrior({name: {"mean": 0.0, "sd": 2.0} for name in names})
    gain = 4 / (4 + NOISE**2)
    noise = torch.randn((len(data), draws, len(names)), generator=seeded(3), dtype=DOUBLE)
    phi = gain * data.values.double() + math.sqrt(gain) * NOISE * noise
    samples = PosteriorSamples(names, phi, torch.zeros(phi.shape[:2], dtype=DOUBLE), prior)
    return fit_population(
        samples,
        data,
        model,
        generator=seeded(),
        parameters=simulator.parameters,
        estimator=None if estimator is None else estimator(simulator=simulator),
        starts=1,
    )


def regression(y: np.ndarray, columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients, their maximum-likelihood standard errors, and the variance of the residuals."""
    z = np.stack([np.ones(len(y)), *columns], 1)
    coefficients, *_ = np.linalg.lstsq(z, y, rcond=None)
    variance = float(np.mean((y - z @ coefficients) ** 2))
    return coefficients, np.sqrt(variance * np.diag(np.linalg.inv(z.T @ z))), variance


@lru_cache
def three_kinds(estimator: Callable[..., Any] = Exact) -> tuple[PopulationFit, dict[str, tuple[float, float]]]:
    """A power on a varying parameter, a categorical effect on another one, an exponential one on a constant."""
    weight, male, logs, normal = population()
    y = np.stack([0.5 + 0.75 * logs, -0.3 + 0.4 * male, 0.8 + 0.01 * (weight - 60)], 1)
    y += np.array([0.3, 0.5, 0.0]) * normal
    y += NOISE * np.random.default_rng(2).standard_normal(y.shape)
    model = GaussianPopulation(
        constant=("sigma",),
        covariates={
            "uptake": {"weight": {"form": "power", "reference": 70}},
            "decay": {"sex": "categorical"},
            "sigma": {"weight": {"form": "exponential", "reference": 60}},
        },
    )
    expected = {}
    for column, (name, regressor, effect) in enumerate(
        [
            ("uptake", logs, "effect.uptake.weight"),
            ("decay", male.astype(float), "effect.decay.sex.m"),
            ("sigma", weight - 60, "effect.sigma.weight"),
        ]
    ):
        coefficients, error, variance = regression(y[:, column], [regressor])
        if name == "sigma":
            error *= NOISE / math.sqrt(variance)  # the noise is known, and there is nothing else
        else:
            # Total variance = omega^2 + noise^2, SE of its log sqrt(2/n); chain rule to log omega.
            omega2 = variance - NOISE**2
            expected[f"log_sd.{name}"] = (
                0.5 * math.log(omega2),
                0.5 * variance / omega2 * math.sqrt(2 / COUNT),
            )
        expected[f"mean.{name}"] = (coefficients[0], error[0])
        expected[effect] = (coefficients[1], error[1])
    return fitted(data_of(y), model, estimator=estimator), expected
