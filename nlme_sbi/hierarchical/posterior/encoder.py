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
from jaxtyping import Float
from torch import Tensor, nn

from nlme_sbi.config.wording import check_choice, did_you_mean, listed
from nlme_sbi.hierarchical.levels import BoundHierarchy, Latent
from nlme_sbi.hierarchical.posterior.couplings import Couplings, FlowedNormals
from nlme_sbi.hierarchical.posterior.normals import Normals as Normals
from nlme_sbi.hierarchical.posterior.normals import standard_log_prob as standard_log_prob

_LINEAR = 4.0  # prior SDs up to which means are what the network says; beyond they grow as the logarithm
_NARROWEST, _WIDEST = math.log(1e-4), math.log(3.0)
_CORRELATION_DAMPING = 0.1
PACE = 10.0  # of weights that are means themselves, where those of layers add up to a mean in hundreds

Family = Literal["diagonal", "full", "flow"]


@dataclass(frozen=True)
class SeriesEncoder:
    """A network from the features of a series to the posterior of the individual.

    Args:
        hidden: nodes of each layer.
        layers: hidden layers.
        family: "full" covariance; "diagonal" (mean field), which is far behind where parameters depend on each other;
            "flow", a full covariance of noise that affine couplings have bent, for posteriors that are not normal.
        start: SD of the posteriors before training, in prior SDs. With .3 most first draws of stiff models have no
            finite gradient.
        noise_start: where posteriors of noise parameters begin, in prior SDs above the prior mean: with much noise the
            first steps see the whole series instead of single readings.
        blind: parameters whose posterior does not see the series, only the groups; for comparisons with the published
            method, whose globals are so.
        dropout: share of hidden nodes that are left out at random while training.
        couplings: of a flow.
    """

    hidden: int = 128
    layers: int = 2
    family: Family = "full"
    start: float = 0.1
    noise_start: float = 2.0
    blind: Sequence[str] = ()
    dropout: float = 0.0
    couplings: int = 4

    def __post_init__(self) -> None:
        check_choice("encoder.family", self.family, ("diagonal", "full", "flow"))
        if min(self.hidden, self.layers, self.couplings) < 1 or not self.start > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "encoder needs hidden, layers and couplings of at least 1, a positive start and a dropout in [0, 1); "
                f"got {self.hidden}, {self.layers}, {self.couplings}, {self.start} and {self.dropout}."
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
        pairs = unknowns * (unknowns - 1) // 2 if settings.family != "diagonal" else 0
        self.pairs = nn.Linear(settings.hidden, pairs) if pairs else None
        for head in (self.means, self.log_sds, self.pairs):
            if head is not None:
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
        nn.init.constant_(self.log_sds.bias, math.log(settings.start))
        begin = noise_starts(hierarchy.own, noise, settings.noise_start)
        with torch.no_grad():
            self.means.bias.copy_(begin)
        self.couplings = None
        if settings.family == "flow" and unknowns > 1:
            self.couplings = Couplings(unknowns, settings.hidden, settings.couplings, hidden=settings.hidden // 2 or 1)
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

    def forward(self, features: Float[Tensor, "I F"], codes: Tensor) -> Normals | FlowedNormals:
        """The posterior of every individual.

        Args:
            features: as :class:`~nlme_sbi.hierarchical.posterior.features.SeriesFeatures` has them.
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
        found = Normals(_compressed(mean), log_sd.clamp(_NARROWEST, _WIDEST), lower)
        if self.couplings is None:
            return found
        bends = (~self.blind).expand(mean.shape)  # what is blind stays normal, and bends nothing
        return FlowedNormals(found, self.couplings, dict(self.couplings.named_parameters()), seen, bends)


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

    def take(self, found: Normals, *, trains: bool) -> None:
        """Take these normals, of one row, to train on from there or to stay."""
        with torch.no_grad():
            self.slow_mean.copy_(found.mean[0] / PACE)
            self.slow_log_sd.copy_(found.log_sd[0] / PACE)
            if self.pairs is not None and found.lower is not None:
                row, column = torch.tril_indices(len(self.slow_mean), len(self.slow_mean), -1)
                self.pairs.copy_(found.lower[0, row, column])
        for parameter in self.parameters():
            parameter.requires_grad_(trains)


def noise_starts(latents: Sequence[Latent], noise: Sequence[str], start: float) -> Tensor:
    """Means before training, in prior SDs: 0, but for parameters of the noise."""
    return torch.tensor([start if latent.parameter in noise else 0.0 for latent in latents])


def _compressed(mean: Tensor) -> Tensor:
    """Means up to 4 prior SDs as they are; beyond, the logarithm keeps first guesses where gradients are numbers."""
    beyond = (mean.abs() - _LINEAR).clamp_min(0)
    return torch.where(beyond > 0, mean.sign() * (_LINEAR + torch.log1p(beyond)), mean)
