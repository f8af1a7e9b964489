r"""Posteriors that are not normal: noise bent by affine couplings, then mixed as a full covariance mixes it.

:math:`u = m + s (\epsilon' + N \epsilon')` with :math:`\epsilon'` made of standard normal :math:`\epsilon` by
couplings, each of which stretches and shifts half of the noise by a network of the other half and of the series. They
begin near the identity: a flow starts where the full covariance does.

Source: Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using real NVP, ICLR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from nlme_sbi.hierarchical.posterior.normals import Normals
from nlme_sbi.individual_model.neural.networks_within import Network

_LARGEST_LOG = 2.0  # of the scale of one coupling


class Couplings(nn.Module):
    """Affine couplings of ``L`` coordinates, given what a network sees of each individual.

    Args:
        unknowns: ``L``, at least 2.
        context: width of what is seen.
        count: of couplings.
        hidden: nodes of each conditioner.
    """

    masks: Tensor

    def __init__(self, unknowns: int, context: int, count: int, *, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        masks = torch.zeros((count, unknowns), dtype=torch.bool)
        for place in range(count):
            if place % 2:
                masks[place] = ~masks[place - 1]
            else:
                masks[place, torch.randperm(unknowns, generator=generator)[: (unknowns + 1) // 2]] = True
        self.register_buffer("masks", masks, persistent=False)
        self.conditioners = nn.ModuleList(
            Network([unknowns, context], 2 * unknowns, hidden=hidden, layers=1, last=0.01, seed=place)
            for place in range(count)
        )

    def forward(
        self,
        noise: Float[Tensor, "I K L"],
        context: Float[Tensor, "I H"],
        bends: Bool[Tensor, "I L"],
        inverse: bool = False,
    ) -> tuple[Float[Tensor, "I K L"], Float[Tensor, "I K L"]]:
        """Bent noise, or the noise before it, and the log of how much each coordinate was stretched on the way there.

        Args:
            noise: standard normal; with ``inverse`` bent noise.
            context: of each individual.
            bends: unknowns that take part; the others stay as they are and bend nothing.
            inverse: from bent noise back.
        """
        found, stretched = noise, torch.zeros_like(noise)
        takes_part = bends[:, None]
        order = range(len(self.masks))
        for place in reversed(order) if inverse else order:
            moved = self.masks[place] & takes_part
            seen = torch.where(self.masks[place] | ~takes_part, 0.0, found)
            raw_log, shift = self.conditioners[place](seen, context[:, None]).chunk(2, -1)
            log = torch.where(moved, _LARGEST_LOG * torch.tanh(raw_log / _LARGEST_LOG), 0.0)
            shift = torch.where(moved, shift, 0.0)
            found = (found - shift) * torch.exp(-log) if inverse else found * torch.exp(log) + shift
            stretched = stretched + log
        return found, stretched


@dataclass(frozen=True, eq=False)
class FlowedNormals:
    """Posteriors of ``L`` unknowns for each row: ``base`` with its noise bent.

    Args:
        base: mean, SD and what mixes the noise.
        couplings: that bend it.
        weights: of the couplings.
        context: ``(I, H)``.
        bends: ``(I, L)``, unknowns whose noise is bent.
    """

    base: Normals
    couplings: Couplings
    weights: Mapping[str, Tensor]
    context: Float[Tensor, "I H"]
    bends: Bool[Tensor, "I L"]

    @property
    def normal(self) -> Normals:
        """The posterior without the bends."""
        return self.base

    def draw(self, noise: Float[Tensor, "I K L"]) -> Float[Tensor, "I K L"]:
        """Draws from standard normal ``noise``, differentiable in the parameters."""
        return self.base.draw(self._bent(noise, inverse=False)[0])

    def log_prob(self, draws: Float[Tensor, "I K L"], active: Bool[Tensor, "I L"]) -> Float[Tensor, "I K"]:
        """Log density of the unknowns that are ``active``; inactive ones must not be bent."""
        noise, stretched = self._bent(self.base.scores(draws), inverse=True)
        plain = replace(self.base, mean=torch.zeros_like(self.base.mean), lower=None)
        # The density of the noise, less the logs of everything that stretched it.
        whole = plain.log_prob(noise * self.base.log_sd.exp()[:, None], active)
        return whole - torch.where(active[:, None], stretched, 0.0).sum(-1)

    def restricted(self, active: Bool[Tensor, "I L"]) -> FlowedNormals:
        """The same, with unknowns that an individual does not have independent of the others."""
        return replace(self, base=self.base.restricted(active), bends=self.bends & active)

    def detach(self) -> FlowedNormals:
        """The same without gradients."""
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return replace(self, base=self.base.detach(), weights=weights, context=self.context.detach())

    def _bent(self, noise: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = functional_call(
            self.couplings, dict(self.weights), (noise, self.context, self.bends, inverse)
        )
        return found
