"""Base class of observation models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.noise.normal_tails import bound_score, log_ndtr_difference

Number = int | float
Names = str | tuple[str, ...]
# Where parameters of a model that reads times have them, (I, ..., T); no parameter is named so.
TIMES = "times of the design"
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class NoiseModel(ABC):
    """Base class of observation models, Gaussian after a monotone map unless overridden.

    To write one, define :attr:`parameters` and :meth:`standard_deviation`, and :meth:`transform`, :meth:`inverse` and
    :meth:`log_slope` where that SD holds on another scale. One that is not Gaussian defines :meth:`sample`,
    :meth:`log_prob` and :meth:`log_interval`, too, and returns False as :attr:`is_gaussian`.
    """

    @property
    def is_gaussian(self) -> bool:
        """Whether noise is Gaussian on the scale of :meth:`transform`; checks of residuals rely on it."""
        return True

    @property
    def is_independent(self) -> bool:
        """Whether measurements are independent given the prediction and the parameters."""
        return True

    @property
    def reads_times(self) -> bool:
        """Whether :meth:`standard_deviation` needs the times of the measurements, as ``parameters[TIMES]``."""
        return False

    @property
    def has_normal_constant(self) -> bool:
        """Whether log densities include the normal constant -log(2 pi) / 2, which an OFV leaves out."""
        return self.is_gaussian

    @property
    def is_count(self) -> bool:
        """Whether values are counts, with probabilities instead of densities."""
        return False

    @property
    def domain(self) -> str:
        """The possible values, for messages."""
        return "numbers"

    @property
    def remedy(self) -> str:
        """What to do about other values, for messages."""
        return "Leave them out, or choose a noise model that allows such values."

    def of_signal(self, place: int) -> NoiseModel:
        """The model of one signal, by its place."""
        del place
        return self

    def can_make(self, values: Tensor) -> Bool[Tensor, " ..."]:
        """Which values are possible, for some prediction."""
        return torch.isfinite(self.transform(values))

    def can_lie_between(self, lower: Tensor, upper: Tensor) -> Bool[Tensor, " ..."]:
        """Whether any possible value lies between two bounds, which may be infinite."""
        return (lower < upper) & (self.transform(upper) > -torch.inf)

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the noise parameters, entries of ``phi``."""

    @abstractmethod
    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """SD on the scale of :meth:`transform`, broadcastable to ``prediction (..., T, C)``: the unit of residuals."""

    def transform(self, values: Tensor) -> Tensor:
        """The scale on which the noise is Gaussian; ``-inf`` for values that the model cannot produce."""
        return values

    def inverse(self, transformed: Tensor) -> Tensor:
        """Back from the scale of :meth:`transform`."""
        return transformed

    def log_slope(self, values: Tensor) -> Tensor | float:
        """Log derivative of :meth:`transform`, the change of variables from the Gaussian density."""
        del values
        return 0.0

    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        """Measurements for noise-free ``prediction (..., T, C)``; each parameter is ``(...)``, natural scale."""
        noise = torch.randn(prediction.shape, generator=generator, device=prediction.device, dtype=prediction.dtype)
        noise *= self.standard_deviation(prediction, parameters)
        noise += self.transform(prediction)
        return self.inverse(noise)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        """Log density of every single measurement, normalised over ``values``.

        ``-inf`` with zero gradients where the model has no density: an SD of zero (a proportional error around a
        prediction of zero), or a value or prediction that is not positive under the exponential model.
        """
        sd = self.standard_deviation(prediction, parameters)
        location, measured = self.transform(prediction), self.transform(values)
        if _all_regular(sd, location, measured):  # the usual case, at half the cost
            residual = (measured - location) / sd
            return self.log_slope(values) - (torch.log(sd) + _HALF_LOG_TWO_PI) - 0.5 * residual.square()
        possible = (sd > 0) & torch.isfinite(location) & torch.isfinite(measured)
        sd = torch.where(possible, sd, 1.0)
        residual = torch.where(possible, measured, 0.0) - torch.where(possible, location, 0.0)
        density = -0.5 * (residual / sd).square() - torch.log(sd) - _HALF_LOG_TWO_PI + self.log_slope(values)
        return torch.where(possible, density, -torch.inf)

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        """``log P(lower < Y < upper)`` for each measurement; infinite bounds are allowed. Stable far in both tails."""
        sd = self.standard_deviation(prediction, parameters)
        location = self.transform(prediction)
        possible = (sd > 0) & torch.isfinite(location)
        sd, location = torch.where(possible, sd, 1.0), torch.where(possible, location, 0.0)
        scores = [bound_score(self.transform(bound), location, sd) for bound in (lower, upper)]
        found = log_ndtr_difference(*scores)
        return torch.where(possible, found, -torch.inf)


@torch.no_grad()
def _all_regular(sd: Tensor, location: Tensor, measured: Tensor) -> bool:
    """Whether every SD is positive and every number finite, by sums, which are cheaper than elementwise tests."""
    try:
        return bool(torch.isfinite(location.sum() + measured.sum() + sd.sum()) & (sd > 0).all())
    except RuntimeError:  # under torch.vmap values cannot be read
        return False


def flat_names(*groups: Names | Number) -> tuple[str, ...]:
    """All names of the noise parameters, each once; numbers have none."""
    named = [group for group in groups if not isinstance(group, Number)]
    names = [name for group in named for name in ((group,) if isinstance(group, str) else group)]
    return tuple(dict.fromkeys(names))


def require_known(noise: NoiseModel, *fields: str) -> None:
    """Refuse a known SD or coefficient of variation that is not a positive, finite number."""
    for field in fields:
        value = getattr(noise, field)
        if isinstance(value, bool) or (isinstance(value, Number) and not 0 < value < math.inf):
            raise ValueError(
                f"{type(noise).__name__}({field}={value!r}): a known {field} must be a positive, finite number; where "
                f'it is to be estimated, name its parameter, {field}="{field}".'
            )


def parameter_column(names: Names | Number, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The parameter of each signal, ``(..., 1, C)`` or ``(..., 1, 1)`` when all signals share it; a number as it is."""
    if isinstance(names, Number):
        return prediction.new_tensor(names)
    if isinstance(names, str):
        return parameters[names][..., None, None]
    if len(names) != prediction.shape[-1]:
        raise ValueError(f"Noise parameters {list(names)} for {prediction.shape[-1]} signals; give one name a signal.")
    return torch.stack([parameters[name] for name in names], dim=-1)[..., None, :]
