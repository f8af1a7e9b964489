"""Noise of data that are positive by nature: a Gaussian error truncated at 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nlme_sbi.individual_model.noise.gaussian import POSITIVE_REMEDY
from nlme_sbi.individual_model.noise.model import NoiseModel
from nlme_sbi.individual_model.noise.normal_tails import bound_score, log_ndtr_difference

_LOWEST_ROOM = -30.0  # SDs; the probability above 0 of predictions farther below 0 underflows in float64


@dataclass(frozen=True)
class AboveZero(NoiseModel):
    r"""``y = f + sd(f) eps``, given that ``y > 0``: Beal's method M4.

    A measurement has the density :math:`\varphi((y - f)/s) / (s\,\Phi(f/s))`, one below a limit :math:`L` the
    probability :math:`(\Phi((L - f)/s) - \Phi(-f/s)) / \Phi(f/s)`. Without it (M3) a value below the limit may be
    negative, which no concentration is: where errors are additive and predictions lie near 0, M3 gives values below
    the limit too much probability.

    Source: Beal (2001), J. Pharmacokinet. Pharmacodyn. 28:481, methods M3 and M4.

    Args:
        error: additive, proportional, combined or power.
    """

    error: NoiseModel

    def __post_init__(self) -> None:
        if not self.error.is_gaussian or type(self.error).transform is not NoiseModel.transform:
            raise ValueError(
                "AboveZero takes an error that is Gaussian as it stands (additive, proportional, combined, power), not "
                f"{type(self.error).__name__}; log-normal values are positive by themselves. Write "
                'AboveZero(Additive(sd="sd")).'
            )

    @property
    def reads_times(self) -> bool:
        return self.error.reads_times

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.error.parameters

    @property
    def is_gaussian(self) -> bool:
        return False

    @property
    def has_normal_constant(self) -> bool:
        return True

    @property
    def domain(self) -> str:
        """The possible values, for messages."""
        return "positive numbers"

    @property
    def remedy(self) -> str:
        """What to do about other values, for messages."""
        return POSITIVE_REMEDY

    def can_make(self, values: Tensor) -> Bool[Tensor, " ..."]:
        return torch.isfinite(values) & (values > 0)

    def can_lie_between(self, lower: Tensor, upper: Tensor) -> Bool[Tensor, " ..."]:
        return (lower < upper) & (upper > 0)

    def standard_deviation(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """SD of the Gaussian before truncation, the unit of residuals."""
        return self.error.standard_deviation(prediction, parameters)

    def sample(
        self, prediction: Float[Tensor, "*batch T C"], parameters: Mapping[str, Tensor], *, generator: torch.Generator
    ) -> Float[Tensor, "*batch T C"]:
        exact = prediction.double()
        sd = self.standard_deviation(exact, {name: value.double() for name, value in parameters.items()})
        room = torch.where(sd > 0, exact / torch.where(sd > 0, sd, 1.0), torch.inf).clamp(min=_LOWEST_ROOM)
        share = torch.rand(exact.shape, generator=generator, device=exact.device, dtype=exact.dtype).clamp_min(1e-300)
        # The upper part by its mirror image: small probabilities keep their digits, those near 1 would not.
        score = -torch.special.ndtri(share * torch.special.ndtr(room))
        return torch.where(sd > 0, exact + sd * score, exact).to(prediction.dtype)

    def log_prob(
        self,
        values: Float[Tensor, "*#batch T C"],
        prediction: Float[Tensor, "*#batch T C"],
        parameters: Mapping[str, Tensor],
    ) -> Float[Tensor, "*batch T C"]:
        density = self.error.log_prob(values, prediction, parameters)
        possible = torch.isfinite(density) & (values > 0)
        return torch.where(possible, density - self._log_mass(prediction, parameters), -torch.inf)

    def log_interval(
        self, lower: Tensor, upper: Tensor, prediction: Tensor, parameters: Mapping[str, Tensor]
    ) -> Float[Tensor, " ..."]:
        sd = self.standard_deviation(prediction, parameters)
        possible = (sd > 0) & torch.isfinite(prediction)
        safe, location = torch.where(possible, sd, 1.0), torch.where(possible, prediction, 0.0)
        low, high = (bound_score(bound.clamp(min=0.0), location, safe) for bound in (lower, upper))
        found = log_ndtr_difference(low, high) - self._log_mass(prediction, parameters)
        return torch.where(possible & (upper > 0), found, -torch.inf)

    def _log_mass(self, prediction: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log of the probability of the Gaussian above 0, for an SD of 0 as for 1."""
        sd = self.standard_deviation(prediction, parameters)
        possible = (sd > 0) & torch.isfinite(prediction)
        room = torch.where(possible, prediction, 0.0) / torch.where(possible, sd, 1.0)
        return log_ndtr_difference(torch.full_like(room, -torch.inf), room)
