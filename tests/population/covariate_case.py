"""Six people with weight, sex and race, and four parameters on three scales."""

from __future__ import annotations

import torch

from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.population.models.gaussian import BoundGaussian

DOUBLE = torch.float64
WEIGHT = [52.0, 61.0, 70.0, 84.0, 95.0, 77.0]
SEX = ["f", "m", "f", "m", "m", "f"]
RACE = ["a", "b", "c", "a", "b", "c"]
SPACE = ParameterSpace(
    (
        Parameter("rate", "1/h"),
        Parameter("share", "", "logit", lower=0.0, upper=2.0),
        Parameter("shift", "h", "identity"),
        Parameter("sigma", "mg/L"),
    )
)


def random_theta(model: BoundGaussian, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    theta = 0.5 * torch.randn(len(model.unknowns), generator=generator, dtype=DOUBLE)
    theta[model._first_effect :] *= 0.02  # linear factors must stay positive for weights from 52 to 95
    return torch.where(model.unknowns.fixed, model.unknowns.starts, theta)
