"""Noise with heavy tails, for fits that are robust against outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.individual_model.noise.model import Names, NoiseModel, Number, flat_names, parameter_column
from nlme_sbi.individual_model.noise.normal_tails import bound_score
from nlme_sbi.numerics.incomplete_functions import log_difference, log_t_lower, t_log_density

_FARTHEST = 1e100  # scores beyond count as infinite; their squares would overflow


@dataclass(frozen=True)
class StudentT(NoiseModel):
    """``h(y) = h(f) + s(f) t`` with Student's ``t``, and map ``h`` and scale ``s`` those of a Gaussian model.

    ``StudentT(Additive(sd="sd"), degrees_of_freedom=4)``: ``sd`` is then the scale of the distribution; its SD is
    ``sqrt(nu/(nu - 2))`` times that, and infinite up to two degrees of freedom.

    Args:
        error: Gaussian model, the limit of many degrees of freedom.
        degrees_of_freedom: a positive number, or the name of a parameter.
    """

    error: NoiseModel
    degrees_of_freedom: Number | Names

    def __post_init__(self) -> None:
        if not self.error.is_gaussian:
            raise ValueError(
                f"StudentT needs a Gaussian model to take map and scale from, not {type(self.error).__name__}. Write "
                'StudentT(Additive(sd="sd"), degrees_of_freedom=4).'
            )
        given = self.degrees_of_freedom
        if isinstance(given, Number) and not given > 0:
            raise ValueError(f"degrees_of_freedom must be positive; got {given}.")

    @property
    def reads_times(self) -> bool:
        return self.error.reads_times

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.error.parameters, self.degrees_of_freedom)

    @property
    def is_gaussian(self) -> bool:
        return False

    @property
    def domain(self) -> str:
        """The possible values, for messages."""
        return self.error.domain

    @property
    def remedy(self) -> str:
        """What to do about other values, for messages."""
        return self.error.remedy

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The scale of the distribution, in which residuals are measured."""
        return self.error.standard_deviation(prediction, parameters)

    def transform(self, values: Tensor) -> Tensor:
        return self.error.transform(values)

    def inverse(self, transformed: Tensor) -> Tensor:
        return self.error.inverse(transformed)

    def log_slope(self, values: Tensor) -> Tensor | float:
        return self.error.log_slope(values)

    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        """Measurements by Bailey's polar method (1994, Math. Comput. 62:779)."""
        degrees = parameter_column(self.degrees_of_freedom, prediction, parameters).double()
        size, angle = (
            torch.rand(prediction.shape, generator=generator, device=prediction.device, dtype=torch.float64)
            for _ in range(2)
        )
        # nu (U^(-2/nu) - 1), by expm1 so that many degrees of freedom lose nothing.
        radius = (degrees * torch.expm1(-2 / degrees * torch.log(size.clamp_min(1e-300)))).sqrt()
        noise = (radius * torch.cos(2 * torch.pi * angle)).to(prediction.dtype)
        return self.inverse(self.transform(prediction) + self.standard_deviation(prediction, parameters) * noise)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        scale, location = self.standard_deviation(prediction, parameters), self.transform(prediction)
        measured = self.transform(values)
        possible = (scale > 0) & torch.isfinite(location) & torch.isfinite(measured)
        scale = torch.where(possible, scale, 1.0)
        residual = (torch.where(possible, measured, 0.0) - torch.where(possible, location, 0.0)) / scale
        degrees = parameter_column(self.degrees_of_freedom, prediction, parameters)
        density = t_log_density(residual, degrees) - torch.log(scale) + self.log_slope(values)
        return torch.where(possible, density, -torch.inf)

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        scale, location = self.standard_deviation(prediction, parameters), self.transform(prediction)
        possible = (scale > 0) & torch.isfinite(location)
        scale, location = torch.where(possible, scale, 1.0), torch.where(possible, location, 0.0)
        low, high = (bound_score(self.transform(bound), location, scale) for bound in (lower, upper))
        degrees = parameter_column(self.degrees_of_freedom, prediction, parameters)
        mirrored = low > 0  # digits are kept in both tails by symmetry
        bottom = _log_below(torch.where(mirrored, -high, low), degrees)
        top = _log_below(torch.where(mirrored, -low, high), degrees)
        return torch.where(possible, log_difference(bottom, top), -torch.inf)


def _log_below(score: Tensor, degrees: Tensor) -> Tensor:
    within = score.abs() < _FARTHEST
    found = log_t_lower(torch.where(within, score, 0.0), degrees)
    return torch.where(within, found, torch.where(score < 0, -torch.inf, 0.0))
