"""Variational posteriors: of every individual from its series, and of what all individuals share.

Both are normal in units of the priors' SDs, ``u = (z - mean) / sd``, so that the prior of every ``u`` is standard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nlme_sbi.config.wording import check_choice, did_you_mean, listed
from nlme_sbi.hierarchical.levels import BoundHierarchy, Latent

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_LINEAR = 4.0  # prior SDs up to which means are what the network says; beyond they grow as the logarithm
_NARROWEST, _WIDEST = math.log(1e-4), math.log(3.0)
_CORRELATION_DAMPING = 0.1
PACE = 10.0  # of weights that are means themselves, where those of layers add up to a mean in hundreds

Family = Literal["diagonal", "full"]


@dataclass(frozen=True, eq=False)
class Normals:
    r"""Normals of ``L`` unknowns for each row: :math:`u = m + s (\epsilon + N \epsilon)`.

    *N* is strictly lower triangular:
    ``mean (I, L)``, ``log_sd (I, L)``, ``lower (I, L, L)`` or None for independent unknowns.
    """

    mean: Float[Tensor, "I L"]
    log_sd: Float[Tensor, "I L"]
    lower: Float[Tensor, "I L L"] | None = None

    def draw(self, noise: Float[Tensor, "I K L"]) -> Float[Tensor, "I K L"]:
        """Draws from standard normal ``noise``, differentiable in the parameters."""
        mixed = noise if self.lower is None else noise + noise @ self.lower.mT
        return self.mean[:, None] + self.log_sd.exp()[:, None] * mixed

    def log_prob(self, draws: Float[Tensor, "I K L"], active: Bool[Tensor, "I L"]) -> Float[Tensor, "I K"]:
        """Log density of the unknowns that are ``active``; inactive ones must be independent of those (diagonal)."""
        score = (draws - self.mean[:, None]) * (-self.log_sd).exp()[:, None]
        if self.lower is not None:
            unit = torch.eye(self.mean.shape[1], dtype=score.dtype, device=score.device)
            solved = torch.linalg.solve_triangular(unit + self.lower, score.mT, upper=False, unitriangular=True)
            score = solved.mT
        each = -0.5 * score.square() - self.log_sd[:, None] - _HALF_LOG_TWO_PI
        return torch.where(active[:, None], each, 0.0).sum(-1)

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


@dataclass(frozen=True)
class SeriesEncoder:
    """A network from the features of a series to the posterior of the individual.

    Args:
        hidden: nodes of each layer.
        layers: hidden layers.
        family: "full" covariance, or "diagonal" (mean field), which is far behind where parameters depend on each
            other.
        start: SD of the posteriors before training, in prior SDs. With .3 most first draws of stiff models have no
            finite gradient.
        noise_start: where posteriors of noise parameters begin, in prior SDs above the prior mean: with much noise the
            first steps see the whole series instead of single readings.
        blind: parameters whose posterior does not see the series, only the groups; for comparisons with the published
            method, whose globals are so.
        dropout: share of hidden nodes that are left out at random while training.
    """

    hidden: int = 128
    layers: int = 2
    family: Family = "full"
    start: float = 0.1
    noise_start: float = 2.0
    blind: Sequence[str] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("encoder.family", self.family, ("diagonal", "full"))
        if min(self.hidden, self.layers) < 1 or not self.start > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "encoder needs hidden and layers of at least 1, a positive start and a dropout in [0, 1); got "
                f"{self.hidden}, {self.layers}, {self.start} and {self.dropout}."
            )

    def build(self, features: int, hierarchy: BoundHierarchy, noise: Sequence[str] = ()) -> EncoderNetwork:
        """The network for so many features and the unknowns of each individual, some of them of the ``noise``."""
        names = {latent.parameter for latent in hierarchy.own}
        wrong = [name for name in self.blind if name not in names]
        if wrong:
            raise ValueError(
                f"encoder.blind names {listed(wrong)}; each individual has the unknowns {listed(sorted(names))}."
                f"{did_you_mean(wrong[0], sorted(names))}"
            )
        return EncoderNetwork(self, features, hierarchy, noise)


class EncoderNetwork(nn.Module):
    """Posterior of every individual's unknowns, in prior SDs, from features and codes of groups.

    Args:
        settings: layers, family.
        features: how many.
        hierarchy: its ``own`` unknowns, and the factors whose levels are seen.
        noise: parameters that are of the noise.
    """

    blind: Tensor
    sees: Tensor

    def __init__(
        self, settings: SeriesEncoder, features: int, hierarchy: BoundHierarchy, noise: Sequence[str] = ()
    ) -> None:
        super().__init__()
        unknowns, levels = len(hierarchy.own), sum(len(names) for names in hierarchy.levels.values())
        self._counts = [len(names) for names in hierarchy.levels.values()]
        sizes = [features + levels, *[settings.hidden] * settings.layers]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(sizes):
            layers += [nn.Linear(inner, outer), nn.SiLU()]
            if settings.dropout:
                layers.append(nn.Dropout(settings.dropout))
        self.trunk = nn.Sequential(*layers)
        self.means = nn.Linear(settings.hidden, unknowns)
        self.log_sds = nn.Linear(settings.hidden, unknowns)
        pairs = unknowns * (unknowns - 1) // 2 if settings.family == "full" else 0
        self.pairs = nn.Linear(settings.hidden, pairs) if pairs else None
        for head in (self.means, self.log_sds, self.pairs):
            if head is not None:
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
        nn.init.constant_(self.log_sds.bias, math.log(settings.start))
        begin = noise_starts(hierarchy.own, noise, settings.noise_start)
        with torch.no_grad():
            self.means.bias.copy_(begin)
        blind = torch.tensor([latent.parameter in settings.blind for latent in hierarchy.own])
        self.register_buffer("blind", blind, persistent=False)
        factors = list(hierarchy.levels)
        sees = torch.zeros((levels, unknowns))  # a blind unknown depends on its own factor alone
        first = 0
        for place, factor in enumerate(factors):
            for column, latent in enumerate(hierarchy.own):
                if latent.factor == factor:
                    sees[first : first + self._counts[place], column] = 1.0
            first += self._counts[place]
        self.register_buffer("sees", sees, persistent=False)
        self.blind_means = nn.Parameter(torch.zeros(1 + levels, unknowns)) if bool(blind.any()) else None
        self.blind_log_sds = nn.Parameter(torch.zeros(1 + levels, unknowns)) if bool(blind.any()) else None
        if self.blind_log_sds is not None:
            with torch.no_grad():
                self.blind_log_sds[0] = math.log(settings.start) / PACE
        if self.blind_means is not None:
            with torch.no_grad():
                self.blind_means[0] = begin / PACE

    def forward(self, features: Float[Tensor, "I F"], codes: Tensor) -> Normals:
        """The posterior of every individual.

        Args:
            features: as :class:`~nlme_sbi.hierarchical.features.SeriesFeatures` has them.
            codes: ``(I, F)``, of every factor.
        """
        known = [nn.functional.one_hot(codes[:, place], count) for place, count in enumerate(self._counts)]
        levels = torch.cat([features.new_zeros((len(features), 0)), *known], 1).to(features.dtype)
        seen = self.trunk(torch.cat([features, levels], 1))
        mean, log_sd = self.means(seen), self.log_sds(seen)
        if self.blind_means is not None and self.blind_log_sds is not None:
            own_mean = PACE * (self.blind_means[0] + levels @ (self.blind_means[1:] * self.sees))
            own_sd = PACE * (self.blind_log_sds[0] + levels @ (self.blind_log_sds[1:] * self.sees))
            mean = torch.where(self.blind, own_mean, mean)
            log_sd = torch.where(self.blind, own_sd, log_sd)
        lower = None
        if self.pairs is not None:
            count = mean.shape[1]
            row, column = torch.tril_indices(count, count, -1)
            lower = mean.new_zeros((len(mean), count, count))
            lower[:, row, column] = _CORRELATION_DAMPING * self.pairs(seen)
            if bool(self.blind.any()):  # what is blind is independent of what is not
                lower = lower * (~self.blind[:, None] & ~self.blind[None])
        return Normals(_compressed(mean), log_sd.clamp(_NARROWEST, _WIDEST), lower)


class SharedPosterior(nn.Module):
    """Normal posterior of what all individuals share, in prior SDs.

    Args:
        count: how many unknowns.
        family: "diagonal" or "full" covariance.
        start: SD before training.
        begin: ``(count,)``, means before training; 0 when left out.
    """

    def __init__(self, count: int, family: Family = "full", start: float = 0.1, begin: Tensor | None = None) -> None:
        super().__init__()
        self.slow_mean = nn.Parameter(torch.zeros(count) if begin is None else begin / PACE)
        self.slow_log_sd = nn.Parameter(torch.full((count,), math.log(start) / PACE))
        self.pairs = nn.Parameter(torch.zeros(count * (count - 1) // 2)) if family == "full" and count > 1 else None

    def forward(self) -> Normals:
        """The posterior, as one row."""
        lower = None
        if self.pairs is not None:
            count = len(self.slow_mean)
            row, column = torch.tril_indices(count, count, -1)
            lower = self.slow_mean.new_zeros((1, count, count))
            lower[0, row, column] = self.pairs
        log_sd = (PACE * self.slow_log_sd).clamp(_NARROWEST, _WIDEST)
        return Normals(PACE * self.slow_mean[None], log_sd[None], lower)


def noise_starts(latents: Sequence[Latent], noise: Sequence[str], start: float) -> Tensor:
    """Means before training, in prior SDs: 0, but for parameters of the noise."""
    return torch.tensor([start if latent.parameter in noise else 0.0 for latent in latents])


def _compressed(mean: Tensor) -> Tensor:
    """Means up to 4 prior SDs as they are; beyond, the logarithm keeps first guesses where gradients are numbers."""
    beyond = (mean.abs() - _LINEAR).clamp_min(0)
    return torch.where(beyond > 0, mean.sign() * (_LINEAR + torch.log1p(beyond)), mean)
