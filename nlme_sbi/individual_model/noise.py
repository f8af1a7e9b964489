"""Observation models: how a measurement scatters around the noise-free prediction, and what censoring leaves of it.

Every model is Gaussian after a monotone map: ``h(y) = h(f) + sd(f) eps``, with ``h`` the identity for the additive,
proportional and combined models and the logarithm for the exponential one. Its parameters are entries of ``phi``,
given by name and used on their natural scale; a tuple of names gives each signal its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nlme_sbi.types import Censoring, Observations

Names = str | tuple[str, ...]
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class NoiseModel(ABC):
    """Role of an observation model; subclasses are final and give the SD (and the scale that it holds on)."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the noise parameters, entries of ``phi``."""

    @abstractmethod
    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """SD on the scale of :meth:`transform`, broadcastable to ``prediction (..., T, C)``."""

    def transform(self, values: Tensor) -> Tensor:
        """The scale on which the noise is Gaussian; ``-inf`` for values that the model cannot produce."""
        return values

    def inverse(self, transformed: Tensor) -> Tensor:
        """Back from the scale of :meth:`transform`."""
        return transformed

    def log_slope(self, values: Tensor) -> Tensor | float:
        """Log derivative of :meth:`transform`, which makes a density of the values out of the Gaussian one."""
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
        if _all_regular(sd, location, measured):  # the rule, at half the price
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
        scores = [_score(self.transform(bound), location, sd) for bound in (lower, upper)]
        found = _log_ndtr_difference(*scores)
        return torch.where(possible, found, -torch.inf)


@torch.no_grad()
def _all_regular(sd: Tensor, location: Tensor, measured: Tensor) -> bool:
    """Whether every SD is positive and every number finite, judged by sums: they are cheaper than looking at each."""
    try:
        return bool(torch.isfinite(location.sum() + measured.sum() + sd.sum()) & (sd > 0).all())
    except RuntimeError:  # under torch.vmap there is no looking at values
        return False


@dataclass(frozen=True)
class Additive(NoiseModel):
    """``y = f + sd eps``."""

    sd: Names

    @property
    def parameters(self) -> tuple[str, ...]:
        return _flat(self.sd)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return _column(self.sd, prediction, parameters)


@dataclass(frozen=True)
class Proportional(NoiseModel):
    """``y = f (1 + cv eps)``. It cannot explain a measurement where the prediction is zero: combined models can."""

    cv: Names

    @property
    def parameters(self) -> tuple[str, ...]:
        return _flat(self.cv)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return _column(self.cv, prediction, parameters) * prediction.abs()


@dataclass(frozen=True)
class Combined1(NoiseModel):
    """``y = f + (sd + cv f) eps``."""

    sd: Names
    cv: Names

    @property
    def parameters(self) -> tuple[str, ...]:
        return _flat(self.sd, self.cv)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return _column(self.sd, prediction, parameters) + _column(self.cv, prediction, parameters) * prediction.abs()


@dataclass(frozen=True)
class Combined2(NoiseModel):
    """``y = f + sqrt(sd^2 + cv^2 f^2) eps``."""

    sd: Names
    cv: Names

    @property
    def parameters(self) -> tuple[str, ...]:
        return _flat(self.sd, self.cv)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.hypot(
            _column(self.sd, prediction, parameters), _column(self.cv, prediction, parameters) * prediction
        )


@dataclass(frozen=True)
class Exponential(NoiseModel):
    """``y = f exp(sd eps)``: log-normal around a positive prediction, which is the median."""

    sd: Names

    @property
    def parameters(self) -> tuple[str, ...]:
        return _flat(self.sd)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return _column(self.sd, prediction, parameters)

    def transform(self, values: Tensor) -> Tensor:
        return torch.where(values > 0, torch.log(torch.where(values > 0, values, 1.0)), -torch.inf)

    def inverse(self, transformed: Tensor) -> Tensor:
        return transformed.exp()

    def log_slope(self, values: Tensor) -> Tensor:
        return -torch.log(torch.where(values > 0, values, 1.0))


def observation_log_prob(
    noise: NoiseModel,
    observations: Observations,
    prediction: Float[Tensor, "I *batch T C"],
    parameters: Mapping[str, Tensor],
) -> Float[Tensor, "I *batch T C"]:
    """Contribution of every single measurement to the log likelihood; masked entries are 0, with zero gradients.

    A value contributes its log density, a censored one the log probability of what is known: ``Y < upper`` (left),
    ``Y > lower`` (right), ``lower < Y < upper`` (interval).

    Args:
        noise: the observation model.
        observations: ``I`` individuals.
        prediction: noise-free, ``(I, ..., T, C)``.
        parameters: natural value of each noise parameter, ``(I, ...)``.

    Raises:
        ValueError: a censored measurement without its bound.
    """

    def aligned(tensor: Tensor) -> Tensor:
        spread = (tensor.shape[0], *(1,) * (prediction.ndim - 3), *tensor.shape[1:])
        return tensor.reshape(spread).to(prediction.dtype if tensor.is_floating_point() else tensor.dtype)

    if observations.censoring is None and bool(observations.design.observed.all()):
        return noise.log_prob(aligned(observations.values), prediction, parameters)
    observed = aligned(observations.design.observed)
    # What is not measured is replaced before it meets the density: a NaN there would poison the gradient.
    safe = torch.where(observed, prediction, 1.0)
    values = torch.where(observed, aligned(observations.values), 1.0)
    density = noise.log_prob(values, safe, parameters)
    if observations.censoring is not None:
        lower, upper = (aligned(bound) for bound in _bounds(observations))
        known_by_bounds = aligned(observations.censoring) != int(Censoring.NONE)
        probability = noise.log_interval(lower, upper, safe, parameters)
        density = torch.where(known_by_bounds, probability, density)
    return torch.where(observed, density, 0.0)


