"""Linear Gaussian individuals with one noise level, whose simulator has a likelihood; and one that has none."""

from __future__ import annotations

from dataclasses import replace

import torch
from conjugate_case import ConjugateCase, Linear, parameter_space

DOUBLE = torch.float64
MEAN = [0.5, -0.3, 0.8]
OMEGA = torch.diag(torch.tensor([0.6, 0.5, 0.4], dtype=DOUBLE).square())
NO_SIGMA = torch.diag(torch.tensor([0.6, 0.5, 0.0], dtype=DOUBLE).square())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_case(omega: torch.Tensor, *, individuals: int, seed: int) -> tuple[ConjugateCase, Linear]:
    case = ConjugateCase.simulated(MEAN, omega, individuals=individuals, seed=seed, noise=0.3)
    case = replace(case, noise=torch.full_like(case.noise, 0.3))
    return case, Linear(case, 0.3)


def log_likelihood(case: ConjugateCase, mean: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """Closed form, ``(I,)``."""
    marginal = case.loadings @ omega @ case.loadings.T + torch.diag_embed(case.noise.square())
    return torch.distributions.MultivariateNormal(case.loadings @ mean, marginal).log_prob(case.y)


class Opaque:
    """A simulator without a likelihood."""

    parameters = parameter_space()
    signals, signal_units, time_unit, covariates, takes_doses = ("signal_0",), ("",), "", (), False

    def simulate(self, phi, design, generator):
        raise NotImplementedError
