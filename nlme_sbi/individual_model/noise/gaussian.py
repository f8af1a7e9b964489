"""Noise that is Gaussian after a monotone map: ``h(y) = h(f) + sd(f) eps``.

An SD or coefficient of variation is the name of a parameter, one name a signal, or a number where it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.noise.model import (
    Names,
    NoiseModel,
    Number,
    flat_names,
    parameter_column,
    require_known,
)
from nlme_sbi.individual_model.noise.normal_tails import bound_score, log_ndtr_difference

POSITIVE_REMEDY = (
    "Mark values below the limit of quantification as censored, leave them out, or take additive or combined noise."
)


@dataclass(frozen=True)
class Additive(NoiseModel):
    """``y = f + sd eps``."""

    sd: Names | Number

    def __post_init__(self) -> None:
        require_known(self, "sd")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.sd)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameter_column(self.sd, prediction, parameters)


@dataclass(frozen=True)
class Proportional(NoiseModel):
    """``y = f (1 + cv eps)``. It cannot explain a measurement where ``f`` is zero; combined models can."""

    cv: Names | Number

    def __post_init__(self) -> None:
        require_known(self, "cv")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.cv)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameter_column(self.cv, prediction, parameters) * prediction.abs()


@dataclass(frozen=True)
class Combined1(NoiseModel):
    """``y = f + (sd + cv f) eps``."""

    sd: Names | Number
    cv: Names | Number

    def __post_init__(self) -> None:
        require_known(self, "sd", "cv")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.sd, self.cv)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return (
            parameter_column(self.sd, prediction, parameters)
            + parameter_column(self.cv, prediction, parameters) * prediction.abs()
        )


@dataclass(frozen=True)
class Combined2(NoiseModel):
    """``y = f + sqrt(sd^2 + cv^2 f^2) eps``."""

    sd: Names | Number
    cv: Names | Number

    def __post_init__(self) -> None:
        require_known(self, "sd", "cv")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.sd, self.cv)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.hypot(
            parameter_column(self.sd, prediction, parameters),
            parameter_column(self.cv, prediction, parameters) * prediction,
        )


@dataclass(frozen=True)
class Exponential(NoiseModel):
    """``y = f exp(sd eps)``: log-normal around a positive prediction, which is the median."""

    sd: Names | Number

    def __post_init__(self) -> None:
        require_known(self, "sd")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.sd)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameter_column(self.sd, prediction, parameters)

    def transform(self, values: Tensor) -> Tensor:
        return torch.where(values > 0, torch.log(torch.where(values > 0, values, 1.0)), -torch.inf)

    def inverse(self, transformed: Tensor) -> Tensor:
        return transformed.exp()

    def log_slope(self, values: Tensor) -> Tensor:
        return -torch.log(torch.where(values > 0, values, 1.0))

    @property
    def domain(self) -> str:
        """What values can be."""
        return "positive numbers"

    @property
    def remedy(self) -> str:
        """What to do about others."""
        return POSITIVE_REMEDY


@dataclass(frozen=True)
class Power(NoiseModel):
    """``y = f + sd |f|^power eps``. Like proportional error, it cannot explain a measurement where ``f`` is zero.

    Args:
        sd: SD where the prediction is 1.
        power: a number, or the name of a parameter; 0 is additive, 1 proportional error.
    """

    sd: Names | Number
    power: Number | Names

    def __post_init__(self) -> None:
        require_known(self, "sd")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.sd, self.power)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        size = prediction.abs()
        there = size > 0  # the power of 0 has no derivative
        power = parameter_column(self.power, prediction, parameters)
        grown = torch.where(there, torch.exp(power * torch.log(torch.where(there, size, 1.0))), 0.0)
        return parameter_column(self.sd, prediction, parameters) * grown


@dataclass(frozen=True)
class BoxCox(NoiseModel):
    r"""Both sides transformed: :math:`h(y) = h(f) + sd(f)\,\varepsilon` with :math:`h(y) = (y^\lambda - 1)/\lambda`.

    For values and predictions that are positive. With an exponent other than 0, ``h`` maps onto a half-line, where the
    Gaussian is truncated, so that densities integrate to 1.

    Args:
        error: of the transformed values: additive for one SD on their scale; others take the prediction as it is.
        exponent: lambda, a number: 0 is the logarithm (log-normal error), 0.5 the square root, 1 no transformation.

    Source: Carroll and Ruppert (1984), J. Am. Stat. Assoc. 79:321.
    """

    error: NoiseModel
    exponent: Number

    def __post_init__(self) -> None:
        if not self.error.is_gaussian or type(self.error).transform is not NoiseModel.transform:
            raise ValueError(
                f"BoxCox transforms by itself: its error must be additive, proportional, combined or power, not "
                f'{type(self.error).__name__}. Write BoxCox(Additive(sd="sd"), exponent={self.exponent:g}).'
            )

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.error.parameters

    @property
    def is_gaussian(self) -> bool:
        return self.exponent == 0

    @property
    def domain(self) -> str:
        """What values can be."""
        return "positive numbers"

    @property
    def remedy(self) -> str:
        """What to do about others."""
        return POSITIVE_REMEDY

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.error.standard_deviation(prediction, parameters)

    def transform(self, values: Tensor) -> Tensor:
        positive = values > 0
        logs = torch.log(torch.where(positive, values, 1.0))
        changed = logs if self.exponent == 0 else torch.expm1(self.exponent * logs) / self.exponent
        return torch.where(positive, changed, -torch.inf)

    def inverse(self, transformed: Tensor) -> Tensor:
        if self.exponent == 0:
            return transformed.exp()
        return torch.exp(torch.log1p(self.exponent * transformed) / self.exponent)

    def log_slope(self, values: Tensor) -> Tensor:
        return (self.exponent - 1) * torch.log(torch.where(values > 0, values, 1.0))

    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        if self.exponent == 0:
            return super().sample(prediction, parameters, generator=generator)
        exact = prediction.double()
        sd = self.standard_deviation(exact, {name: value.double() for name, value in parameters.items()})
        share = torch.rand(exact.shape, generator=generator, device=exact.device, dtype=exact.dtype).clamp_min(1e-300)
        score = torch.special.ndtri(share * torch.special.ndtr(self._room(exact, sd)))
        noise = -score if self.exponent > 0 else score
        return self.inverse(self.transform(exact) + sd * noise).to(prediction.dtype)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        density = super().log_prob(values, prediction, parameters)
        if self.exponent == 0:
            return density
        possible = torch.isfinite(density)
        return torch.where(possible, density - self._log_mass(prediction, parameters, possible), -torch.inf)

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        if self.exponent == 0:
            return super().log_interval(lower, upper, prediction, parameters)
        sd, location = self.standard_deviation(prediction, parameters), self.transform(prediction)
        possible = (sd > 0) & torch.isfinite(location)
        sd, location = torch.where(possible, sd, 1.0), torch.where(possible, location, 0.0)
        room = self._room(torch.where(possible, prediction, 1.0), sd)
        low, high = (bound_score(self.transform(bound), location, sd) for bound in (lower, upper))
        if self.exponent > 0:  # nothing lies below the transformed 0
            low = torch.where(lower > 0, low, -room)
        else:  # nor above the transformed infinity
            high = torch.where(torch.isfinite(upper), high, room)
        found = log_ndtr_difference(low, high) - log_ndtr_difference(torch.full_like(room, -torch.inf), room)
        return torch.where(possible & (upper > 0), found, -torch.inf)

    def _room(self, prediction: Tensor, sd: Tensor) -> Tensor:
        """Distance of the prediction from the end of the half-line, in SDs."""
        positive = prediction > 0
        grown = torch.exp(self.exponent * torch.log(torch.where(positive, prediction, 1.0)))
        return grown / (abs(self.exponent) * sd)

    def _log_mass(self, prediction: Tensor, parameters: Mapping[str, Tensor], possible: Tensor) -> Tensor:
        """Log of the probability of the Gaussian on the half-line."""
        sd = self.standard_deviation(prediction, parameters)
        safe = torch.where(sd > 0, sd, 1.0)
        room = torch.where(possible, self._room(prediction, safe), 1.0)
        return log_ndtr_difference(torch.full_like(room, -torch.inf), room)
