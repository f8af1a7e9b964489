"""What a hierarchical model says of measurements around its prediction: independent, or correlated in time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.config.wording import check_choice
from nlme_sbi.hierarchical.posterior.encoder import PACE
from nlme_sbi.individual_model.mechanistic import MechanisticSimulator
from nlme_sbi.individual_model.noise.correlated import correlated_log_prob
from nlme_sbi.types import Censoring, Observations

_LEAST_NUGGET = 1e-3  # below it a factor of the correlation has no digits left in single precision


@dataclass(frozen=True)
class Residuals:
    """How residuals of one signal at different times hang together.

    Args:
        correlation: "none", or "exponential" in time with a nugget; correlation time and nugget are estimated for
            each signal, by maximum likelihood.
        time: correlation time that is begun with, in the data's unit.
        nugget: share of the variance that is begun with as independent.
    """

    correlation: Literal["none", "exponential"] = "none"
    time: float = 3.0
    nugget: float = 0.2

    def __post_init__(self) -> None:
        check_choice("residuals.correlation", self.correlation, ("none", "exponential"))
        if not self.time > 0 or not _LEAST_NUGGET < self.nugget < 1:
            raise ValueError(
                f"residuals.time must be positive and residuals.nugget lie between {_LEAST_NUGGET:g} and 1; got "
                f"{self.time:g} and {self.nugget:g}."
            )

    def build(self, simulator: MechanisticSimulator, observations: Observations) -> IndependentResiduals:
        """The likelihood around a simulator's prediction.

        Raises:
            ValueError: correlated residuals of noise that is not Gaussian, or of censored measurements.
        """
        if self.correlation == "none":
            return IndependentResiduals()
        if not simulator.noise.is_gaussian:
            raise ValueError(
                f"residuals.correlation=exponential needs Gaussian noise; {type(simulator.noise).__name__} is not. "
                "Choose residuals.correlation=none, or other noise."
            )
        _refuse_censored(observations)
        return CorrelatedResiduals(self, len(simulator.signals))


def _refuse_censored(observations: Observations) -> None:
    if observations.censoring is not None:
        count = int(((observations.censoring != int(Censoring.NONE)) & observations.design.observed).sum())
        if count:
            raise ValueError(
                f"{count} measurements are censored, whose probability under correlated residuals is an integral over "
                "all of them at once, which is not implemented. Choose residuals.correlation=none, take their bounds "
                "for values (preparation.saturated=value), or leave them out (preparation.saturated=missing)."
            )


class IndependentResiduals(nn.Module):
    """Every measurement is independent given the prediction: the simulator's own likelihood, censoring included."""

    def forward(
        self, simulator: MechanisticSimulator, observations: Observations, phi: Float[Tensor, "I *batch D"]
    ) -> Float[Tensor, I * batch]:
        """Log likelihood of every individual and draw."""
        return simulator.log_likelihood(observations, phi)

    def described(self, signals: tuple[str, ...]) -> dict[str, Mapping[str, float]]:
        """What was estimated, by signal."""
        del signals
        return {}


class CorrelatedResiduals(IndependentResiduals):
    """Ornstein-Uhlenbeck residuals with a nugget; times and nuggets of the signals are weights of this module."""

    def __init__(self, settings: Residuals, signals: int) -> None:
        super().__init__()
        start = (settings.nugget - _LEAST_NUGGET) / (1 - _LEAST_NUGGET)
        self.slow_time = nn.Parameter(torch.full((signals,), math.log(settings.time) / PACE))
        self.slow_nugget = nn.Parameter(torch.full((signals,), math.log(start / (1 - start)) / PACE))

    @property
    def correlation_time(self) -> Float[Tensor, " C"]:
        """In the data's unit."""
        return (PACE * self.slow_time).exp()

    @property
    def nugget(self) -> Float[Tensor, " C"]:
        """Share of the variance that is independent."""
        return _LEAST_NUGGET + (1 - _LEAST_NUGGET) * torch.sigmoid(PACE * self.slow_nugget)

    def forward(
        self, simulator: MechanisticSimulator, observations: Observations, phi: Float[Tensor, "I *batch D"]
    ) -> Float[Tensor, I * batch]:
        prediction = simulator.predict(phi, observations.design)
        noise, parameters = simulator.noise, simulator.noise_parameters(phi, observations.design)
        sd = noise.standard_deviation(prediction, parameters)
        spread = (len(observations), *(1,) * (prediction.ndim - 3), *observations.values.shape[1:])
        values, observed = observations.values.reshape(spread), observations.design.observed.reshape(spread)
        residual = (noise.transform(values) - noise.transform(prediction)) / sd
        log_sd, lost = torch.log(sd), None
        regular = bool(torch.isfinite(residual.detach().sum()) & (sd > 0).all() & observed.all())
        if not regular:  # what is no number, or was not measured, must not reach the gradients
            location = noise.transform(prediction)
            possible = torch.isfinite(location) & torch.isfinite(sd) & (sd > 0)
            sd = torch.where(possible, sd, 1.0)
            residual = torch.where(possible & observed, (noise.transform(values) - location) / sd, 0.0)
            log_sd, lost = torch.where(observed, torch.log(sd), 0.0), (observed & ~possible).any(-1).any(-1)
        slopes = torch.as_tensor(noise.log_slope(values))
        volume = (torch.where(observed, slopes, 0.0) - log_sd).expand(prediction.shape).sum((-2, -1))
        density = volume + correlated_log_prob(
            residual, observations.design.times, observations.design.observed, self.correlation_time, self.nugget
        )
        return density if lost is None else torch.where(lost, -torch.inf, density)

    def described(self, signals: tuple[str, ...]) -> dict[str, Mapping[str, float]]:
        times, nuggets = self.correlation_time.tolist(), self.nugget.tolist()
        return {
            "correlation_time": dict(zip(signals, times, strict=True)),
            "nugget": dict(zip(signals, nuggets, strict=True)),
        }
