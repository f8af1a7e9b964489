"""A small tractable model, data from it and from another one, and a network of fixed random features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nlme_sbi.individual_model.mechanistic import MechanisticSimulator, times_for
from nlme_sbi.individual_model.noise import Additive
from nlme_sbi.individual_model.priors import GaussianPrior
from nlme_sbi.parameters import Parameter, ParameterSpace
from nlme_sbi.types import Design, Observations

MEAN, SD = torch.tensor([1.5, -0.5, -2.0]), torch.tensor([0.3, 0.3, 0.0])
TIMES = torch.linspace(0.1, 6.0, 24)


class Decay(MechanisticSimulator):
    """y = size exp(-rate t) + sd eps, a second signal (if any) half as large."""

    parameters = ParameterSpace((Parameter("size"), Parameter("rate", "1/h"), Parameter("sd")))
    noise = Additive(sd="sd")

    def __init__(self, signals: int = 1) -> None:
        self.signals = tuple(f"signal_{place}" for place in range(signals))
        self.signal_units = ("",) * signals

    def predict(self, phi: Tensor, design: Design) -> Tensor:
        size, rate, _ = phi.exp()[..., None, :].unbind(-1)
        curve = size * torch.exp(-rate * times_for(phi, design))
        return torch.stack([curve / (1 + place) for place in range(len(self.signals))], -1)


class Black:
    """The same, known by its simulations only."""

    parameters, signals, signal_units = Decay.parameters, ("signal_0",), ("",)
    time_unit, covariates, takes_doses = "h", (), False

    def simulate(self, phi: Tensor, design: Design, generator: torch.Generator):
        return Decay().simulate(phi, design, generator)


PRIOR = GaussianPrior(
    {"size": {"mean": 1.0, "sd": 1.0}, "rate": {"mean": 0.0, "sd": 1.0}, "sd": {"mean": -1.5, "sd": 1.0}}
)


@dataclass(frozen=True, eq=False)
class Features:
    """Forty random features of the data in place of a trained summary network."""

    simulator: object
    prior: GaussianPrior = PRIOR

    def summarize(self, observations: Observations) -> Tensor:
        values = observations.values.flatten(1).double()
        weights = torch.randn((values.shape[1], 40), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return torch.tanh(values @ weights / math.sqrt(values.shape[1]))


def individuals(count: int, generator: torch.Generator) -> Tensor:
    """Parameters from a population far narrower than the prior, ``(count, 3)``."""
    return (MEAN + SD * torch.randn((count, 3), generator=generator)).double()


def observed(values: Tensor, mask: Tensor | None = None) -> Observations:
    count, _, signals = values.shape
    design = Design.regular(TIMES.double(), count, signals)
    if mask is not None:
        design = replace(design, observed=mask, times=design.times.clone())
        values = torch.where(mask, values, 0.0)
    names = tuple(f"cell_{row}" for row in range(count))
    return Observations(names, values, design, Decay(signals).signals, ("",) * signals, "h")


def well_specified(
    count: int, generator: torch.Generator, *, signals: int = 1, missing: float = 0.0, log_sd: float = -2.0
) -> Observations:
    phi = individuals(count, generator)
    phi[:, 2] = log_sd
    values = Decay(signals).simulate(phi, Design.regular(TIMES.double(), count, signals), generator).values
    mask = torch.rand(values.shape, generator=generator) >= missing if missing else None
    return observed(values, mask)


def with_a_plateau(count: int, generator: torch.Generator) -> Observations:
    """From another mechanism: a third of the signal does not decay."""
    phi = individuals(count, generator)
    size, rate, sd = phi.exp()[:, None, :].unbind(-1)
    curve = size * (1 / 3 + 2 / 3 * torch.exp(-3 * rate * TIMES))
    return observed((curve + sd * torch.randn(curve.shape, generator=generator))[..., None].double())


def rough_draws(observations: Observations, generator: torch.Generator) -> Tensor:
    """Where fits begin: the prior's own draws, as a poor network would give them."""
    shape = (len(observations), 60)
    return PRIOR.sample(shape[0] * shape[1], generator).reshape(*shape, 3)
