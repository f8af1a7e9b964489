r"""Gaussian noise whose residuals are correlated in time, with correlation time and nugget among the parameters.

:math:`h(y_j) = h(f_j) + s_j\,(\sqrt{1 - \nu}\,o(t_j) + \sqrt{\nu}\,\varepsilon_j)` with an Ornstein-Uhlenbeck process
*o* of variance 1 and correlation :math:`e^{-|t - t'|/\tau}`. The process is Markovian, so that a Kalman filter gives
the density of every measurement given those before it, at a cost that grows with their number and not with its cube,
for times, correlation times and nuggets of every draw's own.

Source: Jones (1993), Longitudinal Data with Serial Correlation: A State-Space Approach, chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.noise.model import TIMES, Names, NoiseModel, Number, flat_names, parameter_column

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class CorrelatedInTime(NoiseModel):
    """Noise of any Gaussian kind with residuals of each signal correlated in time; signals are independent.

    Args:
        error: additive, proportional, combined, power, exponential, Box-Cox, or one of these for each signal.
        correlation_time: parameter, one name a signal, or a known time, in the unit of the times.
        nugget: share of the variance that is independent from one measurement to the next, between 0 and 1.
    """

    error: NoiseModel
    correlation_time: Names | Number
    nugget: Names | Number

    def __post_init__(self) -> None:
        if not self.error.is_gaussian or isinstance(self.error, CorrelatedInTime):
            raise ValueError(
                "Residuals correlated in time need noise that is Gaussian on some scale (additive, proportional, "
                f"combined, power, exponential); {type(self.error).__name__} is not. Choose such noise, or independent "
                "residuals (residuals.correlation=none)."
            )
        for name, most in (("correlation_time", math.inf), ("nugget", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or (isinstance(value, Number) and not 0 < value <= most):
                raise ValueError(f"A known {name} must be positive and at most {most:g}; got {value!r}.")

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.error.parameters, *flat_names(self.correlation_time, self.nugget))))

    @property
    def reads_times(self) -> bool:
        return True

    @property
    def is_independent(self) -> bool:
        return False

    @property
    def domain(self) -> str:
        """The possible values, for messages."""
        return self.error.domain

    @property
    def remedy(self) -> str:
        """What to do about other values, for messages."""
        return self.error.remedy

    def of_signal(self, place: int) -> NoiseModel:
        """The model of one signal alone, whose marginal distributions are the same."""
        return self.error.of_signal(place)

    def can_make(self, values: Tensor) -> Bool[Tensor, " ..."]:
        return self.error.can_make(values)

    def can_lie_between(self, lower: Tensor, upper: Tensor) -> Bool[Tensor, " ..."]:
        return self.error.can_lie_between(lower, upper)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.error.standard_deviation(prediction, parameters)

    def transform(self, values: Tensor) -> Tensor:
        return self.error.transform(values)

    def inverse(self, transformed: Tensor) -> Tensor:
        return self.error.inverse(transformed)

    def log_slope(self, values: Tensor) -> Tensor | float:
        return self.error.log_slope(values)

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        """Of each measurement by itself, whatever the others are."""
        return self.error.log_interval(lower, upper, prediction, parameters)

    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        shape, options = prediction.shape, {"dtype": prediction.dtype, "device": prediction.device}
        noise = torch.randn((2, *shape), generator=generator, **options)  # type: ignore[call-overload]
        kept, nugget = self._kept_and_nugget(prediction, parameters)
        process: list[Tensor] = []
        for place in range(shape[-2]):
            fresh = noise[0, ..., place, :]
            if place:
                share = kept[..., place, :]
                fresh = share * process[-1] + (1 - share.square()).clamp_min(0.0).sqrt() * fresh
            process.append(fresh)
        residual = (1 - nugget).sqrt() * torch.stack(process, -2) + nugget.sqrt() * noise[1]
        sd = self.standard_deviation(prediction, parameters)
        return self.inverse(self.transform(prediction) + sd * residual)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        """Log density of every measurement given those of its signal before it, where all are observed."""
        observed = torch.ones_like(prediction[..., :1, :1], dtype=torch.bool).expand(prediction.shape)
        return self.log_prob_in_order(values, prediction, parameters, observed)

    def log_prob_in_order(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
        observed: Bool[Tensor, "*#batch T C"],
    ) -> Float[Tensor, "*batch T C"]:
        """As :meth:`log_prob`; what is not ``observed`` counts 0 and says nothing of what follows.

        The sum over an individual is the log density of all its measurements; single terms depend on their order.
        """
        scaled, sd, possible = self._scaled(values, prediction, parameters, observed)
        apart, variance = self._filtered(scaled, prediction, parameters, observed)
        density = -0.5 * (apart.square() / variance + variance.log()) - sd.log() - _HALF_LOG_TWO_PI
        density = density + self.log_slope(values)
        return torch.where(observed, torch.where(possible, density, -torch.inf), 0.0)

    def decorrelated(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
        observed: Bool[Tensor, "*#batch T C"],
    ) -> Float[Tensor, "*batch T C"]:
        """Residuals given those before them, in units of their SDs: independent and standard normal under the model."""
        scaled = self._scaled(values, prediction, parameters, observed)[0]
        apart, variance = self._filtered(scaled, prediction, parameters, observed)
        return apart / variance.sqrt()

    def _scaled(
        self, values: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor], observed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals in SDs, the SDs, and where the noise model has a density; harmless numbers elsewhere."""
        sd = self.standard_deviation(prediction, parameters)
        location, measured = self.transform(prediction), self.transform(values)
        possible = (sd > 0) & torch.isfinite(location) & torch.isfinite(measured)
        there = possible & observed
        sd = torch.where(possible, sd, 1.0)
        return (torch.where(there, measured, 0.0) - torch.where(there, location, 0.0)) / sd, sd, possible

    def _kept_and_nugget(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is left of the process since the time before, ``(..., T, C)``, and the nugget, ``(..., 1, C)``."""
        times = parameters[TIMES].to(prediction)
        # Rows of a design are padded after their last measurement: what lies behind is of no consequence.
        apart = torch.diff(times, dim=-1, prepend=times[..., :1]).clamp_min(0.0)[..., None]
        span = parameter_column(self.correlation_time, prediction, parameters)
        nugget = parameter_column(self.nugget, prediction, parameters)
        return torch.exp(-apart / span), nugget.reshape(1, 1) if nugget.ndim == 0 else nugget

    def _filtered(
        self, scaled: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor], observed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Residuals minus what those before them predict, and the variances of that, ``(..., T, C)``."""
        kept, nugget = self._kept_and_nugget(prediction, parameters)
        own = nugget[..., 0, :]
        common = 1 - own
        mean, spread = torch.zeros_like(scaled[..., 0, :]), common
        apart, variances = [], []
        for place in range(scaled.shape[-2]):
            share, there = kept[..., place, :], observed[..., place, :]
            mean, spread = share * mean, common + share.square() * (spread - common)
            variance = spread + own
            off = scaled[..., place, :] - mean
            apart.append(off)
            variances.append(variance.expand(off.shape))
            gain = torch.where(there, spread / variance, 0.0)
            mean, spread = mean + gain * off, spread * (1 - gain)
        return torch.stack(apart, -2), torch.stack(variances, -2)