def _bounds(observations: Observations) -> tuple[Tensor, Tensor]:
    """Bounds ``(I, T, C)`` of what is known, infinite where nothing bounds; plain values get (-inf, inf)."""
    observed = observations.design.observed
    codes = torch.zeros_like(observed) if observations.censoring is None else observations.censoring
    bounds = []
    sides = (
        ("lower", observations.lower, (Censoring.RIGHT, Censoring.INTERVAL), -torch.inf),
        ("upper", observations.upper, (Censoring.LEFT, Censoring.INTERVAL), torch.inf),
    )
    for name, given, kinds, open_end in sides:
        needed = torch.stack([codes == int(kind) for kind in kinds]).any(0) & observed
        if given is None and bool(needed.any()):
            raise ValueError(
                f"{int(needed.sum())} censored measurements have no {name} bound; give Observations their {name}."
            )
        bounds.append(torch.where(needed, open_end if given is None else given.double(), open_end))
    return bounds[0], bounds[1]


def _score(bound: Tensor, location: Tensor, sd: Tensor) -> Tensor:
    """Standard normal score of a bound; an infinite bound is its own score and has no gradient (inf * 0 is NaN)."""
    finite = torch.isfinite(bound)
    return torch.where(finite, (torch.where(finite, bound, 0.0) - location) / sd, bound)


# Standard normal scores are kept in this range: beyond 10 a probability is 1 to every digit of float64, and the
# derivatives of torch.special.log_ndtr overflow to NaN; below, only infinite scores are cut.
_SCORE_RANGE = (-1e10, 10.0)
# log(Phi(z) |z| sqrt(2 pi)) + z^2/2 = log(1 - 1/z^2 + 3/z^4 - 15/z^6 + ...): the first term left out is 8e-14 at -20.
_ASYMPTOTIC_BELOW = -20.0
_ASYMPTOTIC = (-1.0, 3.0, -15.0, 105.0, -945.0, 10395.0, -135135.0)


def _log_ndtr(score: Tensor) -> Tensor:
    """``log Phi(score)``; torch's own loses its derivatives in the lower tail, where it subtracts ``z^2/2`` twice."""
    far = score < _ASYMPTOTIC_BELOW
    tail = torch.where(far, score, _ASYMPTOTIC_BELOW)
    inverse_square = tail**-2
    series = torch.full_like(tail, _ASYMPTOTIC[-1])
    for coefficient in reversed(_ASYMPTOTIC[:-1]):
        series = series * inverse_square + coefficient
    asymptotic = -0.5 * tail**2 - torch.log(-tail) - _HALF_LOG_TWO_PI + torch.log1p(series * inverse_square)
    return torch.where(far, asymptotic, torch.special.log_ndtr(torch.where(far, 0.0, score)))


def _log_ndtr_difference(low: Tensor, high: Tensor) -> Tensor:
    """``log(Phi(high) - Phi(low))``, ``-inf`` where ``low >= high``; digits kept in both tails by symmetry."""
    mirrored = low > 0
    bottom = torch.where(mirrored, -high, low).clamp(*_SCORE_RANGE)
    top = torch.where(mirrored, -low, high).clamp(*_SCORE_RANGE)
    log_bottom, log_top = _log_ndtr(bottom), _log_ndtr(top)
    gap = log_bottom - log_top
    possible = gap < 0
    gap = torch.where(possible, gap, -1.0)
    near = gap > -math.log(2)
    log_rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, gap, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, gap))),
    )
    return torch.where(possible, log_top + log_rest, -torch.inf)


def _flat(*groups: Names) -> tuple[str, ...]:
    """All names of the noise parameters, each once."""
    names = [name for group in groups for name in ((group,) if isinstance(group, str) else group)]
    return tuple(dict.fromkeys(names))


def _column(names: Names, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The parameter of each signal, ``(..., 1, C)`` or ``(..., 1, 1)`` when all signals share it."""
    if isinstance(names, str):
        return parameters[names][..., None, None]
    if len(names) != prediction.shape[-1]:
        raise ValueError(f"Noise parameters {list(names)} for {prediction.shape[-1]} signals; give one name a signal.")
    return torch.stack([parameters[name] for name in names], dim=-1)[..., None, :]
