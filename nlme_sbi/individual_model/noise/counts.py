"""Noise models of counts: the prediction is the mean of a discrete distribution over whole numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.noise.model import Names, NoiseModel, Number, flat_names, parameter_column
from nlme_sbi.numerics.gamma_draws import draw_gamma
from nlme_sbi.numerics.incomplete_functions import log_beta_lower, log_difference, log_gamma_lower, log_gamma_upper

_LARGE = 20.0  # shapes from which the Stirling series has all digits
_POISSON = 1e7  # inverse dispersions from which tails are Poisson to 7 digits, and better than the beta function's


class CountModel(NoiseModel):
    """Base class of count models; a subclass gives probabilities, tails and variance as functions of the mean."""

    @property
    def is_gaussian(self) -> bool:
        return False

    @property
    def is_count(self) -> bool:
        return True

    @property
    def domain(self) -> str:
        """The possible values, for messages."""
        return "whole numbers from 0"

    @property
    def remedy(self) -> str:
        """What to do about other values, for messages."""
        return (
            "Give counts as they were counted, neither averaged nor normalised nor transformed; leave other rows out, "
            "or choose noise of continuous values."
        )

    @property
    def most(self) -> float:
        """The largest possible count."""
        return torch.inf

    @abstractmethod
    def variance(self, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Variance of a count with this mean."""

    @abstractmethod
    def log_mass(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log probability of possible counts, for means strictly between 0 and :attr:`most`."""

    @abstractmethod
    def log_at_most(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """``log P(Y <= k)`` for ``0 <= k < most``, for means as above."""

    @abstractmethod
    def log_above(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """``log P(Y > k)`` for ``0 <= k < most``, for means as above."""

    @abstractmethod
    def draw(self, mean: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """One count for each mean from 0 to :attr:`most`, float64."""

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """SD of a count, the unit of Pearson residuals; 0 where the prediction is impossible as a mean."""
        possible = (prediction > 0) & (prediction < self.most) & torch.isfinite(prediction)
        variance = self.variance(torch.where(possible, prediction, 0.5), parameters)
        return torch.where(possible, variance.sqrt(), 0.0)

    def can_make(self, values: Tensor) -> Bool[Tensor, " ..."]:
        return (values >= 0) & (values == values.floor()) & (values <= self.most) & torch.isfinite(values)

    def can_lie_between(self, lower: Tensor, upper: Tensor) -> Bool[Tensor, " ..."]:
        first, last = self._between(lower, upper)
        return first <= last

    def _between(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """First and last count strictly between two bounds."""
        return (lower.floor() + 1).clamp_min(0.0), (upper.ceil() - 1).clamp_max(self.most)

    @torch.no_grad()
    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        """Counts with these means; NaN, a failed simulation, where a prediction is impossible as a mean."""
        mean = prediction.double()
        possible = (mean >= 0) & (mean <= self.most) & torch.isfinite(mean)
        exact = {name: value.double() for name, value in parameters.items()}
        drawn = self.draw(torch.where(possible, mean, 0.0), exact, generator)
        return torch.where(possible, drawn, torch.nan).to(prediction.dtype)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        """Log probability of every count; ``-inf`` with zero gradients for impossible values or predictions.

        With a mean of 0 the count is 0 with probability 1.
        """
        whole = self.can_make(values)
        inside = (prediction > 0) & (prediction < self.most) & torch.isfinite(prediction)
        counts, mean = torch.where(whole, values, 0.0), torch.where(inside, prediction, 0.5)
        found = self.log_mass(counts, mean, parameters)
        sure = ((prediction == 0) | (prediction == self.most)) & (values == prediction) & torch.isfinite(prediction)
        return torch.where(whole & inside, found, torch.where(sure, 0.0, -torch.inf).to(found))

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        """``log P(lower < Y < upper)`` with strict bounds: "5 or fewer" is a count below 6."""
        first, last = self._between(lower, upper)
        inside = (prediction > 0) & (prediction < self.most) & torch.isfinite(prediction)
        mean = torch.where(inside, prediction, 0.5)
        high_tail = first > mean  # subtract the smaller tails
        below, beyond = (
            self._tail(first - 1, mean, parameters, high_tail),
            self._tail(last, mean, parameters, high_tail),
        )
        small, large = torch.where(high_tail, beyond, below), torch.where(high_tail, below, beyond)
        found = torch.where(first <= last, log_difference(small, large), -torch.inf)
        edge = ((prediction == 0) | (prediction == self.most)) & torch.isfinite(prediction)
        sure = edge & (first <= prediction) & (prediction <= last)
        return torch.where(inside, found, torch.where(sure, 0.0, -torch.inf).to(found))

    def _tail(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor], above: Tensor) -> Tensor:
        """``log P(Y > k)`` where ``above``, else ``log P(Y <= k)``, for any k."""
        negative, everything = counts < 0, counts >= self.most
        safe = torch.where(negative | everything, 0.0, counts)
        found = torch.where(above, self.log_above(safe, mean, parameters), self.log_at_most(safe, mean, parameters))
        found = torch.where(negative, torch.where(above, 0.0, -torch.inf).to(found), found)
        return torch.where(everything, torch.where(above, -torch.inf, 0.0).to(found), found)


@dataclass(frozen=True)
class Poisson(CountModel):
    """Counts whose variance is their mean, the prediction."""

    @property
    def parameters(self) -> tuple[str, ...]:
        return ()

    def variance(self, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        return mean

    def log_mass(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        return counts * torch.log(mean) - mean - torch.lgamma(counts + 1)

    def log_at_most(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        return log_gamma_upper(counts + 1, mean)

    def log_above(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        return log_gamma_lower(counts + 1, mean)

    def draw(self, mean: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        del parameters
        return torch.poisson(mean, generator=generator)


@dataclass(frozen=True)
class NegativeBinomial(CountModel):
    """Overdispersed counts: variance ``mean + dispersion mean^2``; Poisson as the dispersion goes to 0.

    Args:
        dispersion: a positive number, or the name of a parameter.
    """

    dispersion: Number | Names

    def __post_init__(self) -> None:
        if isinstance(self.dispersion, Number) and not self.dispersion > 0:
            raise ValueError(f"dispersion must be positive; got {self.dispersion}. For none, take Poisson().")

    @property
    def parameters(self) -> tuple[str, ...]:
        return flat_names(self.dispersion)

    def variance(self, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return mean + parameter_column(self.dispersion, mean, parameters) * mean.square()

    def log_mass(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        size = parameter_column(self.dispersion, mean, parameters).reciprocal()
        shared = counts * torch.log(mean) - size * torch.log1p(mean / size) - torch.lgamma(counts + 1)
        many = size > _LARGE
        large, small = torch.where(many, size, _LARGE), torch.where(many, _LARGE, size)
        direct = torch.lgamma(counts + small) - torch.lgamma(small) - counts * torch.log(small + mean)
        # The same by Stirling's series: nearly equal logs of large gamma functions would cancel.
        grown = torch.log1p(counts / large)
        by_series = (large - 0.5) * grown - counts + counts * (grown - torch.log1p(mean / large))
        by_series = by_series + _stirling(large + counts) - _stirling(large)
        return shared + torch.where(many, by_series, direct)

    def log_at_most(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        size, share, rest, is_poisson = self._shares(mean, parameters)
        found = log_beta_lower(size, counts + 1, share, rest)
        return torch.where(is_poisson, log_gamma_upper(counts + 1, mean), found)

    def log_above(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        size, share, rest, is_poisson = self._shares(mean, parameters)
        found = log_beta_lower(counts + 1, size, rest, share)
        return torch.where(is_poisson, log_gamma_lower(counts + 1, mean), found)

    def _shares(self, mean: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = parameter_column(self.dispersion, mean, parameters).reciprocal()
        is_poisson = size > _POISSON
        size = torch.where(is_poisson, 1.0, size)
        return size, size / (size + mean), mean / (size + mean), is_poisson

    def draw(self, mean: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        size = parameter_column(self.dispersion, mean, parameters).reciprocal().expand_as(mean)
        return torch.poisson(mean / size * draw_gamma(size, generator=generator), generator=generator)


@dataclass(frozen=True)
class Binomial(CountModel):
    """Successes among ``trials``; the prediction is their mean, the probability of one times ``trials``.

    Args:
        trials: a whole number from 1.
    """

    trials: int

    def __post_init__(self) -> None:
        if self.trials < 1 or self.trials != int(self.trials):
            raise ValueError(f"trials must be a whole number from 1; got {self.trials}.")

    @property
    def parameters(self) -> tuple[str, ...]:
        return ()

    @property
    def most(self) -> float:
        return float(self.trials)

    @property
    def domain(self) -> str:
        """The possible values, for messages."""
        return f"whole numbers from 0 to {self.trials}"

    def variance(self, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        return mean * (1 - mean / self.trials)

    def log_mass(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        others = self.trials - counts
        ways = torch.lgamma(counts.new_tensor(self.trials + 1.0)) - torch.lgamma(counts + 1) - torch.lgamma(others + 1)
        return ways + counts * torch.log(mean / self.trials) + others * torch.log1p(-mean / self.trials)

    def log_at_most(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        share = mean / self.trials
        return log_beta_lower(self.trials - counts, counts + 1, 1 - share, share)

    def log_above(self, counts: Tensor, mean: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        del parameters
        share = mean / self.trials
        return log_beta_lower(counts + 1, self.trials - counts, share, 1 - share)

    def draw(self, mean: Tensor, parameters: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        del parameters
        return torch.binomial(mean.new_full(mean.shape, self.trials), mean / self.trials, generator=generator)


def _stirling(size: Tensor) -> Tensor:
    """Difference of ``lgamma`` and Stirling's formula."""
    inverse = size.reciprocal()
    square = inverse.square()
    return inverse * (1 / 12 + square * (-1 / 360 + square * (1 / 1260 - square / 1680)))
