"""Conditional normalizing flows: invertible maps between ``phi`` and Gaussian noise, given a summary of the data.

The only file that imports nflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from nflows.transforms import CompositeTransform
from nflows.transforms.coupling import AffineCouplingTransform
from torch import Tensor, nn


class BoundedAffineCoupling(AffineCouplingTransform):  # type: ignore[misc]
    r"""Affine coupling whose scale is :math:`\exp(b \tanh(u/b))`, between ``exp(-b)`` and ``exp(b)``.

    nflows fixes the scale at :math:`\mathrm{sigmoid}(u + 2) + 10^{-3} \le 1.001`: from noise to data such a layer
    cannot expand, from data to noise it cannot stretch a posterior that is narrower than the prior.
    """

    def __init__(
        self, mask: Tensor, transform_net_create_fn: Callable[[int, int], nn.Module], *, log_scale_bound: float
    ) -> None:
        super().__init__(mask, transform_net_create_fn)
        self.log_scale_bound = log_scale_bound

    def _log_scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.chunk(2, dim=1)
        return self.log_scale_bound * torch.tanh(raw / self.log_scale_bound), shift

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(transform_params)
        return log_scale.exp(), shift

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(transform_params)
        return inputs * log_scale.exp() + shift, log_scale.sum(1)

    def _coupling_transform_inverse(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(transform_params)
        return (inputs - shift) * (-log_scale).exp(), -log_scale.sum(1)


class Conditioner(nn.Module):
    """Residual network from the untouched coordinates and the summary to a coupling's parameters.

    The last layer starts at zero, so that an untrained coupling is the identity.
    """

    def __init__(self, inputs: int, outputs: int, *, context: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs + context, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, coordinates: Float[Tensor, "B d"], context: Float[Tensor, "B H"]) -> Float[Tensor, "B out"]:
        hidden = nn.functional.silu(self.first(torch.cat((coordinates, context), dim=1)))
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        output: Tensor = self.last(hidden)
        return output


def coupling_masks(dimension: int, couplings: int, seed: int = 0) -> list[Tensor]:
    """Which coordinates each coupling changes: balanced random halves, each followed by its complement.

    With one dimension every coupling changes it, given the summary alone.
    """
    if dimension == 1:
        return [torch.ones(1, dtype=torch.int64)] * couplings
    generator = torch.Generator().manual_seed(seed)
    masks: list[Tensor] = []
    while len(masks) < couplings:
        mask = torch.zeros(dimension, dtype=torch.int64)
        mask[torch.randperm(dimension, generator=generator)[: math.ceil(dimension / 2)]] = 1
        masks += [mask, 1 - mask]
    return masks[:couplings]


class ConditionalFlow(nn.Module):
    """Density and sampler of scaled parameters ``z (B, D)`` given a summary ``context (B, H)``."""

    def __init__(self, transform: nn.Module, dimension: int) -> None:
        super().__init__()
        self.transform = transform
        self.dimension = dimension

    def log_prob(self, z: Float[Tensor, "B D"], context: Float[Tensor, "B H"]) -> Float[Tensor, " B"]:
        """Normalised log density, ``(B,)``."""
        noise, log_determinant = self.transform(z, context)
        density: Tensor = _standard_normal_log_prob(noise) + log_determinant
        return density

    def sample(
        self, noise: Float[Tensor, "B D"], context: Float[Tensor, "B H"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Push standard normal ``noise`` through the flow: draws ``(B, D)`` and their log density ``(B,)``."""
        z, log_determinant = self.transform.inverse(noise, context)  # type: ignore[operator]
        return z, _standard_normal_log_prob(noise) - log_determinant


def _standard_normal_log_prob(noise: Tensor) -> Tensor:
    return -0.5 * noise.square().sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi)


@dataclass(frozen=True)
class AffineCouplingFlow:
    """Conditional RealNVP: affine couplings with a bounded log-scale (Dinh et al. 2017, ICLR).

    Args:
        couplings: number of coupling layers; an even number changes every coordinate equally often.
        hidden: width of each conditioner.
        layers: hidden layers of each conditioner.
        log_scale_bound: largest absolute log-scale of one coupling; 3 lets one layer contract twentyfold.
    """

    couplings: int = 6
    hidden: int = 128
    layers: int = 2
    log_scale_bound: float = 3.0

    def __post_init__(self) -> None:
        if self.couplings < 1 or self.hidden < 1 or self.layers < 1 or not self.log_scale_bound > 0:
            raise ValueError(f"flow: couplings, hidden, layers and log_scale_bound must be positive; got {self}.")

    def build(self, dimension: int, context: int) -> ConditionalFlow:
        """A fresh flow over ``dimension`` parameters given a summary of width ``context``."""

        def conditioner(inputs: int, outputs: int) -> nn.Module:
            return Conditioner(inputs, outputs, context=context, hidden=self.hidden, layers=self.layers)

        couplings = [
            BoundedAffineCoupling(mask, conditioner, log_scale_bound=self.log_scale_bound)
            for mask in coupling_masks(dimension, self.couplings)
        ]
        return ConditionalFlow(CompositeTransform(couplings), dimension)
