"""Normals of many rows at once, by means, SDs and what mixes their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Normals:
    r"""Normals of ``L`` unknowns for each row: :math:`u = m + s (\epsilon + N \epsilon)`.

    *N* is strictly lower triangular:
    ``mean (I, L)``, ``log_sd (I, L)``, ``lower (I, L, L)`` or None for independent unknowns.
    """

    mean: Float[Tensor, "I L"]
    log_sd: Float[Tensor, "I L"]
    lower: Float[Tensor, "I L L"] | None = None

    @property
    def normal(self) -> Normals:
        """The posterior itself; of one whose noise is bent, that without the bends."""
        return self

    def draw(self, noise: Float[Tensor, "I K L"]) -> Float[Tensor, "I K L"]:
        """Draws from standard normal ``noise``, differentiable in the parameters."""
        mixed = noise if self.lower is None else noise + noise @ self.lower.mT
        return self.mean[:, None] + self.log_sd.exp()[:, None] * mixed

    def log_prob(self, draws: Float[Tensor, "I K L"], active: Bool[Tensor, "I L"]) -> Float[Tensor, "I K"]:
        """Log density of the unknowns that are ``active``; inactive ones must be independent of those (diagonal)."""
        each = -0.5 * self.scores(draws).square() - self.log_sd[:, None] - _HALF_LOG_TWO_PI
        return torch.where(active[:, None], each, 0.0).sum(-1)

    def scores(self, draws: Float[Tensor, "I K L"]) -> Float[Tensor, "I K L"]:
        """The noise that gives these draws."""
        score = (draws - self.mean[:, None]) * (-self.log_sd).exp()[:, None]
        if self.lower is None:
            return score
        unit = torch.eye(self.mean.shape[1], dtype=score.dtype, device=score.device)
        found: Tensor = torch.linalg.solve_triangular(unit + self.lower, score.mT, upper=False, unitriangular=True).mT
        return found

    def restricted(self, active: Bool[Tensor, "I L"]) -> Normals:
        """The same, with unknowns that an individual does not have independent of the others."""
        if self.lower is None or bool(active.all()):
            return self
        return Normals(self.mean, self.log_sd, self.lower * (active[:, :, None] & active[:, None]))

    def detach(self) -> Normals:
        """The same without gradients."""
        return Normals(self.mean.detach(), self.log_sd.detach(), None if self.lower is None else self.lower.detach())


def standard_log_prob(draws: Float[Tensor, "I K L"], active: Bool[Tensor, "I L"]) -> Float[Tensor, "I K"]:
    """Log density of the priors in units of their SDs, over the unknowns that are active."""
    return torch.where(active[:, None], -0.5 * draws.square() - _HALF_LOG_TWO_PI, 0.0).sum(-1)
